"""Queries and keys rotated by their positions, in one op (Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864,
section 3.4; the e^(i n theta) of Sun et al. 2023, equation 3).

Ordinary operators read and write q and k seven times, in float32. On a GPU one kernel does it once; its backward is the
opposite rotation, which needs only the angles. On a CPU the operators are as fast.

Letters: b batch, l length, h heads, n channels of a head.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_archs.kernels.arguments import check_shapes
from hf_archs.kernels.backend import backend_for
from hf_archs.kernels.library import Op
from hf_archs.kernels.numerics import cast, wide


def rotate_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    q_scale: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Turn each pair of channels of q and k by its angle, and scale q.

    ``(first cos - second sin, first sin + second cos)``, computed in float32, or in float64 if ``q`` is float64. The
    results have the first channels of all pairs first, then the second ones; scores do not depend on that order.

    Args:
        q: (batch, length, heads, channels), with an even number of channels.
        k: like ``q``, with the same dtype.
        cos: the cosine of each pair's angle at each token, (batch or 1, length, channels / 2). ``cos``, ``sin`` and
            ``q_scale`` are constants, without gradients.
        sin: the sine, likewise.
        interleaved: channels 2c and 2c + 1 are a pair; if False, channels c and c + n/2.
        q_scale: factor of the rotated q of each token and head, (batch or 1, length, heads); None for 1.
        scale: another factor of all of q.

    Returns:
        q and k, rotated, in their shapes and dtype. Both can be differentiated once.

    Raises:
        ValueError: for a wrong shape; the message names the argument.
    """
    b, l, h, n = q.shape
    rows = cos.shape[0] if cos.shape[0] == 1 else b
    check_shapes("rotate_qk", k=(k, q.shape), cos=(cos, (rows, l, n // 2)), sin=(sin, cos.shape))
    if q_scale is not None:
        check_shapes("rotate_qk", q_scale=(q_scale, (q_scale.shape[0] if q_scale.shape[0] == 1 else b, l, h)))
    backend = backend_for(q)
    if backend == "triton":
        return _rotate_qk(q, k, cos, sin, q_scale, scale, interleaved)
    if backend == "portable" and l == 1:
        return _step(q, k, cos, sin, q_scale, scale, interleaved)
    return rotate_qk_reference(q, k, cos, sin, interleaved=interleaved, q_scale=q_scale, scale=scale)


def rotate_qk_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool,
    q_scale: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`rotate_qk` in ordinary operators: the oracle, the portable form, and the one for exporters."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (cast(t.detach(), dtype).unsqueeze(2) for t in (cos, sin))
    by: Tensor | float = scale if q_scale is None else scale * cast(q_scale.detach(), dtype).unsqueeze(3)
    return _rotate(q, cos * by, sin * by, interleaved), _rotate(k, cos, sin, interleaved)


def _pairs(x: Tensor, interleaved: bool) -> Sequence[Tensor]:
    """The first and the second channel of every pair, (..., n / 2) each."""
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, second = _pairs(x.to(cos.dtype), interleaved)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def _step(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, scale: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """One token on a CPU: q and k stacked, so that few operators rotate both."""
    both = wide(torch.stack((q, k)))
    first, second = _pairs(both, interleaved)
    cos, sin = cast(cos, both.dtype).unsqueeze(2), cast(sin, both.dtype).unsqueeze(2)
    to_first = torch.addcmul(first * cos, second, sin, value=-1)
    to_second = torch.addcmul(first * sin, second, cos)
    by: Tensor | float = scale if q_scale is None else (q_scale * scale).unsqueeze(3)
    turned_q, turned_k = torch.cat((to_first, to_second), dim=-1).unbind()
    return cast(turned_q * by, q.dtype), cast(turned_k, k.dtype)


_rotate_qk = Op(
    __name__,
    "rotate_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_scale, float scale, bool interleaved) "
    "-> (Tensor, Tensor)",
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    learnt=("q", "k"),
    unread=("q", "k"),
    only="triton",
    plain=lambda q, k, cos, sin, q_scale, scale, interleaved: rotate_qk_reference(
        q, k, cos, sin, interleaved=interleaved, q_scale=q_scale, scale=scale
    ),
)


def cases(device, dtype, batch=2, length=9, heads=3, channels=20) -> Iterator[dict[str, Any]]:
    """Arguments of `rotate_qk` for tests and benchmarks: angles for all rows, then angles and scales for each row."""
    q, k = torch.randn(2, batch, length, heads, channels, device=device, dtype=dtype)
    angle = 6.28 * torch.rand(
        batch, length, channels // 2, device=device, dtype=torch.promote_types(dtype, torch.float32)
    )
    q_scale = 0.5 + angle[:, :, :heads] / 6.28
    yield {"q": q, "k": k, "cos": angle[:1].cos(), "sin": angle[:1].sin(), "interleaved": False}
    tables = {"cos": angle.cos(), "sin": angle.sin(), "q_scale": q_scale}
    yield {"q": q, "k": k, **tables, "interleaved": True, "scale": 0.3}
