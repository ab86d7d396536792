"""`rms_norm_gated` in Triton, forward and backward.

Both are bound by memory traffic. A program holds whole groups of channels in registers, so every tensor is read once
and written once and nothing is stored between forward and backward: the backward finds the mean square again from the
inputs it reads anyway.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec

# Rows that one program of the backward walks through. It sums the gradient of the weight in registers meanwhile and
# writes it once, so this is what keeps that traffic at a few hundredths of the rest; every ROWS below divides it.
SPAN = 16


def _config(group_size: int) -> dict[str, int]:
    """Rows in a tile, the group's size rounded up to what a tile can be, and warps.

    A thread holds 8 elements of each tensor (16 bytes of bf16), and 16 where a group has 8,192 channels and more.
    """
    block = triton.next_power_of_2(group_size)
    rows = min(SPAN, max(1, 1024 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 256))}


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(tl.minimum(-x, 88.0)))  # beyond, exp overflows and the sigmoid is nothing


@triton.jit
def _scale(gated, eps, GROUP: tl.constexpr):
    """One over the root mean square of every row: (ROWS, 1)."""
    return 1 / tl.sqrt(tl.sum(gated * gated, 1) / GROUP + eps)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_gated_fwd_kernel(
    x,  # (rows, channels), the stride of rows given, channels adjacent
    weight,  # (channels,)
    z,  # as x
    y,  # (rows, channels)
    rows,
    channels,
    x_stride,
    z_stride,
    eps,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    c = tl.program_id(1) * GROUP + lane
    mask = (row < rows)[:, None] & (lane < GROUP)[None, :]
    gate = tl.load(z + row[:, None] * z_stride + c[None, :], mask, 0).to(ACC)
    gated = tl.load(x + row[:, None] * x_stride + c[None, :], mask, 0).to(ACC) * gate * _sigmoid(gate)
    normed = gated * _scale(gated, eps, GROUP)
    out = normed.to(y.dtype.element_ty).to(ACC) * tl.load(weight + c, lane < GROUP, 0).to(ACC)[None, :]
    tl.store(y + row[:, None] * channels + c[None, :], out, mask)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_gated_bwd_kernel(
    grad_y,  # as x
    x,
    weight,
    z,
    grad_x,  # (rows, channels), like grad_z
    grad_z,
    sums,  # (programs along rows, channels): each program's gradient of the weight
    rows,
    channels,
    g_stride,
    x_stride,
    z_stride,
    eps,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    lane = tl.arange(0, BLOCK)
    c = tl.program_id(1) * GROUP + lane
    total = tl.zeros((ROWS, BLOCK), ACC)
    for block in range(SPAN // ROWS):
        row = tl.program_id(0).to(tl.int64) * SPAN + block * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (lane < GROUP)[None, :]
        g = tl.load(grad_y + row[:, None] * g_stride + c[None, :], mask, 0).to(ACC)
        x_tile = tl.load(x + row[:, None] * x_stride + c[None, :], mask, 0).to(ACC)
        z_tile = tl.load(z + row[:, None] * z_stride + c[None, :], mask, 0).to(ACC)
        s = _sigmoid(z_tile)
        gate = z_tile * s
        gated = x_tile * gate
        scale = _scale(gated, eps, GROUP)
        normed = gated * scale
        # the forward rounded what the weight multiplies
        total += g * normed.to(x.dtype.element_ty).to(ACC)
        # of the gated input u, with n = scale u and its gradient h: scale (h - n mean(h n))
        h = g * tl.load(weight + c, lane < GROUP, 0).to(ACC)[None, :]
        h = scale * (h - normed * (tl.sum(h * normed, 1) / GROUP)[:, None])
        place = row[:, None] * channels + c[None, :]
        tl.store(grad_x + place, h * gate, mask)
        tl.store(grad_z + place, h * x_tile * s * (1 + z_tile * (1 - s)), mask)
    tl.store(sums + tl.program_id(0).to(tl.int64) * channels + c, tl.sum(total, 0), lane < GROUP)


def _rows(t: Tensor) -> Tensor:
    """(rows, channels): a view where the channels are adjacent, as in a slice of a wider tensor; else a copy."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def rms_norm_gated_fwd(x: Tensor, weight: Tensor, z: Tensor, eps: float, group_size: int) -> Tensor:
    """The output, in the shape and dtype of ``x``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels, config = x.shape[-1], _config(group_size)
    x, z = _rows(x), _rows(z)
    _rms_norm_gated_fwd_kernel[triton.cdiv(x.shape[0], config["ROWS"]), channels // group_size](
        x,
        weight.contiguous(),
        z,
        y,
        x.shape[0],
        channels,
        x.stride(0),
        z.stride(0),
        eps,
        GROUP=group_size,
        **config,
        **FUSED,
    )
    return y


def rms_norm_gated_bwd(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    eps: float,
    group_size: int,
    wanted: Sequence[bool] = (True,) * 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and z; one kernel makes all of them, whichever are wanted."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    channels, config = x.shape[-1], _config(group_size)
    grad_y, x, z = _rows(grad_y), _rows(x), _rows(z)
    programs = triton.cdiv(x.shape[0], SPAN)
    sums = torch.empty(programs, channels, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    _rms_norm_gated_bwd_kernel[programs, channels // group_size](
        grad_y,
        x,
        weight.contiguous(),
        z,
        grad_x,
        grad_z,
        sums,
        x.shape[0],
        channels,
        grad_y.stride(0),
        x.stride(0),
        z.stride(0),
        eps,
        GROUP=group_size,
        SPAN=SPAN,
        **config,
        **FUSED,
    )
    return grad_x, sums.sum(0), grad_z


def aot_specs() -> list[KernelSpec]:
    """Both kernels for groups from one head to the whole of a wide model. Mamba2-130m's z is a slice of rows of 3,352,
    which is no multiple of 16.
    """
    specs = []
    for kernel in (_rms_norm_gated_fwd_kernel, _rms_norm_gated_bwd_kernel):
        for dtype in ("bf16", "fp32"):
            for model, group, z_stride in (
                ("", 64, "i32:16"),
                ("Mamba2-130m, ", 1536, "i32"),
                ("Mamba2-1.3b, ", 4096, "i32:16"),
                ("Mamba2-2.7b, ", 5120, "i32:16"),
                ("", 8192, "i32:16"),
            ):
                config = _config(group)
                num_warps = config.pop("num_warps")
                constexprs: dict[str, object] = {"GROUP": group, **config}
                if kernel is _rms_norm_gated_bwd_kernel:
                    constexprs["SPAN"] = SPAN
                types = {"rows": "i32", "channels": "i32:16", "eps": "fp32", "sums": "*fp32"}
                types |= {"g_stride": "i32:16", "x_stride": "i32:16", "z_stride": z_stride}
                types |= dict.fromkeys(constexprs, "constexpr")
                signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
                label = f"{model}{dtype} groups of {group}"
                specs.append(KernelSpec(kernel, signature, constexprs, num_warps, 3, label))
    return specs
