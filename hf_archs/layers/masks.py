"""Attention masks and document boundaries, in the forms that hosts pass: padding, documents, and pairs of tokens.

Letters in shapes: b batch, l length of this forward, c columns of a mask.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from transformers.utils import is_tracing

from hf_archs.cache import RecurrentCache
from hf_archs.cache.call import call


class Pairs(NamedTuple):
    """A mask of four dimensions, which replaces causality.

    Attributes:
        seen: (b or 1, 1, l, c) over the columns of all tokens so far: bool, or floats that are added to the scores.
        real: (b, l) bool, the tokens that see any column (padding sees none); None if all do.
        past: number of tokens before this forward.
        positions: (b or 1, l), the rotary positions of queries and keys; None for the column numbers.
    """

    seen: torch.Tensor
    real: torch.Tensor | None
    past: int | torch.Tensor
    positions: torch.Tensor | None

    def columns(self, column: torch.Tensor) -> torch.Tensor:
        """``seen`` at the column numbers ``column``, (count,); a column out of range is not seen."""
        last = self.seen.shape[3] - 1
        inside = (column >= 0) & (column <= last)
        return limited(self.seen.index_select(3, column.clamp(0, last)), inside)

    def in_direction(self, backwards: bool) -> Pairs:
        """The causal half of the mask, for one direction of a bidirectional model; ``backwards`` reverses the rows."""
        seen, positions = self.seen, self.positions
        if backwards:
            seen, positions = seen.flip(2, 3), None if positions is None else -positions.flip(1)
        lower = torch.ones(seen.shape[2:], dtype=torch.bool, device=seen.device).tril()
        return self._replace(seen=limited(seen, lower), positions=positions)


def limited(seen: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """The mask ``seen``, bool or float, with only the columns of the bool mask ``to`` left visible."""
    return torch.where(to, seen, False if seen.dtype == torch.bool else -math.inf)


def sees_nothing(seen: torch.Tensor) -> torch.Tensor:
    """The queries without a visible column in a bool or float mask (..., l, c): (..., l, 1) bool."""
    return ~(seen if seen.dtype == torch.bool else ~seen.isneginf()).any(-1, keepdim=True)


class Mask(NamedTuple):
    """The contents of an ``attention_mask``, as `read_mask` returns them.

    Attributes:
        real: (b, l) bool, the real tokens; None if there is no padding.
        documents: (b, l) int64, the document number of each token; None if the mask has none.
        seen: a mask of four dimensions, unchanged, for `read_pairs`.
    """

    real: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    seen: torch.Tensor | None = None


def read_mask(attention_mask: Any, batch: int, length: int, cache: RecurrentCache | None) -> Mask:
    """Read an ``attention_mask`` of any form that hosts pass.

    Args:
        attention_mask: (b, c), whose last l columns are these tokens: 0 for padding, and 1 or the document number (from
            1 on) for real tokens; or four dimensions, see `read_pairs`; or a dict of masks by layer type, which
            transformers makes for compiled forwards; or None.
        cache: as before this forward; its last document continues with the first token.

    Raises:
        ValueError: for any other mask, naming the shape or the value; and if the first token begins a new document
            after a cache.
    """
    if isinstance(attention_mask, dict):
        kinds = ("linear_attention", "full_attention", "sliding_attention")
        known = next((kind for kind in kinds if kind in attention_mask), None)
        if known is None:
            raise ValueError(f"attention_mask has entries {[*attention_mask]}; allowed is one of {', '.join(kinds)}")
        attention_mask = attention_mask[known]
    if attention_mask is None:
        return Mask()
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}; allowed is a tensor")
    if attention_mask.ndim == 4:
        return Mask(seen=attention_mask)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; allowed are ({batch}, columns) and, where every "
            f"layer is attention, ({batch} or 1, 1, {length}, columns)"
        )
    mask = attention_mask[:, -length:]
    if mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns for {length} new tokens; allowed are {length} or more"
        )
    if not _has_values(mask):
        if mask.dtype != torch.bool and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            torch._assert_async((mask <= 1).all(), "attention_mask numbers documents; compiled forwards take seq_idx")
        return Mask(mask.bool())
    if length <= call.drawn or bool((mask == 1).all()):  # to ask a GPU for each token is to wait for each
        return Mask()
    if mask.dtype == torch.bool:
        return Mask(mask)
    low, high = torch.stack(mask.aminmax()).tolist()
    if not low >= 0 or (mask.is_floating_point() and bool((mask != mask.round()).any())):
        wrong = low if not low >= 0 else mask[mask != mask.round()][0].item()
        raise ValueError(
            f"attention_mask, of two dimensions, has the value {wrong}; allowed are 0 for pads, 1 for real tokens, and "
            "the numbers of documents from 1 on"
        )
    if high > 1:
        if cache is not None and not cache.is_empty:
            _check_continuation(attention_mask[:, :-length], mask)
        return Mask(None if low > 0 else mask.bool(), mask.long())
    return Mask(None if low > 0 else mask.bool())


def _has_values(t: torch.Tensor) -> bool:
    """Whether the values can be read: not while tracing, nor under `torch.func.vmap`.

    (If they can, batches without padding skip the sorting of tokens.)
    """
    return not is_tracing(t) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _check_continuation(before: torch.Tensor, mask: torch.Tensor) -> None:
    """Refuse a mask that begins a new document after a cache; but 1 may follow any number, as `generate` appends it."""
    if before.shape[1] == 0:
        return
    place = torch.arange(before.shape[1], device=before.device)
    last = before.gather(1, torch.where(before != 0, place, -1).amax(1, keepdim=True).clamp(min=0))
    first = mask.gather(1, (mask != 0).int().argmax(1, keepdim=True))
    begins = (last != 0) & (first > 1) & (first != last)
    if bool(begins.any()):
        row = int(begins.int().argmax())
        raise ValueError(
            f"attention_mask begins document {int(first[row])} at the first new token of row {row}, and the cache "
            f"holds document {int(last[row])}; allowed is a cut within a document, or a new cache"
        )


def read_pairs(
    seen: torch.Tensor,
    batch: int,
    length: int,
    cache: RecurrentCache | None,
    seq_idx: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    windows: bool,
) -> Pairs:
    """Read a mask of four dimensions.

    Args:
        seen: (b or 1, 1, l, c) over the columns of all tokens so far: bool, or floats of at most 0 that are added to
            the scores.
        cache: as before this forward.
        seq_idx: must be None, since the mask itself separates documents.
        position_ids: (b or 1, l), or None.
        windows: whether any layer has a window, which counts cached tokens by their columns.

    Raises:
        ValueError: for any other mask, naming the shape, the dtype or the value; and for a cache that holds padding or
            earlier documents.
    """
    asked, past = _has_values(seen), 0 if cache is None else cache.get_seq_length()
    columns = [int(past) + length if asked else seen.shape[3]]  # in a set, compilers would make the length a constant
    if cache is not None and cache.is_static and cache.max_cache_len:
        columns.append(cache.max_cache_len)
    if seen.shape[0] not in (batch, 1) or seen.shape[1:3] != (1, length) or seen.shape[3] not in columns:
        raise ValueError(
            f"attention_mask has shape {tuple(seen.shape)}; allowed are, of four dimensions, "
            f"({batch} or 1, 1, {length}, {' or '.join(map(str, columns))})"
        )
    if seq_idx is not None:
        raise ValueError(
            "attention_mask has four dimensions, and seq_idx or cu_seq_lens_q was passed beside it; allowed is one"
        )
    if position_ids is not None and position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)} beside an attention_mask of four dimensions; allowed "
            f"are ({batch} or 1, {length})"
        )
    if windows and position_ids is not None and asked and past:
        on = torch.arange(int(past), int(past) + length, device=position_ids.device)
        if bool((position_ids != on).any()):
            raise ValueError(
                "position_ids beside an attention_mask of four dimensions jump, and layers with a window count the "
                f"{int(past)} tokens in the cache; allowed are {int(past)} and those that follow it"
            )
    if cache is not None and asked:
        for name, held in cache.held():
            if name.endswith("position") and bool((held != past).any()):
                raise ValueError(
                    f"attention_mask has four dimensions, and of the {int(past)} tokens in the cache some are pads or "
                    "belong to other documents; allowed is a cache of rows that are each one document"
                )
    if seen.dtype != torch.bool:
        if not seen.is_floating_point():
            raise ValueError(
                f"attention_mask, of four dimensions, has dtype {seen.dtype}; allowed are torch.bool, True for what is "
                "seen, and floats that are added to scores"
            )
        if asked and seen.numel() and not (high := seen.amax().item()) <= 0:
            # ones and zeros would be added to scores, and hide nothing
            raise ValueError(
                f"attention_mask, of four dimensions and floats, has the value {high}; allowed are 0 for what is seen "
                "and negative numbers down to -inf"
            )
        seen = seen.masked_fill(seen <= torch.finfo(seen.dtype).min / 2, -math.inf)
    if isinstance(past, torch.Tensor):
        past = past.clone()  # a static cache updates its counter in place
    real = ~sees_nothing(seen)[:, 0, :, 0].expand(batch, -1)
    return Pairs(seen, None if asked and bool(real.all()) else real, past, position_ids)


def read_documents(
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    numbers: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
) -> torch.Tensor | None:
    """The document number of each token, ``(b, l)``, from the first argument that is given; None for no boundaries.

    Args:
        seq_idx: (b, l), the numbers themselves.
        cu_seq_lens: (documents + 1,), the boundaries in a single packed row.
        numbers: (b, l), the numbers of an attention mask.
        position_ids: (b, l) or (1, l); a document begins at every position that is not its predecessor plus 1.
        inputs_embeds: (b, l, d), for the shape and the device.

    Raises:
        ValueError: for a ``seq_idx`` of another shape, and for ``cu_seq_lens`` with several rows.
    """
    batch, length = inputs_embeds.shape[:2]
    if seq_idx is not None:
        if seq_idx.shape != (batch, length):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; allowed is {(batch, length)}")
        return seq_idx
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens describes one packed row, but the batch has {batch}; pass seq_idx instead")
        positions = torch.arange(length, device=inputs_embeds.device)
        return torch.bucketize(positions, cu_seq_lens[1:].to(positions), right=True).unsqueeze(0)
    if numbers is not None:
        return numbers
    if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == length:
        restarts = torch.zeros_like(position_ids)
        restarts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).to(restarts.dtype)
        if _has_values(restarts) and not bool(restarts.any()):
            return None
        return restarts.cumsum(1).expand(batch, length)
    return None
