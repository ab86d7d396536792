"""`rms_norm_gated` in PyTorch, in blocks of rows, so that a block's temporaries fit the processor's cache. The backward
computes the forward's values again instead of storing them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_archs.kernels.numerics import inverse_rms

BLOCK_ELEMENTS = 2**18  # elements of x per block: 1 MB in float32, and enough to outweigh the overhead of PyTorch calls


def _blocks(channels: int, elements: int, x: Tensor, *tensors: Tensor | None) -> Iterator[list[Any]]:
    """For each block, its rows of every tensor, seen as (rows, channels); None for a tensor that is None."""
    rows = [None if t is None else t.reshape(-1, channels) for t in (x, *tensors)]
    step = max(1, elements // channels)
    for start in range(0, x.numel() // channels, step):
        yield [None if t is None else t[start : start + step] for t in rows]


def _gated(x: Tensor, z: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``x * silu(z)`` in ``dtype``, and ``silu(z)``."""
    if z is None:
        return x.to(dtype), None
    gate = torch.ops.aten.silu(z.to(dtype))
    return gate * x, gate


def rms_norm_gated_fwd(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int, *, block: int = BLOCK_ELEMENTS
) -> Tensor:
    """The output, in the shape and dtype of ``x``."""
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for x_rows, z_rows, out in _blocks(channels, block, x, z, y):
        groups = _gated(x_rows, z_rows, dtype)[0].view(-1, channels // group_size, group_size)
        normed = groups * inverse_rms(groups, eps)
        torch.mul(normed.view(x_rows.shape).to(x.dtype), weight, out=out)
    return y


def rms_norm_gated_bwd(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    wanted: Sequence[bool] = (True,) * 3,
    *,
    block: int = BLOCK_ELEMENTS,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight and z (None without z). The value of one that is not ``wanted`` is undefined."""
    of_x, of_weight, of_z = wanted
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_z = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
    grad_weight = torch.zeros(channels, dtype=dtype, device=x.device)
    wide_weight = weight.to(dtype)
    for x_rows, z_rows, g, out_x, out_z in _blocks(channels, block, x, z, grad_y, grad_x, grad_z):
        gated, gate = _gated(x_rows, z_rows, dtype)
        groups = gated.view(-1, channels // group_size, group_size)
        scale = inverse_rms(groups, eps)
        normed = groups * scale
        # the normalised value is rounded, as in the forward
        product = g.to(dtype) * normed.view(g.shape).to(x.dtype)
        if of_weight:
            grad_weight += product.sum(0)
            if not (of_x or of_z):
                continue
        # u is the gated input, n = scale u, and h the gradient of n: that of u is scale (h - n mean(h n))
        grad_gated = torch.mul(g, wide_weight, out=product)
        h = grad_gated.view_as(normed)
        along = torch.linalg.vecdot(h, normed).div_(group_size).unsqueeze(-1)
        h.addcmul_(normed, along, value=-1).mul_(scale)
        if of_z:
            of_gate = torch.mul(grad_gated, x_rows, out=normed.view(g.shape))
            out_z.copy_(torch.ops.aten.silu_backward(of_gate, z_rows.to(dtype)))
        if of_x:
            out_x.copy_(grad_gated if gate is None else grad_gated.mul_(gate))
    return grad_x, grad_weight, grad_z
