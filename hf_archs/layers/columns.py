"""Keys and values as columns, and the blocks of queries that see them.

Letters, coordinates and terms are those of `hf_archs.layers.attention`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hf_archs.kernels.numerics import cast


class Columns(NamedTuple):
    """Keys and values that the queries of a forward may see, and the starts of the documents."""

    k: torch.Tensor  # (b, k, p + l, n), at the coordinates -p to l - 1
    v: torch.Tensor
    past: int  # p
    start: torch.Tensor  # see `document_starts`
    before: Mapping[str, torch.Tensor | None]  # the states before this forward
    memory: Any = None  # see `hf_archs.layers.memory_attention`

    @property
    def length(self) -> int:
        """Number of tokens of this forward."""
        return self.k.shape[2] - self.past

    @property
    def is_step(self) -> bool:
        """True for a decode step: one new token after a non-empty cache."""
        return self.past > 0 and self.length == 1

    def held(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The extra columns in the states ``<part>key`` and ``<part>value``: (b, k, columns, n) each."""
        k, v = self.before[f"{part}key"], self.before[f"{part}value"]
        assert k is not None
        assert v is not None
        return cast(k, self.k.dtype).mT, cast(v, self.v.dtype).mT


class Blocks(NamedTuple):
    """Blocks of queries, each with the direct columns that it may see."""

    q: torch.Tensor  # (b, s, h, queries, n)
    k: torch.Tensor  # (b, s, k, columns, n)
    v: torch.Tensor
    query: torch.Tensor  # coordinates, (s, queries, 1)
    key: torch.Tensor  # coordinates, (s, 1, columns)
    start: torch.Tensor  # of the documents, (b or 1, s or 1, queries or 1, 1)


# extra keys and values, (b, s, k, columns, n), and which query sees them, (b or 1, s, queries, columns) bool
Extra = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rows_of_mask(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """A mask with blocks as batch rows: (b or 1, s, queries, columns) to (b * s or 1, 1, queries, columns)."""
    if mask.shape[0] != batch and mask.shape[1] > 1:
        mask = mask.expand(batch, -1, -1, -1)
    return mask.flatten(0, 1).unsqueeze(1)


def take_columns(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Gather columns of x, (b, k, columns, n), by indices ``place``, (b or 1, s, count): (b, s, k, count, n)."""
    index = place.flatten(1)[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])
    return x.gather(2, index).unflatten(2, place.shape[1:]).transpose(1, 2)
