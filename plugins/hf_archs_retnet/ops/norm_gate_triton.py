"""`norm_gate` in Triton, forward and backward.

Memory traffic limits both. A program holds whole heads in registers, so that it reads each input once and writes each
output once. Nothing is stored for the backward, which computes mean and mean square again from the inputs that it reads
anyway. All heads share one weight, so rows are the heads of all tokens.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec
from hf_archs.kernels.triton_functions import sigmoid

# Rows per program of the backward, a multiple of every ROWS. A program sums the gradient of the weight in registers and
# writes it once, so that this traffic is a few hundredths of the rest.
SPAN = 16


def _config(channels: int) -> dict[str, int]:
    """Rows in a tile, the channels of a head rounded up to a power of two, and warps.

    A thread holds 8 elements of each tensor (16 bytes of bfloat16), or 16 for heads of 8,192 channels.
    """
    block = triton.next_power_of_2(channels)
    rows = min(SPAN, max(1, 1024 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 256))}


@triton.jit
def _activation(z, GELU: tl.constexpr):
    """The activation of the gate, and its derivative."""
    if GELU:
        below = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)  # the normal distribution function
        return z * below, below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        s = sigmoid(z)
        return z * s, s + z * s * (1 - s)


@triton.jit
def _normed(x_tile, inside, eps, CHANNELS: tl.constexpr, CENTRED: tl.constexpr):
    """Every row divided by its root mean square, and the reciprocal of that: (ROWS, BLOCK) and (ROWS, 1)."""
    if CENTRED:
        x_tile = tl.where(inside, x_tile - (tl.sum(x_tile, 1) / CHANNELS)[:, None], 0)
    scale = 1 / tl.sqrt(tl.sum(x_tile * x_tile, 1) / CHANNELS + eps)[:, None]
    return x_tile * scale, scale


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_fwd_kernel(
    x,  # (rows, channels), like gate and y
    gate,
    weight,  # (channels,), or None
    y,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    GELU: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (lane < CHANNELS)[None, :]
    place = row[:, None] * CHANNELS + lane[None, :]
    x_tile = tl.load(x + place, inside, 0).to(ACC)
    z_tile = tl.load(gate + place, inside, 0).to(ACC)
    out, _ = _normed(x_tile, inside, eps, CHANNELS, CENTRED)
    if weight is not None:
        out *= tl.load(weight + lane, lane < CHANNELS, 0).to(ACC)[None, :]
    act, _ = _activation(z_tile, GELU)
    tl.store(y + place, out * act, inside)


@triton.jit(do_not_specialize=["rows"])
def _norm_gate_bwd_kernel(
    grad_y,  # (rows, channels), like x, gate and their gradients
    x,
    gate,
    weight,  # (channels,), or None
    grad_x,  # this and each of the next two may be None
    grad_gate,
    sums,  # (programs, channels): each program's gradient of the weight
    rows,
    eps,
    CHANNELS: tl.constexpr,
    GELU: tl.constexpr,
    CENTRED: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    lane = tl.arange(0, BLOCK)
    if sums is not None:
        total = tl.zeros((ROWS, BLOCK), ACC)
    for block in range(SPAN // ROWS):
        row = tl.program_id(0).to(tl.int64) * SPAN + block * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (lane < CHANNELS)[None, :]
        place = row[:, None] * CHANNELS + lane[None, :]
        g = tl.load(grad_y + place, inside, 0).to(ACC)
        x_tile = tl.load(x + place, inside, 0).to(ACC)
        z_tile = tl.load(gate + place, inside, 0).to(ACC)
        normed, scale = _normed(x_tile, inside, eps, CHANNELS, CENTRED)
        act, slope = _activation(z_tile, GELU)
        of_act, h = g * normed, g * act  # the latter is the gradient of normed * weight
        if weight is not None:
            w = tl.load(weight + lane, lane < CHANNELS, 0).to(ACC)[None, :]
            if sums is not None:
                total += h * normed
            of_act *= w
            h *= w
        if grad_gate is not None:
            tl.store(grad_gate + place, of_act * slope, inside)
        if grad_x is not None:
            # n = scale x, and h is the gradient of n: that of x is scale (h - n mean(h n)), without its mean if centred
            of_x = h - normed * (tl.sum(h * normed, 1) / CHANNELS)[:, None]
            if CENTRED:
                of_x -= (tl.sum(h, 1) / CHANNELS)[:, None]
            tl.store(grad_x + place, scale * of_x, inside)
    if sums is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * CHANNELS + lane, tl.sum(total, 0), lane < CHANNELS)


def norm_gate_fwd(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, gate_fn: str, centred: bool) -> Tensor:
    """The output, in the shape and dtype of ``gate``."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    channels, config = x.shape[-1], _config(x.shape[-1])
    rows = x.numel() // channels
    _norm_gate_fwd_kernel[(triton.cdiv(rows, config["ROWS"]),)](
        x.contiguous(),
        gate.contiguous(),
        None if weight is None else weight.contiguous(),
        y,
        rows,
        eps,
        CHANNELS=channels,
        GELU=gate_fn == "gelu",
        CENTRED=centred,
        **config,
        **FUSED,
    )
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gate and weight, None for each that is not ``wanted``."""
    of_x, of_gate, of_weight = wanted
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if of_x else None
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device) if of_gate else None
    channels, config = x.shape[-1], _config(x.shape[-1])
    rows = x.numel() // channels
    programs, sums = triton.cdiv(rows, SPAN), None
    if weight is not None and of_weight:
        sums = torch.empty(programs, channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    _norm_gate_bwd_kernel[(programs,)](
        grad_y.contiguous(),
        x.contiguous(),
        gate.contiguous(),
        None if weight is None else weight.contiguous(),
        grad_x,
        grad_gate,
        sums,
        rows,
        eps,
        CHANNELS=channels,
        GELU=gate_fn == "gelu",
        CENTRED=centred,
        SPAN=SPAN,
        **config,
        **FUSED,
    )
    return grad_x, grad_gate, None if sums is None else sums.sum(0)


def aot_specs() -> list[KernelSpec]:
    """Both kernels: RetNet's heads of 512 with and without a weight, and centred with gelu; heads of 64, of 200 (which
    do not fill a block), and of 4,096 channels.
    """
    shapes = [(512, False, False, True), (512, False, False, False), (512, True, True, True)]
    shapes += [(channels, False, False, True) for channels in (64, 200, 4096)]
    specs = []
    for kernel in (_norm_gate_fwd_kernel, _norm_gate_bwd_kernel):
        for dtype in ("bf16", "fp32"):
            for channels, gelu, centred, affine in shapes:
                config = _config(channels)
                num_warps = config.pop("num_warps")
                constexprs: dict[str, object] = {"CHANNELS": channels, "GELU": gelu, "CENTRED": centred, **config}
                if kernel is _norm_gate_bwd_kernel:
                    constexprs["SPAN"] = SPAN
                if not affine:
                    constexprs |= {name: None for name in ("weight", "sums") if name in kernel.arg_names}
                types = {"rows": "i32", "eps": "fp32", "sums": "*fp32"} | dict.fromkeys(constexprs, "constexpr")
                signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
                model = "RetNet 6.7B, " if channels == 512 else ""
                label = f"{model}{dtype} heads of {channels}" + ", gelu" * gelu + ", centred" * centred
                label += "" if affine else ", no weight"
                specs.append(KernelSpec(kernel, signature, constexprs, num_warps, 3, label))
    return specs
