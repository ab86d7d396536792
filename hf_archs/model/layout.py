"""The real tokens and documents of a batch, and the order in which mixers see them.

Letters in shapes: b batch, l length, d hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_archs.layers.masks import Pairs


class Layout(NamedTuple):
    """The real tokens and documents of a batch.

    Mixers see every row with its real tokens first and its padding last. ``order`` permutes a row into that order,
    ``restore`` back, and ``lengths`` counts the real tokens; all three are None without padding.
    """

    order: torch.Tensor | None = None  # (b, l)
    restore: torch.Tensor | None = None  # (b, l)
    lengths: torch.Tensor | None = None  # (b,)
    seq_idx: torch.Tensor | None = None  # (b, l), in mixer order: the document number of each token
    pairs: Pairs | None = None  # a mask of four dimensions; all other fields are None then

    @classmethod
    def build(cls, mask: torch.Tensor | None, seq_idx: torch.Tensor | None) -> Layout:
        """From a mask of real tokens ``(b, l)`` and document numbers ``(b, l)``."""
        if mask is None:
            return cls(seq_idx=seq_idx)
        # a stable sort by counting, since ONNX has none
        real = mask.cumsum(1)
        lengths = real[:, -1]
        restore = torch.where(mask, real, lengths.unsqueeze(1) + (~mask).cumsum(1)) - 1
        order = inverse(restore)
        return cls(order, restore, lengths, None if seq_idx is None else seq_idx.gather(1, order))

    def mask(self) -> torch.Tensor | None:
        """The real tokens in the user's order, ``(b, l)`` bool; None without padding."""
        if self.pairs is not None:
            return self.pairs.real
        if self.restore is None or self.lengths is None:
            return None
        return self.restore < self.lengths[:, None]


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The inverses of the permutations ``order``, (b, l)."""
    return torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def permute(hidden_states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Reorder the positions of ``(b, l, d)`` by ``index``, ``(b, l)``; None leaves them unchanged."""
    if index is None:
        return hidden_states
    return hidden_states.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


def reverse_real(rows: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Reverse the first ``lengths`` entries of each row of ``(b, l)``, or all entries if that is None."""
    if lengths is None:
        return rows.flip(1)
    position = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return rows.gather(1, torch.where(position < lengths[:, None], lengths[:, None] - 1 - position, position))
