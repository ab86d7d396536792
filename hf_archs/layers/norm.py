"""Normalisation layers. transformers initialises classes with ``RMSNorm`` or ``LayerNorm`` in their names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hf_archs.kernels.numerics import cast, wide
from hf_archs.kernels.rms_norm_gated import rms_norm, rms_norm_gated


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
        """``(..., d)`` to the same."""
        return rms_norm(hidden_states, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        """Shape and eps, as `print` shows them."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class ArchLayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) in at least float32, returned in the dtype of its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(..., d)`` to the same."""
        hidden_states = wide(hidden_states)
        if hidden_states.dtype == self.weight.dtype:  # one kernel, which saves no normalised copy for the backward
            return F.layer_norm(hidden_states, self.normalized_shape, self.weight, self.bias, self.eps)
        normed = F.layer_norm(hidden_states, self.normalized_shape, eps=self.eps)
        return torch.addcmul(self.bias, self.weight, cast(normed, self.weight.dtype))


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rms_norm": ArchRMSNorm, "layer_norm": ArchLayerNorm}


class ArchRMSNormGated(nn.Module):
    """RMSNorm of ``x * silu(z)`` over groups of channels (Dao and Gu 2024, section 7.1).

    Args:
        hidden_size: number of channels.
        eps: added to the mean square.
        group_size: channels that share a mean square, a divisor of ``hidden_size``.
    """

    def __init__(self, hidden_size: int, eps: float, group_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps, self.group_size = eps, group_size

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Two tensors ``(..., d)`` to one of that shape."""
        return rms_norm_gated(hidden_states, self.weight, gate, eps=self.eps, group_size=self.group_size)

    def extra_repr(self) -> str:
        """Shape, eps and group, as `print` shows them."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, group_size={self.group_size}"
