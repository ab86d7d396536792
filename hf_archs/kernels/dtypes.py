"""The precision rule of every op: states, decays and sums are in float32, or float64 where the activations are."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """``t`` in float32, or as it is where it is that or wider. (A ``to`` that does nothing costs a microsecond.)"""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, at no cost where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)
