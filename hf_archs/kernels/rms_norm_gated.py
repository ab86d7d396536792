"""The gated RMSNorm of Mamba-2 (Dao and Gu 2024, "Transformers are SSMs", https://arxiv.org/abs/2405.21060,
section 7.1; RMSNorm: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import cast, inverse_rms, wide

LARGE = 2**18  # elements of an input whose copy is worth the 200 microseconds of a call of the op


def rms_norm_gated(
    x: Tensor, weight: Tensor, z: Tensor | None = None, *, eps: float, group_size: int | None = None
) -> Tensor:
    """``RMSNorm(x * silu(z)) * weight``, with one mean square for each group of channels.

    Everything is computed in float32, or in float64 if ``x`` is float64; the normalised value is rounded to the dtype
    of ``x`` before the weight multiplies it, as in transformers.

    Args:
        x: input, (..., channels).
        weight: (channels,).
        z: gate, of the shape of ``x``; None for RMSNorm without a gate.
        eps: added to the mean square.
        group_size: channels that share a mean square; None for all.

    Returns:
        A tensor with the shape and dtype of ``x``, which can be differentiated once.

    Raises:
        ValueError: for a wrong shape or group size; the message names the argument.
    """
    channels = x.shape[-1]
    group_size = channels if group_size is None else group_size
    if weight.shape != (channels,):
        raise ValueError(f"rms_norm_gated: weight must have shape {(channels,)}, not {tuple(weight.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"rms_norm_gated: z must have shape {tuple(x.shape)}, not {tuple(z.shape)}")
    if group_size < 1 or channels % group_size:
        raise ValueError(f"rms_norm_gated: group_size must divide the {channels} channels; {group_size} does not")
    backend = backend_for(x)
    one_token = x.dim() < 2 or x.shape[-2] == 1
    if backend == "reference" or (backend == "portable" and one_token):
        return rms_norm_gated_reference(x, weight, z, eps=eps, group_size=group_size)
    return _rms_norm_gated(x, weight, z, eps, group_size)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``RMSNorm(x) * weight`` over the last dimension, in at least float32.

    In training on a CPU, large inputs go through the op of `rms_norm_gated`: its backward needs no normalised copy,
    which `F.rms_norm` keeps there. On a GPU `F.rms_norm` is one kernel.

    Args:
        x: input, (..., length, channels).
        weight: (channels,).
        eps: added to the mean square.

    Returns:
        A tensor with the shape of ``x``, in the dtype of ``weight``.
    """
    x = wide(x)
    trained = x.requires_grad and x.dtype == weight.dtype and not torch.compiler.is_compiling()
    if trained and x.is_cpu and x.numel() > LARGE:
        return rms_norm_gated(x, weight, eps=eps)
    one_token = x.shape[-2] == 1 and x.is_cpu
    normed = x * inverse_rms(x, eps) if one_token else F.rms_norm(x, x.shape[-1:], eps=eps)
    return weight * cast(normed, weight.dtype)


def rms_norm_gated_reference(
    x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int | None = None
) -> Tensor:
    """`rms_norm_gated` in ordinary operators: the oracle, the form for one token, and the one for exporters."""
    groups = wide(x) if z is None else wide(x) * F.silu(wide(z))
    if group_size not in (None, x.shape[-1]):
        groups = groups.unflatten(-1, (-1, group_size))
    normed = groups * inverse_rms(groups, eps)
    return cast(weight * cast(normed.view(x.shape), x.dtype), x.dtype)


_rms_norm_gated = Op(
    __name__,
    "rms_norm_gated(Tensor x, Tensor weight, Tensor? z, float eps, int group_size) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    learnt=("x", "weight", "z"),
    plain=rms_norm_gated_reference,
)


def cases(device, dtype, batch=2, length=9, channels=48):
    """Arguments of `rms_norm_gated` for tests and benchmarks: one group of channels, three, and no gate."""
    x, z = torch.randn(2, batch, length, channels, device=device, dtype=dtype)
    weight = torch.randn(channels, device=device, dtype=dtype)
    yield {"x": x, "weight": weight, "z": z, "eps": 1e-5}
    yield {"x": x, "weight": weight, "z": z, "eps": 1e-5, "group_size": channels // 3}
    yield {"x": x, "weight": weight, "z": None, "eps": 1e-5}


MODEL_SIZES = {"channels": 768}
