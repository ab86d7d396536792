"""The norm of each head and the gate after it, in one (Sun et al. 2023, equation 8).

In ordinary operators a dozen temporary tensors of the values' size stand between retention and the last projection,
and on a CPU they cost more than the retention does. There the op works block by block, so that they stay in the
processor's cache, and its backward computes them again.

Letters: h heads, p channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import inverse_rms

_BLOCK = 2**17  # entries that are worked on together
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "gelu": F.gelu}


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor | None, *, eps: float, gate_fn: str) -> Tensor:
    """``RMSNorm(x) * weight * act(gate)``, the mean square being taken over each head.

    Everything is computed in float32, or float64 where ``x`` is.

    Args:
        x: (batch, length, heads, channels).
        gate: (batch, length, heads * channels).
        weight: (channels,), or None for 1.
        eps: added to the mean square.
        gate_fn: ``swish`` or ``gelu``.

    Returns:
        A tensor with the shape and dtype of ``gate``, which can be differentiated, once.
    """
    if backend_for(x) != "portable" or x.shape[1] == 1:
        return norm_gate_reference(x, gate, weight, eps, gate_fn)  # torch.compile makes one kernel of it
    return _norm_gate(x, gate, weight, eps, gate_fn)


def norm_gate_reference(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, gate_fn: str) -> Tensor:
    """`norm_gate` in ordinary operators: the oracle, the form for one token, for GPUs and for exporters."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps)
    if weight is not None:
        normed = normed * weight
    return (normed.flatten(-2) * _ACTIVATIONS[gate_fn](gate.to(dtype))).to(gate.dtype)


def _blocks(x: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same tokens of x, (..., h, p), and of every other tensor, seen as (tokens, h, p)."""
    h, p = x.shape[-2:]
    rows = [t.reshape(-1, h, p) for t in (x, *tensors)]
    step = max(1, _BLOCK // (h * p))
    for start in range(0, rows[0].shape[0], step):
        yield [t[start : start + step] for t in rows]


def _forward(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, gate_fn: str) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for x_rows, z, out in _blocks(x, gate, y):
        wide = x_rows.to(dtype)
        product = _ACTIVATIONS[gate_fn](z.to(dtype)).mul_(wide)
        if weight is not None:
            product.mul_(weight)
        torch.mul(product, inverse_rms(wide, eps), out=out)
    return y


def _backward(
    grad_y: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, gate_fn: str, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight, each untouched memory unless it is wanted."""
    of_x, of_gate, of_weight = wanted
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    grad_weight = x.new_zeros(x.shape[-1] if weight is not None else 0, dtype=dtype)
    activation_backward: Any = {"swish": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}[gate_fn]
    for x_rows, z, g, out_x, out_z in _blocks(x, gate, grad_y, grad_x, grad_gate):
        x_rows, z, g = x_rows.to(dtype), z.to(dtype), g.to(dtype)
        scale = inverse_rms(x_rows, eps)
        normed = x_rows * scale
        if of_gate:
            of_act = g * normed
            if weight is not None:
                of_act.mul_(weight)
            out_z.copy_(activation_backward(of_act, z))
        if not (of_x or of_weight):
            continue
        gated = g * _ACTIVATIONS[gate_fn](z)  # the gradient of the normed and weighted
        if of_weight:
            grad_weight += torch.mul(gated, normed).flatten(0, 1).sum(0)
        if not of_x:
            continue
        if weight is not None:
            gated.mul_(weight)
        # of x, with n = scale x and its gradient h: scale (h - n mean(h n))
        along = torch.linalg.vecdot(gated, normed).div_(x.shape[-1]).unsqueeze(-1)
        torch.mul(gated.addcmul_(normed, along, value=-1), scale, out=out_x)
    return grad_x, grad_gate, grad_weight


_norm_gate = Op(
    "norm_gate",
    _forward,
    _backward,
    fake=lambda x, gate, *_: gate.new_empty(gate.shape),
    learnt=("x", "gate", "weight"),
    plain=norm_gate_reference,
)


def cases(device, dtype, batch=2, length=9, heads=4, channels=12):
    """Arguments of `norm_gate` for tests and benchmarks: without and with a weight."""
    x = torch.randn(batch, length, heads, channels, device=device, dtype=dtype)
    gate = torch.randn(batch, length, heads * channels, device=device, dtype=dtype)
    weight = torch.randn(channels, device=device, dtype=dtype)
    yield {"x": x, "gate": gate, "weight": None, "eps": 1e-5, "gate_fn": "gelu"}
    yield {"x": x, "gate": gate, "weight": weight, "eps": 1e-5, "gate_fn": "swish"}


MODEL_SIZES = {"channels": 256}
