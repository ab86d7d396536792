"""`rotate_qk` in Triton: one kernel for q and k, which also computes their gradients.

Memory traffic limits the kernel. A program rotates some heads of a token, and reads the token's angles once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec


def _config(heads: int, pairs: int) -> dict[str, int]:
    """Heads and pairs of a tile, powers of 2, and warps: a thread holds 16 pairs, or fewer in tiles below 512."""
    block = triton.next_power_of_2(pairs)
    together = min(triton.next_power_of_2(heads), max(1, 2048 // block))
    return {"HEADS": together, "BLOCK": block, "num_warps": min(16, max(1, together * block // 512))}


@triton.jit
def _turn(
    x,
    y,
    base,  # the index of each head's first channel, (HEADS,)
    there,  # whether each head exists, (HEADS,)
    cos,  # (1, BLOCK)
    sin,
    by,  # a number, or (HEADS, 1)
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
):
    """Rotate the pairs of x and store them in y."""
    HEADS: tl.constexpr = there.shape[0]
    lane, wide = tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK)
    halves = base[:, None] + lane[None, :]
    inside = there[:, None] & (lane < PAIRS)[None, :]
    whole = base[:, None] + wide[None, :]
    all_inside = there[:, None] & (wide < 2 * PAIRS)[None, :]
    if INTERLEAVED:
        first, second = tl.split(tl.load(x + whole, all_inside, 0).reshape(HEADS, BLOCK, 2))
    else:
        first, second = tl.load(x + halves, inside, 0), tl.load(x + halves + PAIRS, inside, 0)
    first, second = first.to(cos.dtype), second.to(cos.dtype)
    to_first, to_second = (first * cos - second * sin) * by, (first * sin + second * cos) * by
    if INTERLEAVED_OUT:
        out = tl.interleave(to_first.to(y.dtype.element_ty), to_second.to(y.dtype.element_ty))
        tl.store(y + whole, out, all_inside)
    else:
        tl.store(y + halves, to_first, inside)
        tl.store(y + halves + PAIRS, to_second, inside)


@triton.jit(do_not_specialize=["length"])
def _rotate_qk_kernel(
    q,  # (b, l, heads, 2 PAIRS), like k and both results; None if it is not to be rotated
    k,
    cos,  # (b or 1, l, PAIRS)
    sin,
    q_scale,  # (b or 1, l, heads), or None
    q_out,
    k_out,
    length,
    heads,
    scale,
    PAIRS: tl.constexpr,
    ROWS_APART: tl.constexpr,  # whether each row has its own angles
    SCALES_APART: tl.constexpr,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INTERLEAVED_OUT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = cos.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    at = token if ROWS_APART else token % length
    lane = tl.arange(0, BLOCK)
    c = tl.load(cos + at * PAIRS + lane, lane < PAIRS, 0)[None, :]
    s = tl.load(sin + at * PAIRS + lane, lane < PAIRS, 0)[None, :]
    if INVERSE:
        s = -s
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = head < heads
    base = (token * heads + head) * (2 * PAIRS)
    if q is not None:
        by = (tl.zeros((HEADS,), ACC) + scale)[:, None]
        if q_scale is not None:
            row = token if SCALES_APART else token % length
            by *= tl.load(q_scale + row * heads + head, there, 0).to(ACC)[:, None]
        _turn(q, q_out, base, there, c, s, by, PAIRS, BLOCK, INTERLEAVED, INTERLEAVED_OUT)
    if k is not None:
        _turn(k, k_out, base, there, c, s, 1.0, PAIRS, BLOCK, INTERLEAVED, INTERLEAVED_OUT)


def _launch(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_scale: Tensor | None,
    scale: float,
    interleaved: bool,
    inverse: bool,
) -> Any:
    """q and k, rotated; None for one that is None."""
    given = q if q is not None else k
    if given is None:
        return None, None
    b, l, h, n = given.shape
    dtype = torch.promote_types(given.dtype, torch.float32)
    outs = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k)]
    config = _config(h, n // 2)
    _rotate_qk_kernel[b * l, triton.cdiv(h, config["HEADS"])](
        None if q is None else q.contiguous(),
        None if k is None else k.contiguous(),
        cos.to(dtype).contiguous(),
        sin.to(dtype).contiguous(),
        None if q_scale is None else q_scale.contiguous(),
        *outs,
        l,
        h,
        scale,
        PAIRS=n // 2,
        ROWS_APART=cos.shape[0] > 1,
        SCALES_APART=q_scale is not None and q_scale.shape[0] > 1,
        INVERSE=inverse,
        INTERLEAVED=interleaved and not inverse,
        INTERLEAVED_OUT=interleaved and inverse,
        **config,
        **FUSED,
    )
    return outs[0], outs[1]


def rotate_qk_fwd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, scale: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """q, rotated and scaled, and k, rotated."""
    return _launch(q, k, cos, sin, q_scale, scale, interleaved, inverse=False)


def rotate_qk_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_scale: Tensor | None,
    scale: float,
    interleaved: bool,
    wanted: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of q and k: those of the results, rotated back; None if one is missing or not ``wanted``."""
    of_q, of_k = (gradient if asked else None for gradient, asked in zip((grad_q, grad_k), wanted))
    return _launch(of_q, of_k, cos, sin, q_scale, scale, interleaved, inverse=True)


def aot_specs() -> list[KernelSpec]:
    """Forward and backward: RetNet's 16 heads of 256 in both layouts of pairs, heads of 64, and heads of 80."""
    specs = []
    for dtype in ("bf16", "fp32"):
        for heads, pairs, interleaved, scaled in (
            (16, 128, True, True),
            (16, 128, False, False),
            (4, 32, False, False),
        ):
            for inverse in (False, True):
                specs.append(_spec(dtype, heads, pairs, interleaved, scaled, inverse))
        specs.append(_spec(dtype, 10, 40, True, False, False))
    return specs


def _spec(dtype: str, heads: int, pairs: int, interleaved: bool, scaled: bool, inverse: bool) -> KernelSpec:
    config = _config(heads, pairs)
    num_warps = config.pop("num_warps")
    constexprs: dict[str, object] = {"PAIRS": pairs, "ROWS_APART": False, "SCALES_APART": False, "INVERSE": inverse}
    constexprs |= {"INTERLEAVED": interleaved and not inverse, "INTERLEAVED_OUT": interleaved and inverse, **config}
    if not scaled:
        constexprs["q_scale"] = None
    types = {"cos": "*fp32", "sin": "*fp32", "q_scale": "*fp32", "length": "i32", "scale": "fp32"}
    types |= {"heads": "i32:16" if heads % 16 == 0 else "i32"} | dict.fromkeys(constexprs, "constexpr")
    signature = {name: types.get(name, f"*{dtype}") for name in _rotate_qk_kernel.arg_names}
    label = f"{dtype} {heads} heads of {2 * pairs}" + ", interleaved" * interleaved + ", scaled" * scaled
    return KernelSpec(_rotate_qk_kernel, signature, constexprs, num_warps, 3, label + ", backward" * inverse)
