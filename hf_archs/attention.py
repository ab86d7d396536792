"""Softmax attention as a mixer: over all tokens, and over a window.

They are registered as ``attention`` and ``sliding_attention``. What a token sees depends on its position in
its document alone, never on how the document was cut into forwards.

Letters in shapes: b batch, l length, d hidden size, h query heads, k key-value heads, n channels per head, p columns of
the state (keys before this forward), s blocks of queries.

Coordinates: the first token of a forward is at 0, what came before it has negative ones, and a document that began
earlier starts at a negative one. A token at coordinate i of a document that starts at a has position i - a.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_archs.backend import is_transformed
from hf_archs.cache import Slot, States
from hf_archs.call import call
from hf_archs.configuration import MixerConfig, check_range
from hf_archs.kernels.arguments import last_inputs, number_documents
from hf_archs.kernels.exporting import any_length, in_chunks, out_of_chunks
from hf_archs.kernels.numerics import cast, made_once, no_autocast, wide
from hf_archs.masks import Pairs, limited, sees_nothing
from hf_archs.norm import ArchRMSNorm
from hf_archs.registry import StateSpec, register_mixer


@strict
@dataclass(kw_only=True)
class AttentionConfig(MixerConfig):
    """Fields of attention (Vaswani et al. 2017, section 3.2).

    Args:
        num_heads: heads of the queries.
        num_key_value_heads: heads of keys and values, each for equally many query heads (Ainslie et al. 2023); None
            for ``num_heads``.
        head_dim: channels of a head; None for ``hidden_size / num_heads``.
        rope_theta: base of the rotary positions (Su et al. 2021), None for no positions. Channels c and c + m/2 of the
            m rotated ones are a pair, which turns by ``rope_theta ** (-2c / m)`` a token.
        partial_rotary_factor: part of a head's channels, the first ones, that is rotated.
        qk_norm: RMSNorm of queries and keys, over each ``head`` (Qwen3) or the ``full`` projection (OLMoE), or
            ``none``.
        attention_bias: bias of the projections to queries, keys and values.
        output_bias: bias of the projection at the end.
        clip_qkv: largest absolute value of queries, keys and values (OLMoE); None for no limit.
        attention_scale: what scores are multiplied by; None for ``head_dim ** -0.5``.
    """

    num_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10000.0
    partial_rotary_factor: float = 1.0
    qk_norm: Literal["none", "head", "full"] = "none"
    attention_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    attention_scale: float | None = None

    def validate_attention(self) -> None:
        """Refuse values that are out of range or do not fit together."""
        check_range(self, "num_heads", 1, 2**10)
        check_range(self, "partial_rotary_factor", 2.0**-10, 1.0)
        if self.num_key_value_heads is not None:
            check_range(self, "num_key_value_heads", 1, self.num_heads)
        self._allow(
            self.num_heads % self.key_value_heads == 0,
            "num_key_value_heads",
            f"are divisors of num_heads = {self.num_heads}, and None",
        )
        if self.head_dim is not None:
            check_range(self, "head_dim", 1, 2**12)
        self._allow(
            self.head_dim is not None or self.hidden_size % self.num_heads == 0,
            "num_heads",
            f"are divisors of hidden_size = {self.hidden_size} where head_dim is None",
        )
        if self.rope_theta is not None:
            check_range(self, "rope_theta", 1.0, 1e15)
        self._allow(
            self.rope_theta is None or (self.rotary_size >= 2 and self.rotary_size % 2 == 0),
            "partial_rotary_factor",
            f"is what gives an even number of the {self.head_size} channels of a head",
        )
        for field in ("clip_qkv", "attention_scale"):
            if getattr(self, field) is not None:
                check_range(self, field, 1e-6, 1e6)

    @property
    def _attn_implementation(self) -> str | None:
        """The model's, where transformers' functions for attention look for it."""
        owner = self.model_config
        return self.__dict__.get("_implementation") if owner is self else owner._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, implementation: str | None) -> None:
        self.__dict__["_implementation"] = implementation

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_size(self) -> int:
        """Channels of a head that are rotated where there are rotary positions."""
        return int(self.head_size * self.partial_rotary_factor)


@strict
@dataclass(kw_only=True)
class SlidingAttentionConfig(AttentionConfig):
    """Fields of attention over a window (Beltagy et al. 2020, section 3.1).

    Args:
        window: tokens that a token sees: itself and those before it.
        global_tokens: so many first tokens of each document are seen by all after them, the "attention sinks" of Xiao
            et al. 2023.
    """

    window: int = 2048
    global_tokens: int = 0

    def validate_window(self) -> None:
        """Refuse sizes that are out of range."""
        check_range(self, "window", 1, 2**24)
        check_range(self, "global_tokens", 0, 2**16)

    @property
    def reach(self) -> int:
        """The most tokens, itself among them, whose own keys a token sees, but for the global ones."""
        return self.window


def attention_state(config: AttentionConfig) -> dict[str, StateSpec]:
    """Rotated keys, and values, of all tokens, and the number of tokens in the document so far.

    The last ``position`` columns are the document's. (``position`` is of kind ``conv``, since transformers wants to
    find one of each kind.)
    """
    shape = (config.key_value_heads, config.head_size)
    kept = {name: StateSpec("recurrent", (*shape, None), together=True) for name in ("key", "value")}
    return {**kept, "position": StateSpec("conv", (1,), torch.int64)}


def sliding_attention_state(config: SlidingAttentionConfig) -> dict[str, StateSpec]:
    """As `attention_state`, of the window alone; and the keys and values of the document's first tokens."""
    shape = (config.key_value_heads, config.head_size)
    sizes = {"": config.reach - 1, "global_": config.global_tokens}
    kept = {
        f"{part}{name}": StateSpec("recurrent", (*shape, size))
        for part, size in sizes.items()
        for name in ("key", "value")
        if part != "global_" or size
    }
    return {**kept, "position": StateSpec("conv", (1,), torch.int64)}


