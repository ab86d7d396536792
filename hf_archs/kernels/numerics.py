"""The precision rule of every op, and small numerics that several ops share.

States, decays and sums are in float32, or in float64 if the activations are float64, also under autocast.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LOG2_E = math.log2(math.e)


def wide(t: Tensor) -> Tensor:
    """``t`` in float32, or unchanged if it is float64. (Even a ``to`` that changes nothing costs a microsecond.)"""
    return t if t.dtype in (torch.float32, torch.float64) else t.to(torch.float32)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, at no cost if ``t`` has that dtype."""
    return t if t.dtype == dtype else t.to(dtype)


def full_precision(t: Tensor) -> contextlib.AbstractContextManager:
    """Context manager in which products of float32 tensors on the device of ``t`` are computed in float32.

    It switches off autocast, and the TF32 and bfloat16 that `torch.set_float32_matmul_precision`, `torch.backends` and
    Trainer's ``tf32`` allow inside such products. (It does not switch off the latter for operators that are part of a
    compiled graph, only for ops of the library in it.)
    """
    apart: contextlib.AbstractContextManager = contextlib.nullcontext()
    if torch.is_autocast_enabled(t.device.type):
        apart = torch.autocast(t.device.type, enabled=False)
    if torch.compiler.is_compiling():
        return apart
    backend = "cuda" if t.is_cuda else "mkldnn"
    rounded = {kind: found for kind in ("matmul", "conv") if (found := allowed(backend, kind)) not in ("none", "ieee")}
    return _unrounded(apart, backend, rounded) if rounded else apart


allowed = torch._C._get_fp32_precision_getter  # (backend, kind of operator): none, ieee, tf32 or bf16


@contextlib.contextmanager
def _unrounded(apart: contextlib.AbstractContextManager, backend: str, rounded: dict[str, str]) -> Iterator[None]:
    try:
        for kind in rounded:
            torch._C._set_fp32_precision_setter(backend, kind, "ieee")
        with apart:
            yield
    finally:
        for kind, found in rounded.items():
            torch._C._set_fp32_precision_setter(backend, kind, found)


def below_autograd() -> contextlib.AbstractContextManager:
    """Context manager in which operators skip autograd if gradients are off: it saves a tenth of a token's CPU time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


_kept: dict[Any, Tensor] = {}


def constant(value: float, like: Tensor) -> Any:
    """``value`` as an operand for ``like``: on a CPU a tensor that is made once, which saves each operator two
    microseconds."""
    if not like.is_cpu or torch.compiler.is_compiling():
        return value
    return made_once((value, like.dtype), like, lambda: torch.tensor(value, dtype=like.dtype, device=like.device))


def made_once(key: Any, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, a tensor without a gradient that depends on ``key`` only; on a CPU it is made once and kept."""
    if not like.is_cpu or torch.compiler.is_compiling() or _stands_for_another(like):
        return make()
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
            found = make()
        if not _stands_for_another(found):
            _kept[key] = found
    return found


def _stands_for_another(t: Tensor) -> bool:
    """Whether ``t`` is a stand-in of tracing or functorch for another tensor."""
    wrapped = torch._is_functional_tensor(t) or torch._C._functorch.is_functorch_wrapped_tensor(t)
    return wrapped or (type(t) is not Tensor and not isinstance(t, torch.nn.Parameter))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, (..., 1)."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    # half as many operators, which is faster for one token, and no temporary like x, which is faster for blocks
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(constant(eps, x), norm, norm, value=1 / x.shape[-1]).rsqrt()
