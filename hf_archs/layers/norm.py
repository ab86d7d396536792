"""Normalisation layers. transformers initialises classes with ``RMSNorm`` or ``LayerNorm`` in their names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hf_archs.kernels.numerics import cast, inverse_rms, wide
from hf_archs.kernels.rms_norm_gated import rms_norm_gated

LARGE = 2**18  # elements of an input whose copy is worth the time of a call of the op


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
        self.shape = (hidden_size,)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(..., d)`` to the same."""
        weight, hidden_states = self.weight, wide(hidden_states)
        if self._saves_a_copy(hidden_states):
            return rms_norm_gated(hidden_states, weight, eps=self.eps)
        if hidden_states.shape[-2] == 1 and hidden_states.is_cpu:  # a decode step; on a GPU `F.rms_norm` is one kernel
            normed = hidden_states * inverse_rms(hidden_states, self.eps)
        else:
            normed = F.rms_norm(hidden_states, self.shape, eps=self.eps)
        return weight * cast(normed, weight.dtype)

    def _saves_a_copy(self, hidden_states: torch.Tensor) -> bool:
        """Whether `rms_norm_gated` should compute: its backward needs no normalised copy, which `F.rms_norm` keeps on a
        CPU. Small inputs gain nothing: the op itself takes 200 microseconds.
        """
        trained = hidden_states.requires_grad and hidden_states.dtype == self.weight.dtype
        return trained and hidden_states.is_cpu and hidden_states.numel() > LARGE and not torch.compiler.is_compiling()

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
