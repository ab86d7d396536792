"""The precision rule of every op, and small numerics that several share.

States, decays and sums are in float32, or float64 where the activations are, autocast or not.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def wide(t: Tensor) -> Tensor:
    """``t`` in float32, or as it is where it is that or wider. (A ``to`` that does nothing costs a microsecond.)"""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, at no cost where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def no_autocast(t: Tensor) -> contextlib.AbstractContextManager:
    """Autocast, where it is on, would take matrix products to bfloat16."""
    if torch.is_autocast_enabled(t.device.type):
        return torch.autocast(t.device.type, enabled=False)
    return contextlib.nullcontext()


_constants: dict[tuple[float, torch.dtype], Tensor] = {}


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, (..., 1)."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    # half as many operators, and none of the size of x: what counts for one token, and for blocks of many
    if (eps, x.dtype) not in _constants:
        _constants[eps, x.dtype] = torch.tensor(eps, dtype=x.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_constants[eps, x.dtype], norm, norm, value=1 / x.shape[-1]).rsqrt()
