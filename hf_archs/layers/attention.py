"""Softmax attention as mixers: over all tokens (``attention``) and over a window (``sliding_attention``).

The output of a token depends on its position in its document, not on how the document is cut into forwards.

Letters in shapes: b batch, l length, d hidden size, h query heads, k key-value heads, n channels per head, p columns of
the state (keys before this forward), s blocks of queries.

Coordinates: the first token of a forward is at 0, and earlier tokens are at negative coordinates. A token at i in a
document that starts at a has position i - a.

Direct columns are the keys and values of single tokens in `Columns`. Extra columns come before them: global tokens, and
blocks of a compressive memory.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_archs.cache import Slot, States
from hf_archs.cache.call import call, once
from hf_archs.kernels.arguments import last_inputs, number_documents
from hf_archs.kernels.backend import is_transformed
from hf_archs.kernels.exporting import any_length, in_chunks, out_of_chunks
from hf_archs.kernels.numerics import cast
from hf_archs.layers.attention_config import (
    AttentionConfig,
    SlidingAttentionConfig,
    attention_state,
    sliding_attention_state,
)
from hf_archs.layers.columns import Blocks, Columns, Extra, rows_of_mask, take_columns
from hf_archs.layers.eager import eager_attention
from hf_archs.layers.masks import Pairs, limited, sees_nothing
from hf_archs.layers.norm import ArchRMSNorm
from hf_archs.layers.rotary import document_starts, rotary, rotate
from hf_archs.parts import StateSpec
from hf_archs.registry import register_mixer

_EXPORTED_BLOCK = 64  # queries of a block in an exported graph


class Attention(nn.Module):
    """Attention to all earlier tokens of the document, with its projections, norms and rotary positions."""

    is_causal = True
    reach: int | None = None  # the largest number of direct columns that a query sees; None for all

    def __init__(self, config: AttentionConfig):
        super().__init__()
        self.config = config
        size, heads, groups = config.head_size, config.num_heads, config.key_value_heads
        self.num_key_value_groups = heads // groups
        # copies, since reading a field of a model's config takes as long as a small operator
        self.head_size, self.qk_norm, self.clip = size, config.qk_norm, config.clip_qkv
        self.rotation = None if config.rope_theta is None else (config.rotary_size, config.rope_theta)
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
        """``(b, l, d)`` to the same; see `hf_archs.parts.TokenMixer`."""
        position = None if state is None else state.get("position")
        start = document_starts(hidden_states.shape[1], position, seq_idx, hidden_states.device)
        q, k, v = self._project(hidden_states, start)
        plain = lengths is None and seq_idx is None and self.reach is None
        if plain and state is not None and state.grows_in_place("key"):
            return self.out_proj(self._in_place(q, k, v, start, state))
        before = {name: None if state is None else state.get(name) for name in self.states}
        columns = self._columns(k, v, start, before)
        if call.pairs is not None:
            y = self._attend_pairs(q, columns, call.pairs)
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
        """Add these tokens to the buffers of a static cache and attend to the buffers, (b, l, h * n)."""
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

    def _attend_pairs(self, q: torch.Tensor, columns: Columns, pairs: Pairs) -> torch.Tensor:
        """Attention by a mask of four dimensions, (b, l, h * n), limited to the window if there is one."""
        key = torch.arange(-columns.past, columns.length, device=q.device)
        seen = pairs.columns(pairs.past + key)
        if self.reach is not None:
            query = key[columns.past :].unsqueeze(0)
            if pairs.positions is not None and columns.past == 0:
                query = key = pairs.positions
            seen = limited(seen, (key.unsqueeze(-2) > query.unsqueeze(2) - self.reach).unsqueeze(1))
        return self._masked(q, columns.k, columns.v, seen)

    def _masked(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Attention by a bool or float mask, (b, l, h * n); the output of a query that sees nothing is 0."""
        blind, is_bool = sees_nothing(seen), seen.dtype == torch.bool
        seen = seen.masked_fill(blind, True if is_bool else 0.0)  # it may see all: its softmax would be NaN
        seen = seen if is_bool else cast(seen, q.dtype)
        return self._interface(q, k, v, seen).masked_fill(blind.transpose(1, 2), 0).flatten(2)

    def _project(
        self, hidden_states: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (b, h, l, n), keys and values (b, k, l, n)."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        dtype = v.dtype
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        heads = (-1, self.head_size)
        q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotation is not None:
            wider = torch.promote_types(dtype, torch.float32)
            cos, sin = once(("rotary", *self.rotation, wider, q.device), lambda: self._angles(q.shape[2], start, wider))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return cast(q, dtype), cast(k, dtype), v

    def _angles(self, length: int, start: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for these tokens, see `rotary`."""
        assert self.rotation is not None
        given = None if call.pairs is None else call.pairs.positions
        return rotary(
            torch.arange(length, device=start.device) - start if given is None else given, *self.rotation, dtype
        )

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
        """Whether causal attention without a mask is right for a single document of ``length`` tokens."""
        return True

    def _lowest(self, query: torch.Tensor, start: torch.Tensor) -> torch.Tensor | None:
        """The lowest coordinate that a query sees as a direct column; None for its document's start."""
        return None

    def _visible(self, blocks: Blocks) -> torch.Tensor:
        """The direct columns that each query sees, (b or 1, s, queries, columns) bool."""
        lowest = self._lowest(blocks.query, blocks.start)
        first = blocks.start if lowest is None else torch.maximum(blocks.start, lowest)
        seen = blocks.key >= first
        return seen & (blocks.key <= blocks.query) if blocks.query.shape[1] > 1 else seen

    def _extra(self, blocks: Blocks, columns: Columns) -> list[Extra]:
        """The extra columns of each block of queries."""
        return []

    def _attend(self, q: torch.Tensor, columns: Columns) -> torch.Tensor:
        """Attention within windows and documents, and to a state: (b, h, l, n) to (b, l, h * n)."""
        if columns.length == 1 and self.reach is None:  # a decode step, without the overhead of blocks
            seen = once(
                ("seen", columns.past, q.device),
                lambda: (torch.arange(-columns.past, 1, device=q.device) >= columns.start)[:, None, None],
            )
            return self._interface(q, columns.k, columns.v, seen).flatten(2)
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
        # no slice, whose contiguity depends on the length: a compiled graph would be guarded by it
        return F.pad(y, (0, 0, 0, q.shape[2] - y.shape[1]))

    def _read(self, blocks: Blocks, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(b * s, queries, h, n), from k and v (b * s, k, columns, n) and a mask of `rows_of_mask`."""
        return self._interface(blocks.q.flatten(0, 1), k, v, mask, k.shape[2] - blocks.k.shape[3])

    def _blocks(self, q: torch.Tensor, columns: Columns) -> Blocks:
        """All queries in one block, or, if there are more than ``reach``, in blocks of ``reach`` queries.

        A block's columns begin with the first that its first query sees, so the cost is linear in the length.
        (Compiled, lengths up to ``reach`` have one graph and longer ones another.)
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
        """Whether the queries form a single block."""
        assert self.reach is not None
        return length == 1 if any_length() else length <= self.reach

    def _exported_blocks(self, q: torch.Tensor, columns: Columns) -> Blocks:
        """Blocks in a graph that is exported for any length: small, since a short input is padded to a whole block."""
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
        """Call the attention of the model's config, (b, h, l, n) to (b, l, h, n), with ``extra`` extra columns."""
        # torch.func and forward-mode differentiation transform eager attention only
        named = "eager" if is_transformed() else self.config._attn_implementation or "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(named, eager_attention)
        if torch.compiler.is_exporting() and q.shape[2] == 1:
            # the heads of a group become queries: exporters cannot repeat the keys at a dynamic length
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
            # copies, since views would keep the column that left the window in memory
            k, v = (t[:, :, 1:].clone(memory_format=torch.contiguous_format) for t in (columns.k, columns.v))
            return {"key": k.mT, "value": v.mT, **after}
        size = columns.k.shape[2] if self.reach is None else self.reach - 1
        documents = number_documents(seq_idx, lengths)
        for name, t in (("key", columns.k), ("value", columns.v)):
            new = t[:, :, past:].transpose(1, 2).flatten(2)
            old = None if past == 0 else t[:, :, :past].transpose(2, 3).flatten(1, 2)
            window = last_inputs(new, size, old, documents, lengths)
            after[name] = window.unflatten(1, (-1, self.head_size))
        return after

    def _more_after(self, columns: Columns, start: torch.Tensor, end: torch.Tensor | int) -> States:
        """States of subclasses, from the last document's start and the end of each row, (b or 1, 1) each."""
        return {}

    def _replay(self, inputs: States, before: dict[str, torch.Tensor | None], lengths: torch.Tensor) -> States:
        """The states after the first ``lengths`` tokens of a recorded forward."""
        # a growing state must not keep columns of removed tokens
        count = inputs["k"].shape[1] if self.reach is not None else max(int(lengths.max()), 1)
        k, v = (inputs[name][:, :count].transpose(1, 2) for name in ("k", "v"))
        seq_idx = inputs.get("seq_idx")
        seq_idx = None if seq_idx is None else seq_idx[:, :count]
        start = document_starts(count, before["position"], seq_idx, k.device)
        return self._after(self._columns(k, v, start, before), lengths, seq_idx)


def _overlapping(x: torch.Tensor, size: int) -> torch.Tensor:
    """(b, k, (s + 1) * size, n) to (b, s, k, 2 * size - 1, n): each block, after the columns its first query sees."""
    blocks = x.unflatten(2, (-1, size))
    return torch.cat([blocks[:, :, :-1, 1:], blocks[:, :, 1:]], 3).transpose(1, 2)


class SlidingAttention(Attention):
    """Attention to a window of tokens, and to the first tokens of the document (global tokens)."""

    config: SlidingAttentionConfig

    def __init__(self, config: SlidingAttentionConfig):
        super().__init__(config)
        self.reach = config.reach

    def _state_specs(self) -> dict[str, StateSpec]:
        return sliding_attention_state(self.config)

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
        """Global tokens that are not direct columns. Only the document of a block's first query can have any."""
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


# all have widths that are multiples of a head's size
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

register_mixer(
    "attention",
    Attention,
    AttentionConfig,
    state=attention_state,
    layer_type=lambda config: "full_attention",
    follows_pairs=lambda config: True,
    shows_weights=True,
    lora_targets=PROJECTIONS,
    even_targets=PROJECTIONS,
    tiny={"num_heads": 4, "num_key_value_heads": 2},
)
register_mixer(
    "sliding_attention",
    SlidingAttention,
    SlidingAttentionConfig,
    state=sliding_attention_state,
    layer_type=lambda config: "sliding_attention",
    window=lambda config: config.window,
    # a mask of four dimensions does not mark the first tokens of a document
    follows_pairs=lambda config: not config.global_tokens,
    shows_weights=True,
    lora_targets=PROJECTIONS,
    even_targets=PROJECTIONS,
    tiny={"num_heads": 4, "window": 7, "global_tokens": 2},
)
