"""`rms_norm_gated` in Triton, forward and backward.

Memory traffic limits both. A program holds whole groups of channels in registers, so that it reads each input once and
writes each output once. Nothing is stored for the backward, which computes the mean square again from the inputs that
it reads anyway.

UNIT is 8 or 1 (`row_unit`): the host divides channels and strides by it, and the kernel multiplies them by it again, so
that the compiler knows them to be multiples of it.
"""

# to mypy, a tuple that grows in a kernel has another type at each length
# mypy: disable-error-code="assignment,var-annotated"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec
from hf_archs.kernels.triton_functions import row_strides, row_unit, sigmoids

# Rows per program of the backward, a multiple of every ROWS. A program sums the gradient of the weight in registers and
# writes it once, so that this traffic is a few hundredths of the rest.
SPAN = 16


def _config(group_size: int, backward: bool = False) -> dict[str, int]:
    """Rows of a program, tiles of a group and channels in each, and warps.

    The width of a tile is a power of two. A group is cut into the number of tiles that leaves the fewest lanes idle:
    5,120 channels are five tiles of 1,024, without an idle lane. A thread holds 8 channels of a tile (16 bytes of
    bfloat16). The backward, which holds three tensors, runs out of registers above 24 channels of each per thread, and
    takes twice the warps then.
    """
    splits = [(number, triton.next_power_of_2(triton.cdiv(group_size, number))) for number in (1, 3, 5, 7)]
    tiles, block = min((s for s in splits if s[0] == 1 or s[1] >= 256), key=lambda s: (s[0] * s[1], s[0]))
    if tiles == 1 and block > 4096:
        tiles, block = 8, block // 8
    rows = min(SPAN, max(1, 1024 // (tiles * block)))
    warps = max(4, rows * block // 256) if tiles == 1 else block // 256
    if backward and tiles * block > 24 * 32 * warps:
        warps *= 2
    return {"ROWS": rows, "TILES": tiles, "BLOCK": block, "num_warps": min(16, warps)}


@triton.jit
def _scale(squares, eps, GROUP: tl.constexpr):
    """One over the root mean square of every row: (ROWS, 1)."""
    return 1 / tl.sqrt(tl.sum(squares, 1) / GROUP + eps)[:, None]


@triton.jit(do_not_specialize=["rows", "channels", "x_stride", "z_stride"])
def _rms_norm_gated_fwd_kernel(
    x,  # (rows, channels), the stride of rows given, channels adjacent
    weight,  # (channels,)
    z,  # as x, or None
    y,  # (rows, channels)
    rows,
    channels,  # divided by UNIT, like the strides
    x_stride,
    z_stride,
    eps,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channels *= UNIT
    groups = channels // GROUP
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % groups * GROUP
    x += row[:, None] * (x_stride * UNIT) + first
    if z is not None:
        z += row[:, None] * (z_stride * UNIT) + first
    y += row[:, None] * channels + first
    weight += first
    squares = tl.zeros((ROWS, BLOCK), ACC)
    tiles = ()
    for tile in tl.static_range(TILES):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (lane < GROUP)[None, :]
        gated = tl.load(x + lane[None, :], mask, 0).to(ACC)
        if z is not None:
            gate = tl.load(z + lane[None, :], mask, 0).to(ACC)
            gated = gated * gate * sigmoids(gate)[0]
        squares += gated * gated
        tiles += (gated,)
    scale = _scale(squares, eps, GROUP)
    for tile in tl.static_range(TILES):
        lane = tile * BLOCK + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (lane < GROUP)[None, :]
        normed = (tiles[tile] * scale).to(y.dtype.element_ty).to(ACC)
        tl.store(y + lane[None, :], normed * tl.load(weight + lane, lane < GROUP, 0).to(ACC)[None, :], mask)


@triton.jit(do_not_specialize=["rows", "channels", "g_stride", "x_stride", "z_stride"])
def _rms_norm_gated_bwd_kernel(
    grad_y,  # as x
    x,
    weight,
    z,
    grad_x,  # (rows, channels), or None
    grad_z,  # (rows, channels), or None
    sums,  # (spans of rows, channels): each span's gradient of the weight, or None
    rows,
    channels,
    g_stride,
    x_stride,
    z_stride,
    eps,
    UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channels *= UNIT
    groups = channels // GROUP
    span = (tl.program_id(0) // groups).to(tl.int64)
    first = tl.program_id(0) % groups * GROUP
    totals = ()
    for _ in tl.static_range(TILES):
        totals += (tl.zeros((ROWS, BLOCK), ACC),)
    for block in range(SPAN // ROWS):
        row = span * SPAN + block * ROWS + tl.arange(0, ROWS)
        g_row = grad_y + row[:, None] * (g_stride * UNIT) + first
        x_row = x + row[:, None] * (x_stride * UNIT) + first
        if z is not None:
            z_row = z + row[:, None] * (z_stride * UNIT) + first
        place = row[:, None] * channels + first
        squares = tl.zeros((ROWS, BLOCK), ACC)
        along = tl.zeros((ROWS, BLOCK), ACC)
        xs = ()
        zs = ()
        gs = ()
        for tile in tl.static_range(TILES):
            lane = tile * BLOCK + tl.arange(0, BLOCK)
            mask = (row < rows)[:, None] & (lane < GROUP)[None, :]
            gs += (tl.load(g_row + lane[None, :], mask, 0),)
            xs += (tl.load(x_row + lane[None, :], mask, 0),)
            gated = xs[tile].to(ACC)
            if z is not None:
                zs += (tl.load(z_row + lane[None, :], mask, 0),)
                gate = zs[tile].to(ACC)
                gated = gated * gate * sigmoids(gate)[0]
            squares += gated * gated
            h = gs[tile].to(ACC) * tl.load(weight + first + lane, lane < GROUP, 0).to(ACC)[None, :]
            along += h * gated
        scale = _scale(squares, eps, GROUP)
        # u is the gated input, n = scale u, and h the gradient of n: that of u is scale (h - n mean(h n))
        mean = scale * scale * (tl.sum(along, 1) / GROUP)[:, None]
        new_totals = ()
        for tile in tl.static_range(TILES):
            lane = tile * BLOCK + tl.arange(0, BLOCK)
            mask = (row < rows)[:, None] & (lane < GROUP)[None, :]
            g, x_tile = gs[tile].to(ACC), xs[tile].to(ACC)
            gated = x_tile
            if z is not None:
                z_tile = zs[tile].to(ACC)
                s, rest = sigmoids(z_tile)
                gate = z_tile * s
                gated = x_tile * gate
            # the normalised value is rounded, as in the forward
            new_totals += (totals[tile] + g * (gated * scale).to(x.dtype.element_ty).to(ACC),)
            h = g * tl.load(weight + first + lane, lane < GROUP, 0).to(ACC)[None, :]
            h = scale * (h - gated * mean)
            if grad_x is not None:
                tl.store(grad_x + place + lane[None, :], h * gate if z is not None else h, mask)
            if grad_z is not None:
                tl.store(grad_z + place + lane[None, :], h * x_tile * (s + gate * rest), mask)
        totals = new_totals
    if sums is not None:
        for tile in tl.static_range(TILES):
            lane = tile * BLOCK + tl.arange(0, BLOCK)
            tl.store(sums + span * channels + first + lane, tl.sum(totals[tile], 0), lane < GROUP)


def _rows(t: Tensor) -> Tensor:
    """``t`` as (rows, channels): a view if its channels are adjacent, as in a slice of a wider tensor; else a copy."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def rms_norm_gated_fwd(x: Tensor, weight: Tensor, z: Tensor | None, eps: float, group_size: int) -> Tensor:
    """The output, in the shape and dtype of ``x``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels, config = x.shape[-1], _config(group_size)
    x, z = _rows(x), None if z is None else _rows(z)
    strides = row_strides(x, 1) + row_strides(x if z is None else z, 1)
    unit = row_unit(channels, *strides)
    _rms_norm_gated_fwd_kernel[(triton.cdiv(x.shape[0], config["ROWS"]) * (channels // group_size),)](
        x,
        weight.contiguous(),
        z,
        y,
        x.shape[0],
        channels // unit,
        *(stride // unit for stride in strides),
        eps,
        UNIT=unit,
        GROUP=group_size,
        **config,
        **FUSED,
    )
    return y


def rms_norm_gated_bwd(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    wanted: Sequence[bool] = (True,) * 3,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and z, None for each that is not ``wanted``."""
    of_x, of_weight, of_z = wanted
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if of_x else None
    grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device) if of_z and z is not None else None
    channels, config = x.shape[-1], _config(group_size, backward=True)
    grad_y, x, z = _rows(grad_y), _rows(x), None if z is None else _rows(z)
    strides = row_strides(grad_y, 1) + row_strides(x, 1) + row_strides(x if z is None else z, 1)
    unit = row_unit(channels, *strides)
    programs = triton.cdiv(x.shape[0], SPAN)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = torch.empty(programs, channels, dtype=dtype, device=x.device) if of_weight else None
    _rms_norm_gated_bwd_kernel[(programs * (channels // group_size),)](
        grad_y,
        x,
        weight.contiguous(),
        z,
        grad_x,
        grad_z,
        sums,
        x.shape[0],
        channels // unit,
        *(stride // unit for stride in strides),
        eps,
        UNIT=unit,
        GROUP=group_size,
        SPAN=SPAN,
        **config,
        **FUSED,
    )
    return grad_x, None if sums is None else sums.sum(0), grad_z


def aot_specs() -> list[KernelSpec]:
    """Both kernels for groups of 64 to 8,192 channels, in rows divisible by 8, as Mamba2-130m's rows of 3,352 are; once
    in rows of any size, and once without a gate.
    """
    gated = [("", 64, 8), ("Mamba2-130m, ", 1536, 8), ("Mamba2-1.3b, ", 4096, 8), ("Mamba2-2.7b, ", 5120, 8)]
    gated += [("", 8192, 8), ("any rows, ", 1536, 1)]
    shapes = [(*shape, {}) for shape in gated] + [("no gate, ", 2048, 8, {"z": None, "grad_z": None})]
    specs = []
    for kernel in (_rms_norm_gated_fwd_kernel, _rms_norm_gated_bwd_kernel):
        for dtype in ("bf16", "fp32"):
            for model, group, unit, absent in shapes:
                config = _config(group, backward=kernel is _rms_norm_gated_bwd_kernel)
                num_warps = config.pop("num_warps")
                constexprs: dict[str, object] = {"UNIT": unit, "GROUP": group, **config}
                constexprs |= {name: None for name in absent if name in kernel.arg_names}
                if kernel is _rms_norm_gated_bwd_kernel:
                    constexprs["SPAN"] = SPAN
                types = {"rows": "i32", "channels": "i32", "eps": "fp32", "sums": "*fp32"}
                types |= dict.fromkeys(("g_stride", "x_stride", "z_stride"), "i32")
                types |= dict.fromkeys(constexprs, "constexpr")
                signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
                label = f"{model}{dtype} groups of {group}"
                specs.append(KernelSpec(kernel, signature, constexprs, num_warps, 3, label))
    return specs
