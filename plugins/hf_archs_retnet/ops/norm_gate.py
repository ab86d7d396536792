"""The norm of each head and the gate after it, in one op (Sun et al. 2023, equation 8).

With ordinary operators, a dozen temporary tensors of the values' size are made between retention and the last
projection. They cost more than retention, and training keeps five of them in float32. The op keeps only its inputs.

Letters: h heads, p channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import wide
from hf_archs_retnet.ops import norm_gate_portable as portable


def norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None, *, eps: float, gate_fn: str, centred: bool = False
) -> Tensor:
    """``RMSNorm(x) * weight * act(gate)``, with one mean square for each head.

    Everything is computed in float32, or in float64 if ``x`` is float64. Each tensor may have its own dtype, which its
    gradient has too.

    Args:
        x: (batch, length, heads, channels).
        gate: (batch, length, heads * channels).
        weight: (channels,), or None for 1.
        eps: added to the mean square.
        gate_fn: ``swish`` or ``gelu``.
        centred: whether the mean of each head is subtracted first, so that the norm is a LayerNorm of the head.

    Returns:
        A tensor with the shape and dtype of ``gate``, which can be differentiated once.
    """
    backend = backend_for(x)
    if backend == "reference" or (backend == "portable" and x.shape[1] == 1):
        return norm_gate_reference(x, gate, weight, eps, gate_fn, centred)
    return _norm_gate(x, gate, weight, eps, gate_fn, centred)


def norm_gate_reference(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, gate_fn: str, centred: bool = False
) -> Tensor:
    """`norm_gate` in ordinary operators: the oracle, the form for one token on a CPU, and the one for exporters."""
    x = wide(x)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    normed = F.rms_norm(x, x.shape[-1:], eps=eps)
    if weight is not None:
        normed = normed * weight
    return (normed.flatten(-2) * portable.ACTIVATIONS[gate_fn](gate.to(x.dtype))).to(gate.dtype)


_norm_gate = Op(
    __name__,
    "norm_gate(Tensor x, Tensor gate, Tensor? weight, float eps, str gate_fn, bool centred) -> Tensor",
    fake=lambda x, gate, *_: gate.new_empty(gate.shape),
    learnt=("x", "gate", "weight"),
    plain=norm_gate_reference,
)


def cases(device, dtype, batch=2, length=9, heads=4, channels=12) -> Iterator[dict[str, Any]]:
    """Arguments of `norm_gate` for tests and benchmarks: centred without a weight, and with RetNet's options."""
    x = torch.randn(batch, length, heads, channels, device=device, dtype=dtype)
    gate = torch.randn(batch, length, heads * channels, device=device, dtype=dtype)
    weight = torch.randn(channels, device=device, dtype=dtype)
    yield {"x": x, "gate": gate, "weight": None, "eps": 1e-5, "gate_fn": "gelu", "centred": True}
    yield {"x": x, "gate": gate, "weight": weight, "eps": 1e-5, "gate_fn": "swish"}


MODEL_SIZES = {"channels": 256}
