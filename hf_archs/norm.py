"""Normalisation layers. (transformers initialises every class with ``RMSNorm`` in its name to ones.)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ArchRMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) in at least float32, returned in the dtype of its weight.

    Args:
        hidden_size: size of the last dimension, over which the mean square is taken.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        normed = F.rms_norm(wide, self.weight.shape, eps=self.eps)
        return self.weight * normed.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
