"""`norm_gate` in PyTorch, in blocks of tokens, so that a block's temporaries fit the processor's cache. The backward
computes the forward's values again.

Letters: h heads, p channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.numerics import inverse_rms

BLOCK = 2**17  # elements of x per block
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "gelu": F.gelu}


def _blocks(x: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """For each block, its tokens of x, (..., h, p), and of every other tensor, seen as (tokens, h, p)."""
    h, p = x.shape[-2:]
    rows = [t.reshape(-1, h, p) for t in (x, *tensors)]
    step = max(1, BLOCK // (h * p))
    for start in range(0, rows[0].shape[0], step):
        yield [t[start : start + step] for t in rows]


def _centre(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x


def norm_gate_fwd(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, gate_fn: str, centred: bool) -> Tensor:
    """The output, in the shape and dtype of ``gate``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for x_rows, z, out in _blocks(x, gate, y):
        wide = _centre(x_rows.to(dtype), centred)
        product = ACTIVATIONS[gate_fn](z.to(dtype)).mul_(wide)
        if weight is not None:
            product.mul_(weight)
        torch.mul(product, inverse_rms(wide, eps), out=out)
    return y


def norm_gate_bwd(
    grad_y: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    gate_fn: str,
    centred: bool,
    wanted: Sequence[bool] = (True,) * 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight. The value of one that is not ``wanted`` is undefined."""
    of_x, of_gate, of_weight = wanted
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    grad_weight = x.new_zeros(x.shape[-1] if weight is not None else 0, dtype=dtype)
    activation_backward: Any = {"swish": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}[gate_fn]
    for x_rows, z, g, out_x, out_z in _blocks(x, gate, grad_y, grad_x, grad_gate):
        x_rows, z, g = _centre(x_rows.to(dtype), centred), z.to(dtype), g.to(dtype)
        scale = inverse_rms(x_rows, eps)
        normed = x_rows * scale
        if of_gate:
            of_act = g * normed
            if weight is not None:
                of_act.mul_(weight)
            out_z.copy_(activation_backward(of_act, z))
        if not (of_x or of_weight):
            continue
        gated = g * ACTIVATIONS[gate_fn](z)  # the gradient of normed * weight
        if of_weight:
            grad_weight += torch.mul(gated, normed).flatten(0, 1).sum(0)
        if not of_x:
            continue
        if weight is not None:
            gated.mul_(weight)
        # n = scale x, and h is the gradient of n: that of x is scale (h - n mean(h n)), without its mean if centred
        along = torch.linalg.vecdot(gated, normed).div_(x.shape[-1]).unsqueeze(-1)
        torch.mul(_centre(gated, centred).addcmul_(normed, along, value=-1), scale, out=out_x)
    return grad_x, grad_gate, grad_weight
