"""Attention over a window and a bounded memory of earlier tokens, registered as ``memory``.

Letters and coordinates are those of `hf_archs.layers.attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from hf_archs.cache import States
from hf_archs.kernels.exporting import any_length, count_chunks
from hf_archs.kernels.numerics import cast, full_precision, made_once, wide
from hf_archs.layers.attention import PROJECTIONS, SlidingAttention
from hf_archs.layers.attention_config import SlidingAttentionConfig, sliding_attention_state
from hf_archs.layers.columns import Blocks, Columns, Extra, rows_of_mask, take_columns
from hf_archs.layers.rotary import rotary, rotate
from hf_archs.parts import StateSpec, check_range
from hf_archs.registry import register_mixer


@strict
@dataclass(kw_only=True)
class MemoryConfig(SlidingAttentionConfig):
    """Fields of attention over a window and a memory of bounded size.

    Args:
        memory_type: ``compressive``: each block of tokens that left the window becomes one key and one value (Rae et
            al. 2020, section 3.1). ``retrieval``: each head attends to the keys with the largest scores among those
            that left the window (Wu et al. 2022, section 3).
        memory_slots: number of blocks, or keys, in the memory; the oldest leave it first.
        compression_rate: tokens per block, for the compressive memory.
        retrieved_keys: number of keys that a query retrieves, for the retrieval memory.
    """

    memory_type: Literal["compressive", "retrieval"] = "compressive"
    memory_slots: int = 256
    compression_rate: int = 4
    retrieved_keys: int = 32

    def validate_memory(self) -> None:
        """Raise a `ValueError` for fields that are out of range or do not fit together."""
        check_range(self, "memory_slots", 1, 2**20)
        check_range(self, "compression_rate", 1, 2**10)
        if self.memory_type == "retrieval":
            check_range(self, "retrieved_keys", 1, self.memory_slots)
        else:
            check_range(self, "retrieved_keys", 1, 2**20)

    @property
    def reach(self) -> int:
        """The largest number of direct columns that a query sees.

        Before the window these are the tokens of an incomplete block, or those that can be retrieved.
        """
        more = self.memory_slots if self.memory_type == "retrieval" else self.compression_rate - 1
        return self.window + more


def memory_state(config: MemoryConfig) -> dict[str, StateSpec]:
    """As `sliding_attention_state`, and the keys and values of compressed blocks."""
    states = sliding_attention_state(config)
    if config.memory_type == "compressive":
        shape = (config.key_value_heads, config.head_size, config.memory_slots)
        states.update({f"memory_{name}": StateSpec("recurrent", shape) for name in ("key", "value")})
    return states


class Memory(NamedTuple):
    """The compressed blocks of the state, then the new ones, ordered by their ends."""

    k: torch.Tensor  # (b, k, blocks, n)
    v: torch.Tensor
    start: torch.Tensor  # coordinates of the blocks' first tokens, (b or 1, blocks)
    held: int  # number of blocks of the state
    ends: torch.Tensor  # number of new blocks that end before each coordinate -p to l, (b or 1, p + l + 1)


class NewBlock(NamedTuple):
    """The one block that may enter the memory at a decode step."""

    k: torch.Tensor  # (b, k, 1, n)
    v: torch.Tensor


class CompressiveMemory(nn.Module):
    """Blocks of tokens, compressed to one key and one value each (Rae et al. 2020, section 3.1).

    Block j of a document is its ``compression_rate`` tokens from ``j * compression_rate`` on. It enters the memory when
    its last token leaves the window; until then its tokens are direct columns. Each head compresses a block by a
    learned weighted sum, initially the mean, with all keys rotated to the position of the block's last token.
    """

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config
        shape = (config.key_value_heads, config.compression_rate)
        self.key_taps, self.value_taps = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def init_weights(self) -> None:
        """Start with the mean of a block."""
        for taps in (self.key_taps, self.value_taps):
            init.constant_(taps, 1 / self.config.compression_rate)

    def left(self, query: torch.Tensor | int, start: torch.Tensor) -> torch.Tensor:
        """Number of blocks of its document that have left the window of a query."""
        return (query - start - self.config.window + 1).clamp(min=0) // self.config.compression_rate

    def lowest(self, query: torch.Tensor | int, start: torch.Tensor) -> torch.Tensor:
        """The coordinate of the first token whose block is not in the memory of a query."""
        return start + self.left(query, start) * self.config.compression_rate

    def forward(self, columns: Columns) -> Memory | NewBlock:
        """The compressed blocks that these queries, or the token after them, may have in their memory.

        At a decode step these are the blocks of the state, and one `NewBlock` from the first columns.
        """
        rate, past, length, start = self.config.compression_rate, columns.past, columns.length, columns.start
        if columns.is_step:
            return NewBlock(*self._compressed(*(t[:, :, :rate].unsqueeze(1) for t in (columns.k, columns.v))))
        coordinate = torch.arange(-past, length, device=start.device)
        starts = start
        if start.shape[1] > 1:
            starts = torch.cat([start[:, :1].expand(-1, past), start], 1)
        position = coordinate - starts
        # blocks that begin before the first column are in the state
        is_end = (position >= 0) & (position % rate == rate - 1) & (coordinate > rate - 2 - past)
        ends = F.pad(is_end.cumsum(1), (1, 0))
        count = count_chunks(length, rate) if any_length() else -(-length // rate)
        # the column after each block, by scatter, since ONNX has no searchsorted
        after = ends.new_full((ends.shape[0], count + 1), past + length + 1)
        number = torch.where(is_end, ends[:, 1:] - 1, count).clamp(max=count)
        after = after.scatter(1, number, (coordinate + past + 1).expand_as(number))[:, :count]
        place = (after.unsqueeze(2) + torch.arange(-rate, 0, device=start.device)).clamp(0, past + length - 1)
        k, v = self._compressed(take_columns(columns.k, place), take_columns(columns.v, place))
        begin = after - rate - past
        if columns.before["memory_key"] is None:
            return Memory(k, v, begin, 0, ends)
        slots = torch.arange(-self.config.memory_slots, 0, device=start.device)
        first = self.lowest(0, start[:, :1])
        k, v = (torch.cat(pair, 2) for pair in zip(columns.held("memory_"), (k, v), strict=True))
        return Memory(k, v, torch.cat([first + rate * slots, begin], 1), self.config.memory_slots, ends)

    def _rotated(self, k: torch.Tensor) -> torch.Tensor:
        """Keys of blocks, (b, blocks, k, rate, n), each rotated to the position of its block's last token."""
        if self.config.rope_theta is None:
            return k
        rate, size, theta = self.config.compression_rate, self.config.rotary_size, self.config.rope_theta
        dtype = torch.promote_types(k.dtype, torch.float32)

        def angles() -> torch.Tensor:
            later = torch.arange(rate - 1, -1, -1, device=k.device).unsqueeze(0)
            return torch.stack(rotary(later, size, theta, dtype))

        return rotate(k, *made_once(("turns", rate, size, theta, dtype), k, angles))

    def _compressed(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of blocks, (b, blocks, k, rate, n), compressed to one per block, (b, k, blocks, n)."""
        pairs = ((self._rotated(k), self.key_taps, k.dtype), (v, self.value_taps, v.dtype))
        k, v = (cast((t * taps.unsqueeze(2)).sum(3).transpose(1, 2), dtype) for t, taps, dtype in pairs)
        return k, v

    def before(self, columns: Columns, coordinate: torch.Tensor) -> torch.Tensor:
        """Number of blocks of the memory that end before each coordinate from `lowest`."""
        memory = columns.memory
        index = (coordinate + columns.past).clamp(0, memory.ends.shape[1] - 1)
        ends = memory.ends.expand(index.shape[0], -1).gather(1, index.flatten(1))
        return memory.held + ends.view_as(index)

    def seen(self, columns: Columns, blocks: Blocks) -> Extra:
        """The memory of each block of queries, as extra columns."""
        memory, slots = columns.memory, self.config.memory_slots
        if isinstance(memory, NewBlock):
            k, v = columns.held("memory_")
            return k[:, None], v[:, None], torch.arange(slots, 0, -1, device=k.device) <= self.left(0, blocks.start)
        queries = blocks.query.shape[1]
        # blocks that enter the memory between the first query and the last
        entering = 0 if queries == 1 else (queries + self.config.reach) // self.config.compression_rate + 1
        upto = self.before(columns, self.lowest(blocks.query, blocks.start))
        number = upto[:, :, :1] + torch.arange(-slots, entering, device=upto.device)
        place = number[:, :, 0].clamp(0, memory.start.shape[1] - 1)
        begin = memory.start.gather(1, place.flatten(1)).view_as(place).unsqueeze(2)
        seen = (number >= (upto - slots).clamp(min=0)) & (number < upto) & (begin >= blocks.start)
        return take_columns(memory.k, place), take_columns(memory.v, place), seen

    def after(self, columns: Columns, start: torch.Tensor, end: torch.Tensor | int) -> States:
        """The states after these tokens: the memory of the next token; see `Attention._more_after`."""
        memory, slots = columns.memory, self.config.memory_slots
        if isinstance(memory, NewBlock):
            enters = (self.left(end, start) > self.left(0, start))[:, None, :, None]
            pairs = zip(columns.held("memory_"), memory, strict=True)
            k, v = (torch.where(enters, torch.cat([held[:, :, 1:], new], 2), held).mT for held, new in pairs)
            return {"memory_key": k, "memory_value": v}
        upto = self.before(columns, self.lowest(end, start))
        number = upto + torch.arange(-slots, 0, device=upto.device)
        place = number.clamp(0, memory.start.shape[1] - 1)
        begin = memory.start.expand(place.shape[0], -1).gather(1, place)
        there = ((number >= 0) & (begin >= start))[:, None, :, None]
        k, v = (torch.where(there, take_columns(t, place.unsqueeze(1))[:, 0], 0).mT for t in (memory.k, memory.v))
        return {"memory_key": k, "memory_value": v}


class RetrievalMemory(nn.Module):
    """The keys nearest to a query among those that left its window (Wu et al. 2022, sections 3.1 and 3.2).

    Each head attends to the ``retrieved_keys`` with the largest scores, and a learned gate per head mixes the result
    with attention to the window. A token whose memory is empty uses the window alone.
    """

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(torch.empty(config.num_heads))

    def init_weights(self) -> None:
        """Start with window and memory in equal parts."""
        init.zeros_(self.gate)

    def mask(self, blocks: Blocks) -> torch.Tensor:
        """The direct columns in the memory of each query, (b or 1, s, queries, columns) bool."""
        window_begins = blocks.query - (self.config.window - 1)
        first = torch.maximum(blocks.start, window_begins - self.config.memory_slots)
        return (blocks.key >= first) & (blocks.key < window_begins)

    def forward(
        self,
        local: torch.Tensor,  # attention to the window, (b, l, h, n)
        q: torch.Tensor,  # (b, h, l, n)
        k: torch.Tensor,  # (b, k, columns, n)
        v: torch.Tensor,
        mask: torch.Tensor,  # (b or 1, 1, l, columns)
        scaling: float,
    ) -> torch.Tensor:
        """Attention to the nearest keys, mixed with ``local`` by the gate, (b, l, h, n)."""
        groups = q.shape[1] // k.shape[1]
        with full_precision(q):
            k, v = (wide(t).repeat_interleave(groups, 1) for t in (k, v))
            # finite: the softmax of a query with an empty memory would be NaN
            scores = (wide(q) @ k.mT * scaling).masked_fill(~mask, torch.finfo(k.dtype).min)
            count = min(self.config.retrieved_keys, scores.shape[3])
            nearest = mask & (scores >= scores.detach().topk(count).values[..., -1:])
            weights = scores.masked_fill(~nearest, torch.finfo(k.dtype).min).softmax(-1).masked_fill(~nearest, 0)
            found = (weights @ v).transpose(1, 2)
            gate = wide(self.gate).sigmoid().unsqueeze(1) * mask.any(3).transpose(1, 2).unsqueeze(3)
            return cast(torch.lerp(wide(local), found, gate.to(found.dtype)), local.dtype)


class MemoryAttention(SlidingAttention):
    """Attention to a window of tokens and to a memory of the tokens that left it."""

    config: MemoryConfig

    def __init__(self, config: MemoryConfig):
        super().__init__(config)
        compressive = config.memory_type == "compressive"
        self.memory: Any = CompressiveMemory(config) if compressive else RetrievalMemory(config)
        self.compressive = compressive

    def _state_specs(self) -> dict[str, StateSpec]:
        return memory_state(self.config)

    def _sees_all(self, length: int) -> bool:
        return False

    def _lowest(self, query: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return self.memory.lowest(query, start) if self.compressive else super()._lowest(query, start)

    def _columns(
        self, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, before: Mapping[str, torch.Tensor | None]
    ) -> Columns:
        columns = super()._columns(k, v, start, before)
        return columns._replace(memory=self.memory(columns)) if self.compressive else columns

    def _extra(self, blocks: Blocks, columns: Columns) -> list[Extra]:
        more = [self.memory.seen(columns, blocks)] if self.compressive else []
        return super()._extra(blocks, columns) + more

    def _read(self, blocks: Blocks, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = super()._read(blocks, k, v, mask)
        if self.compressive:
            return y
        direct = rows_of_mask(self.memory.mask(blocks), blocks.q.shape[0])
        k, v = blocks.k.flatten(0, 1), blocks.v.flatten(0, 1)
        return self.memory(y, blocks.q.flatten(0, 1), k, v, direct, self.scaling)

    def _more_after(self, columns: Columns, start: torch.Tensor, end: torch.Tensor | int) -> States:
        more = self.memory.after(columns, start, end) if self.compressive else {}
        return {**super()._more_after(columns, start, end), **more}


register_mixer(
    "memory",
    MemoryAttention,
    MemoryConfig,
    state=memory_state,
    window=lambda config: config.window,
    shows_weights=True,
    lora_targets=PROJECTIONS,
    even_targets=PROJECTIONS,
    tiny={"num_heads": 4, "window": 5, "memory_slots": 4, "compression_rate": 3},
)