def document_starts(
    length: int, before: torch.Tensor | None, seq_idx: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """The coordinate at which the document of each token starts: (b or 1, length or 1), integer.

    Args:
        before: how many tokens of document 0 came before these, (b, 1), or None for none.
        seq_idx: the document of each token, (b, length), or None for one.
    """
    if seq_idx is None:
        return torch.zeros(1, 1, dtype=torch.int64, device=device) if before is None else -before
    steps = torch.arange(length, device=device).unsqueeze(0)
    begins = (seq_idx != seq_idx.roll(1, 1)) & (steps > 0)
    return torch.where(begins, steps, 0 if before is None else -before).cummax(1).values


def rotary(position: torch.Tensor, size: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angle of each pair of channels (Su et al. 2021, section 3.2).

    They are computed at each call: a buffer would follow the model into bfloat16, and be empty after the meta device.

    Args:
        position: integer, (b or 1, l).
        size: rotated channels of a head, a multiple of 2.
        theta: base of the frequencies.
        dtype: of the result.

    Returns:
        Two of (b or 1, 1, l, size): the cosine for each channel, and what its partner is multiplied by.
    """
    # whole turns are taken off in float64: in float32 an angle at token 10,000 has lost four digits
    exact = dtype if position.device.type == "mps" else torch.float64
    pairs = size // 2
    frequencies = made_once(
        ("rotary", pairs, theta, exact),
        position,
        lambda: torch.logspace(0, -(pairs - 1) / pairs, pairs, theta, dtype=exact, device=position.device),
    )
    angle = (position[:, None, :, None] * frequencies).remainder(2 * math.pi).to(dtype)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first channels of x, (..., l, n), by the angles of `rotary`, in the dtype of those."""
    x, size = cast(x, cos.dtype), cos.shape[-1]
    rotated = x if size == x.shape[-1] else x[..., :size]
    turned = torch.addcmul(rotated * cos, rotated.roll(size // 2, -1), sin)
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], dim=-1)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    show: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as two products around a softmax, in at least float32: transformers' ``eager``.

    Args:
        query: (b, h, l, n).
        key, value: (b, k, columns, n).
        attention_mask: what each query sees, bool, or floats that are added to scores, (b or 1, 1, l, columns); None
            for causal attention.
        show: gets the weights, and gives what stands for them.

    Returns:
        (b, l, h, n) in the dtype of ``query``, and the weights (b, h, l, columns).
    """
    groups = query.shape[1] // key.shape[1]
    with no_autocast(query):
        key, value = (wide(t).repeat_interleave(groups, 1) for t in (key, value))
        scores = wide(query) @ key.mT * scaling
        if attention_mask is None:
            attention_mask = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril()
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, -math.inf)
        else:
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        if show is not None:
            weights = show(weights)
        return cast((weights @ value).transpose(1, 2), query.dtype), weights


class Columns(NamedTuple):
    """What the queries of a forward may see, and where their documents start."""

    k: torch.Tensor  # (b, k, p + l, n), at the coordinates -p to l - 1
    v: torch.Tensor
    past: int  # p
    start: torch.Tensor  # see `document_starts`
    before: Mapping[str, torch.Tensor | None]
    memory: Any = None  # of a mixer that has one, see `hf_archs.memory`

    @property
    def length(self) -> int:
        """Tokens of this forward."""
        return self.k.shape[2] - self.past

    @property
    def is_step(self) -> bool:
        """Whether this is one token after others, whose state holds all that it sees and says where it is."""
        return self.past > 0 and self.length == 1

    def held(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a state beside that of the direct columns, (b, k, columns, n)."""
        k, v = self.before[f"{part}key"], self.before[f"{part}value"]
        assert k is not None
        assert v is not None
        return cast(k, self.k.dtype).mT, cast(v, self.v.dtype).mT


class Blocks(NamedTuple):
    """The queries in blocks, each with the columns that it may see."""

    q: torch.Tensor  # (b, s, h, queries, n)
    k: torch.Tensor  # (b, s, k, columns, n)
    v: torch.Tensor
    query: torch.Tensor  # coordinates, (s, queries, 1)
    key: torch.Tensor  # coordinates, (s, 1, columns)
    start: torch.Tensor  # of the documents, (b or 1, s or 1, queries or 1, 1)


_EXPORTED_BLOCK = 64  # queries

# keys and values (b, s, k, columns, n), and which query sees them, (b or 1, s, queries, columns)
Extra = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Projections, norms, rotation, attention to all earlier tokens of the document, projection."""

    is_causal = True
    reach: int | None = None  # the most direct columns that a query sees; None for all
    follows_pairs = True  # a mask of four dimensions, `hf_archs.call.call.pairs`
    shows_weights = True  # those of the direct columns, from `eager` attention, to `hf_archs.call.call.show`

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        size, heads, groups = config.head_size, config.num_heads, config.key_value_heads
        self.num_key_value_groups = heads // groups
        self.scaling = size**-0.5 if config.attention_scale is None else config.attention_scale
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * size, bias=config.attention_bias)
        self.out_proj = nn.Linear(heads * size, config.hidden_size, bias=config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = ArchRMSNorm(heads * size if full else size, config.norm_eps)
            self.k_norm = ArchRMSNorm(groups * size if full else size, config.norm_eps)
        self.states = tuple(self._state_specs())

    def _state_specs(self) -> dict[str, StateSpec]:
        return attention_state(self.config)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (b, l, d)
        state: Slot | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(b, l, d)`` to the same, continuing the states of ``state`` and leaving there those after this forward."""
        position = None if state is None else state.get("position")
        start = document_starts(hidden_states.shape[1], position, seq_idx, hidden_states.device)
        q, k, v = self._project(hidden_states, start)
        plain = lengths is None and seq_idx is None and self.reach is None
        if plain and state is not None and state.grows_in_place("key"):
            return self.out_proj(self._in_place(q, k, v, start, state))
        before = {name: None if state is None else state.get(name) for name in self.states}
        columns = self._columns(k, v, start, before)
        if call.pairs is not None:
            y = self._follow(q, columns, call.pairs)
        elif before["key"] is None and seq_idx is None and self._sees_all(k.shape[2]):
            y = self._interface(q, k, v, None).flatten(2)
        else:
            y = self._attend(q, columns)
        if state is not None:
            after = self._after(columns, lengths, seq_idx)
            state.update(after, {"k": k.transpose(1, 2), "v": v.transpose(1, 2), "seq_idx": seq_idx}, self._replay)
        return self.out_proj(y)

    def _in_place(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, state: Slot
    ) -> torch.Tensor:
        """Attention to a state whose columns stay where they are, (b, l, h * n); these tokens enter it."""
        after = {"position": (k.shape[2] - start).expand(k.shape[0], 1).contiguous()}
        inputs: dict[str, torch.Tensor | None] = {"k": k.transpose(1, 2), "v": v.transpose(1, 2), "seq_idx": None}
        held, place = state.append({"key": k.mT, "value": v.mT}, after, inputs, self._replay)
        keys, values = (cast(held[name], q.dtype).mT for name in ("key", "value"))
        column = torch.arange(keys.shape[2], device=q.device)
        first = (place[0] + start).unsqueeze(2)  # (b or 1, 1, 1)
        if call.pairs is not None:
            return self._masked(q, keys, values, call.pairs.columns(column))
        seen = (column <= place.unsqueeze(1)) & (column >= first)
        return self._interface(q, keys, values, seen.unsqueeze(1)).flatten(2)

    def _follow(self, q: torch.Tensor, columns: Columns, pairs: Pairs) -> torch.Tensor:
        """Attention to what a mask of four dimensions shows, (b, l, h * n). Of that a window hides what is more than so
        many positions before a token.
        """
        key = torch.arange(-columns.past, columns.length, device=q.device)
        seen = pairs.columns(pairs.past + key)
        if self.reach is not None:
            query = key[columns.past :].unsqueeze(0)
            if pairs.positions is not None and columns.past == 0:
                query = key = pairs.positions
            seen = limited(seen, (key.unsqueeze(-2) > query.unsqueeze(2) - self.reach).unsqueeze(1))
        return self._masked(q, columns.k, columns.v, seen)

    def _masked(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Attention by such a mask, (b, l, h * n); of a query that sees nothing comes 0."""
        blank = sees_nothing(seen)
        seen = seen.masked_fill(blank, seen.dtype == torch.bool)  # else its softmax would be not-a-number
        seen = seen if seen.dtype == torch.bool else cast(seen, q.dtype)
        return self._interface(q, k, v, seen).masked_fill(blank.transpose(1, 2), 0).flatten(2)

    def _project(
        self, hidden_states: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (b, h, l, n), keys and values (b, k, l, n)."""
        config = self.config
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        dtype = v.dtype
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        q, k, v = (t.unflatten(-1, (-1, config.head_size)) for t in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        if config.clip_qkv is not None:
            q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if config.rope_theta is not None:
            given = None if call.pairs is None else call.pairs.positions
            position = torch.arange(q.shape[2], device=q.device) - start if given is None else given
            wider = torch.promote_types(dtype, torch.float32)
            cos, sin = rotary(position, config.rotary_size, config.rope_theta, wider)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return cast(q, dtype), cast(k, dtype), v

    def _columns(
        self, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, before: Mapping[str, torch.Tensor | None]
    ) -> Columns:
        past_k, past_v = before["key"], before["value"]
        if past_k is None or past_v is None:
            return Columns(k, v, 0, start, before)
        k, v = (torch.cat([cast(past, x.dtype).mT, x], 2) for past, x in ((past_k, k), (past_v, v)))
        return Columns(k, v, past_k.shape[3], start, before)

    # -- what a query sees ----------------------------------------------------------------------------------------

    def _sees_all(self, length: int) -> bool:
        """Whether plain causal attention is right where there are no tokens before these and no other documents."""
        return True

    def _lowest(self, query: torch.Tensor, start: torch.Tensor) -> torch.Tensor | None:
        """The first coordinate whose own key a query sees, apart from its document's start."""
        return None

    def _visible(self, blocks: Blocks) -> torch.Tensor:
        """Which of the direct columns each query sees, (b or 1, s, queries, columns)."""
        lowest = self._lowest(blocks.query, blocks.start)
        first = blocks.start if lowest is None else torch.maximum(blocks.start, lowest)
        seen = blocks.key >= first
        return seen & (blocks.key <= blocks.query) if blocks.query.shape[1] > 1 else seen

    def _extra(self, blocks: Blocks, columns: Columns) -> list[Extra]:
        """Columns beside the direct ones."""
        return []

    def _attend(self, q: torch.Tensor, columns: Columns) -> torch.Tensor:
        """(b, h, l, n) to (b, l, h * n), for queries that do not see all that is before them."""
        if columns.length == 1 and self.reach is None:  # what follows takes as long as the products of a small model
            seen = torch.arange(-columns.past, 1, device=q.device) >= columns.start
            return self._interface(q, columns.k, columns.v, seen[:, None, None]).flatten(2)
        blocks = self._blocks(q, columns)
        b, s = blocks.q.shape[:2]
        parts = [*self._extra(blocks, columns), (blocks.k, blocks.v, self._visible(blocks))]
        if len(parts) == 1:
            k, v, mask = parts[0]
        else:
            rows = max(seen.shape[0] for _, _, seen in parts)
            k, v = torch.cat([part[0] for part in parts], 3), torch.cat([part[1] for part in parts], 3)
            mask = torch.cat([seen.expand(rows, -1, -1, -1) for _, _, seen in parts], 3)
        y = self._read(blocks, k.flatten(0, 1), v.flatten(0, 1), rows_of_mask(mask, b))
        if s == 1:
            return y.flatten(2)
        y = y.reshape(b, s, y.shape[1], -1)
        if any_length():
            return out_of_chunks(y, q.shape[2])
        y = y.flatten(1, 2)
        # no slice: whether it is contiguous would be asked of each length when compiling
        return F.pad(y, (0, 0, 0, q.shape[2] - y.shape[1]))

    def _read(self, blocks: Blocks, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(b * s, queries, h, n) from keys and values (b * s, k, columns, n) and a mask, see `_rows`."""
        return self._interface(blocks.q.flatten(0, 1), k, v, mask, k.shape[2] - blocks.k.shape[3])

    def _blocks(self, q: torch.Tensor, columns: Columns) -> Blocks:
        """All queries in one block; or, where there are more than ``reach``, blocks of so many, whose columns are their
        own and those that the first of them sees: scores of every pair would cost the square of the length.

        (Compiled, lengths up to ``reach`` and lengths above it have a graph each.)
        """
        length, past, start = columns.length, columns.past, columns.start
        if self.reach is None or call.show is not None or self._is_short(length):
            coordinates = torch.arange(-past, length, device=q.device)
            query, key = coordinates[past:].view(1, -1, 1), coordinates.view(1, 1, -1)
            return Blocks(q[:, None], columns.k[:, None], columns.v[:, None], query, key, start[:, None, :, None])
        size = self.reach
        if any_length():
            return self._exported_blocks(q, columns)
        count = -(-length // size)
        pads = count * size - length
        q = F.pad(q, (0, 0, 0, pads)).unflatten(2, (count, size)).transpose(1, 2)
        k, v = (_overlapping(F.pad(t, (0, 0, size - past, pads)), size) for t in (columns.k, columns.v))
        block = size * torch.arange(count, device=q.device).view(-1, 1, 1)
        within = torch.arange(1 - size, size, device=q.device)
        if start.shape[1] > 1:
            start = F.pad(start, (0, pads)).unflatten(1, (count, size))
        else:
            start = start[:, None]
        query, key = block + within[size - 1 :].view(1, -1, 1), block + within.view(1, 1, -1)
        return Blocks(q, k, v, query, key, start[..., None])

    def _is_short(self, length: int) -> bool:
        """Whether so few tokens are one block."""
        assert self.reach is not None
        return length == 1 if any_length() else length <= self.reach

    def _exported_blocks(self, q: torch.Tensor, columns: Columns) -> Blocks:
        """Blocks in a graph for any length: of few queries, since most of a long one would be padding."""
        assert self.reach is not None
        past, start, size, earlier = columns.past, columns.start, min(self.reach, _EXPORTED_BLOCK), self.reach - 1
        q = in_chunks(q.transpose(1, 2), size).transpose(2, 3)
        first = size * torch.arange(q.shape[1], device=q.device).view(-1, 1, 1)
        query = first + torch.arange(size, device=q.device).view(1, -1, 1)
        key = first + torch.arange(-earlier, size, device=q.device).view(1, 1, -1)
        place = (key.transpose(0, 1) + past).clamp(0, past + columns.length - 1)
        k, v = (take_columns(t, place) for t in (columns.k, columns.v))
        if start.shape[1] > 1:
            start = in_chunks(start, size)
        else:
            start = start[:, None]
        return Blocks(q, k, v, query, key, start[..., None])

    def _interface(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, extra: int = 0
    ) -> torch.Tensor:
        """The implementation that the model's config names, (b, h, l, n) to (b, l, h, n); ``extra`` columns come first
        that are not the direct ones.
        """
        named = "eager" if is_transformed() else self.config._attn_implementation or "sdpa"  # which torch can transform
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(named, eager_attention)
        if torch.compiler.is_exporting() and q.shape[2] == 1:
            # the heads of a group as so many queries: no exporter can show that keys may be repeated at any length
            q = q.view(q.shape[0], k.shape[1], self.num_key_value_groups, q.shape[3])
            return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scaling).flatten(1, 2).unsqueeze(1)
        options: dict[str, Any] = {"dropout": 0.0, "scaling": self.scaling, "is_causal": mask is None}
        show = call.show
        if show is not None and attend is eager_attention:
            options["show"] = lambda weights: torch.cat([weights[..., :extra], show(weights[..., extra:])], 3)
        return attend(self, q, k, v, mask, **options)[0]

    # -- states ---------------------------------------------------------------------------------------------------

    def _after(self, columns: Columns, lengths: torch.Tensor | None, seq_idx: torch.Tensor | None) -> States:
        """The states after these tokens."""
        b, length, past = columns.k.shape[0], columns.length, columns.past
        end: torch.Tensor | int
        alone = lengths is None and seq_idx is None
        if alone:
            start, end = columns.start, length
        else:
            end = columns.start.new_full((b, 1), length) if lengths is None else lengths.unsqueeze(1)
            start = columns.start.expand(b, length).gather(1, (end - 1).clamp(min=0))
        after: States = {"position": (end - start).expand(b, 1).contiguous()}
        after.update(self._more_after(columns, start, end))
        if alone and self.reach is None:
            return {"key": columns.k.mT, "value": columns.v.mT, **after}
        if alone and length == 1 and past == self.reach - 1:  # type: ignore[operator]
            # copies: views would keep the column alive that has left the window
            k, v = (t[:, :, 1:].clone(memory_format=torch.contiguous_format) for t in (columns.k, columns.v))
            return {"key": k.mT, "value": v.mT, **after}
        size = columns.k.shape[2] if self.reach is None else self.reach - 1
        documents = number_documents(seq_idx, lengths)
        for name, t in (("key", columns.k), ("value", columns.v)):
            new = t[:, :, past:].transpose(1, 2).flatten(2)
            old = None if past == 0 else t[:, :, :past].transpose(2, 3).flatten(1, 2)
            window = last_inputs(new, size, old, documents, lengths)
            after[name] = window.unflatten(1, (-1, self.config.head_size))
        return after

    def _more_after(self, columns: Columns, start: torch.Tensor, end: torch.Tensor | int) -> States:
        """Other states than those of attention, where the last document starts and each row ends, (b or 1, 1)."""
        return {}

    def _replay(self, inputs: States, before: dict[str, torch.Tensor | None], lengths: torch.Tensor) -> States:
        """The states after the first ``lengths`` tokens of a recorded forward."""
        # a state that grows shall have no columns of what is taken back
        count = inputs["k"].shape[1] if self.reach is not None else max(int(lengths.max()), 1)
        k, v = (inputs[name][:, :count].transpose(1, 2) for name in ("k", "v"))
        seq_idx = inputs.get("seq_idx")
        seq_idx = None if seq_idx is None else seq_idx[:, :count]
        start = document_starts(count, before["position"], seq_idx, k.device)
        return self._after(self._columns(k, v, start, before), lengths, seq_idx)


def rows_of_mask(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """(b or 1, s, queries, columns) to (b * s or 1, 1, queries, columns)."""
    if mask.shape[0] != batch and mask.shape[1] > 1:
        mask = mask.expand(batch, -1, -1, -1)
    return mask.flatten(0, 1).unsqueeze(1)


def _overlapping(x: torch.Tensor, size: int) -> torch.Tensor:
    """(b, k, (s + 1) * size, n) to (b, s, k, 2 * size - 1, n): each block after what its first query sees before it."""
    blocks = x.unflatten(2, (-1, size))
    return torch.cat([blocks[:, :, :-1, 1:], blocks[:, :, 1:]], 3).transpose(1, 2)


def take_columns(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Columns of x, (b, k, columns, n), by the indices ``place`` (b or 1, s, count): (b, s, k, count, n)."""
    index = place.flatten(1)[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])
    return x.gather(2, index).unflatten(2, place.shape[1:]).transpose(1, 2)


class SlidingAttention(Attention):
    """Attention to a window of tokens, and to the first tokens of the document."""

    config: SlidingAttentionConfig

    def __init__(self, config: SlidingAttentionConfig):
        super().__init__(config)
        self.reach = config.reach

    def _state_specs(self) -> dict[str, StateSpec]:
        return sliding_attention_state(self.config)

    @property
    def follows_pairs(self) -> bool:  # type: ignore[override]
        """Not where the first tokens of every document are seen, since such a mask does not say where one begins."""
        return not self.config.global_tokens

    def _sees_all(self, length: int) -> bool:
        return not any_length() and length <= self.config.window

    def _lowest(self, query: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return query - (self.config.window - 1)

    def _visible(self, blocks: Blocks) -> torch.Tensor:
        seen = super()._visible(blocks)
        if self.config.global_tokens:
            is_global = (blocks.key >= blocks.start) & (blocks.key < blocks.start + self.config.global_tokens)
            seen = seen | (is_global & (blocks.key <= blocks.query))
        return seen

    def _extra(self, blocks: Blocks, columns: Columns) -> list[Extra]:
        """Global tokens before the direct columns. Only the document of a block's first query can have any there."""
        if not self.config.global_tokens:
            return []
        place = blocks.start[:, :, 0] + torch.arange(self.config.global_tokens, device=blocks.q.device)
        if columns.is_step:
            k, v = columns.held("global_")
            return [(k[:, None], v[:, None], (place < -columns.past).unsqueeze(2))]
        place = place.expand(-1, blocks.query.shape[0], -1)
        seen = (place < blocks.key[:, 0, :1]).unsqueeze(2) & (place.unsqueeze(2) >= blocks.start)
        k, v = self._first_tokens(columns, place)
        return [(k, v, seen.expand(-1, -1, blocks.query.shape[1], -1))]

    def _first_tokens(self, columns: Columns, place: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of the global tokens at coordinates ``place``, (b or 1, s, g): (b, s, k, g, n)."""
        here = (place + columns.past).clamp(columns.past, columns.past + columns.length - 1)
        found = [take_columns(t, here) for t in (columns.k, columns.v)]
        if columns.before["global_key"] is None:
            return found
        earlier = (place < 0)[:, :, None, :, None]
        pairs = zip(columns.held("global_"), found, strict=True)
        return [torch.where(earlier, held[:, None], taken) for held, taken in pairs]

    def _more_after(self, columns: Columns, start: torch.Tensor, end: torch.Tensor | int) -> States:
        if not self.config.global_tokens:
            return {}
        place = start + torch.arange(self.config.global_tokens, device=start.device)
        there = (place < end)[:, None, :, None]
        if columns.is_step:
            new = there & (place == 0)[:, None, :, None]
            tokens = (columns.k[:, :, -1:], columns.v[:, :, -1:])
            k, v = (torch.where(new, t, held).mT for t, held in zip(tokens, columns.held("global_"), strict=True))
        else:
            k, v = (torch.where(there, t[:, 0], 0).mT for t in self._first_tokens(columns, place.unsqueeze(1)))
        return {"global_key": k, "global_value": v}


register_mixer(
    "attention", Attention, AttentionConfig, state=attention_state, layer_type=lambda config: "full_attention"
)
register_mixer(
    "sliding_attention",
    SlidingAttention,
    SlidingAttentionConfig,
    state=sliding_attention_state,
    layer_type=lambda config: "sliding_attention",
)
