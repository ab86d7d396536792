"""`causal_conv1d` in Triton, forward and backward.

Both kernels are bound by memory traffic: every element is fetched from device memory once and its shifted copies come
out of the L1 cache, the channel lies along the threads so that each row of a tile is one coalesced read, and the
backward computes the pre-activation again (a few multiply-adds on tiles it holds anyway) instead of storing it.

Letters: b batch, l length, c channels; SIZE is the width less one, the number of inputs seen before a position.
"""

# a tuple that grows in a kernel has a type of its own at every step
# mypy: disable-error-code="assignment,var-annotated"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec

# Which config runs follows from the shape alone, so results are the same from run to run and nothing is tuned at run
# time. A row of 128 bf16 channels is 16 threads of 16 bytes each; 16 elements a thread keep enough reads in flight. The
# backward holds 3 * width tiles in registers, hence 4 elements a thread, and 2 where the filters are wide.
FORWARD_CONFIGS = [{"BLOCK_T": 32, "BLOCK_C": 128, "num_warps": 8}]
BACKWARD_CONFIGS = [{"BLOCK_T": 16, "BLOCK_C": 64, "num_warps": 8}, {"BLOCK_T": 8, "BLOCK_C": 64, "num_warps": 8}]
# Positions that one program of the backward walks through. It holds its sums for the filters in registers meanwhile
# and writes them once, so this is what keeps their traffic at a twentieth of the rest; every BLOCK_T divides it.
SPAN = 64


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(tl.minimum(-x, 88.0)))  # beyond, exp overflows and the sigmoid is nothing


@triton.jit
def _silu_slope(x):
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def _inputs(x, state, t, c, length, channels, x_stride_t, SIZE: tl.constexpr, ACC: tl.constexpr):
    """The inputs at times ``t`` (BLOCK_T,), those before 0 out of the initial state: (BLOCK_T, BLOCK_C)."""
    fits = (c < channels)[None, :]
    inside = ((t >= 0) & (t < length))[:, None] & fits
    tile = tl.load(x + t.to(tl.int64)[:, None] * x_stride_t + c[None, :], inside, 0).to(ACC)
    if state is not None:
        before = ((t < 0) & (t >= -SIZE))[:, None] & fits
        tile += tl.load(state + (SIZE + t)[:, None] * channels + c[None, :], before, 0).to(ACC)
    return tile


@triton.jit
def _filter(weight, c, channels, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """The taps of the filters, newest first: a tuple of (1, BLOCK_C)."""
    taps = ()
    for back in tl.static_range(WIDTH):
        taps += (tl.load(weight + c * WIDTH + (WIDTH - 1 - back), c < channels, 0).to(ACC)[None, :],)
    return taps


@triton.jit(do_not_specialize=["length"])
def _conv_fwd_kernel(
    x,  # (b, l, c), strides given, channels adjacent
    weight,  # (c, WIDTH)
    bias,  # (c,) or None
    state,  # (b, SIZE, c) or None
    reach,  # (b, l) or None
    y,  # (b, l, c)
    length,
    channels,
    x_stride_b,
    x_stride_t,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SIZE: tl.constexpr = WIDTH - 1
    blocks = tl.cdiv(length, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += b * x_stride_b
    if state is not None:
        state += b * channels * SIZE

    total = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    if bias is not None:
        total += tl.load(bias + c, c < channels, 0).to(ACC)[None, :]
    if reach is not None:
        visible = tl.load(reach + b * length + t, t < length, 0)
    taps = _filter(weight, c, channels, WIDTH, ACC)
    for back in tl.static_range(WIDTH):
        term = _inputs(x, state, t - back, c, length, channels, x_stride_t, SIZE, ACC)
        if reach is not None:
            term = tl.where((visible >= back)[:, None], term, 0)
        total += term * taps[back]
    if SILU:
        total *= _sigmoid(total)
    place = (b * length + t)[:, None] * channels + c[None, :]
    tl.store(y + place, total, (t < length)[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=["length"])
def _conv_bwd_kernel(
    grad_y,  # (b, l, c), strides given, channels adjacent
    x,
    weight,
    bias,
    state,
    reach,
    grad_x,  # (b, l, c)
    grad_state,  # (b, SIZE, c) or None
    sums,  # (programs along time, WIDTH + 1, c): each program's gradient of the filters, oldest tap first, and bias
    length,
    channels,
    g_stride_b,
    g_stride_t,
    x_stride_b,
    x_stride_t,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SIZE: tl.constexpr = WIDTH - 1
    # With an initial state the positions begin SIZE before the first: the gradient there is the state's.
    BEFORE: tl.constexpr = 0 if state is None else SIZE
    spans = tl.cdiv(length + BEFORE, SPAN)
    b = (tl.program_id(0) // spans).to(tl.int64)
    start = (tl.program_id(0) % spans) * SPAN - BEFORE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = (c < channels)[None, :]
    grad_y += b * g_stride_b
    x += b * x_stride_b
    if state is not None:
        state += b * channels * SIZE
        grad_state += b * channels * SIZE
    if reach is not None:
        reach += b * length
    grad_x += b * length * channels

    taps = _filter(weight, c, channels, WIDTH, ACC)
    offset = tl.zeros((1, BLOCK_C), ACC)
    if bias is not None:
        offset += tl.load(bias + c, c < channels, 0).to(ACC)[None, :]
    sum_bias = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    sum_taps = ()
    for _ in tl.static_range(WIDTH):
        sum_taps += (tl.zeros((BLOCK_T, BLOCK_C), ACC),)

    for block in range(SPAN // BLOCK_T):
        t = start + block * BLOCK_T + tl.arange(0, BLOCK_T)
        # the inputs at t + SIZE, t + SIZE - 1, ..., t - SIZE
        seen = ()
        for back in tl.static_range(2 * SIZE + 1):
            seen += (_inputs(x, state, t + (SIZE - back), c, length, channels, x_stride_t, SIZE, ACC),)
        grad = tl.zeros((BLOCK_T, BLOCK_C), ACC)
        for ahead in tl.static_range(WIDTH):
            # g: the gradient of the pre-activation at t + ahead
            at = t + ahead
            inside = (at >= 0) & (at < length)
            g = tl.load(grad_y + at.to(tl.int64)[:, None] * g_stride_t + c[None, :], inside[:, None] & fits, 0).to(ACC)
            if reach is not None:
                visible = tl.load(reach + at, inside, 0)
            if SILU:
                before = tl.zeros((BLOCK_T, BLOCK_C), ACC) + offset
                for back in tl.static_range(WIDTH):
                    term = seen[SIZE - ahead + back]
                    if reach is not None:
                        term = tl.where((visible >= back)[:, None], term, 0)
                    before += term * taps[back]
                g *= _silu_slope(before)
            if ahead == 0:
                sum_bias += g
                new_sums = ()
                for back in tl.static_range(WIDTH):
                    term = seen[SIZE + back]
                    if reach is not None:
                        term = tl.where((visible >= back)[:, None], term, 0)
                    new_sums += (sum_taps[back] + g * term,)
                sum_taps = new_sums
            if reach is not None:
                g = tl.where((visible >= ahead)[:, None], g, 0)
            grad += g * taps[ahead]
        place = t.to(tl.int64)[:, None] * channels + c[None, :]
        tl.store(grad_x + place, grad, ((t >= 0) & (t < length))[:, None] & fits)
        if state is not None:
            tl.store(grad_state + (SIZE + t)[:, None] * channels + c[None, :], grad, (t < 0)[:, None] & fits)

    sums += tl.program_id(0).to(tl.int64) * (WIDTH + 1) * channels + c
    for back in tl.static_range(WIDTH):
        tl.store(sums + (SIZE - back) * channels, tl.sum(sum_taps[back], 0), c < channels)
    tl.store(sums + WIDTH * channels, tl.sum(sum_bias, 0), c < channels)


def _rows(t: Tensor) -> Tensor:
    """``t`` itself where its channels are adjacent, as in a slice of a wider tensor; else a copy."""
    return t if t.stride(2) == 1 else t.contiguous()


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reach: Tensor | None,
    silu: bool,
    config: dict[str, int] | None = None,
) -> Tensor:
    """The convolution; ``config`` is one of `FORWARD_CONFIGS`."""
    (b, l, c), width = x.shape, weight.shape[1]
    config = config or FORWARD_CONFIGS[0]
    x = _rows(x)
    y = torch.empty(b, l, c, dtype=x.dtype, device=x.device)
    grid = (b * triton.cdiv(l, config["BLOCK_T"]), triton.cdiv(c, config["BLOCK_C"]))
    _conv_fwd_kernel[grid](
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if initial_state is None else initial_state.transpose(1, 2).contiguous(),
        reach,
        y,
        l,
        c,
        x.stride(0),
        x.stride(1),
        WIDTH=width,
        SILU=silu,
        **config,
        **FUSED,
    )
    return y


def causal_conv1d_bwd(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reach: Tensor | None,
    silu: bool,
    wanted: Sequence[bool] = (True,) * 4,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight, bias and initial_state; one kernel makes all of them, whichever are wanted.

    ``config`` is one of `BACKWARD_CONFIGS`.
    """
    (b, l, c), width = x.shape, weight.shape[1]
    config = config or BACKWARD_CONFIGS[0 if width <= 4 else 1]
    grad_y, x = _rows(grad_y), _rows(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty(b, l, c, dtype=x.dtype, device=x.device)
    grad_state = None if initial_state is None else torch.empty(b, width - 1, c, dtype=dtype, device=x.device)
    programs = b * triton.cdiv(l + (0 if initial_state is None else width - 1), SPAN)
    sums = torch.empty(programs, width + 1, c, dtype=dtype, device=x.device)
    _conv_bwd_kernel[programs, triton.cdiv(c, config["BLOCK_C"])](
        grad_y,
        x,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if initial_state is None else initial_state.transpose(1, 2).contiguous(),
        reach,
        grad_x,
        grad_state,
        sums,
        l,
        c,
        grad_y.stride(0),
        grad_y.stride(1),
        x.stride(0),
        x.stride(1),
        WIDTH=width,
        SILU=silu,
        SPAN=SPAN,
        **config,
        **FUSED,
    )
    total = sums.sum(0)
    return grad_x, total[:width].t(), total[width], None if grad_state is None else grad_state.transpose(1, 2)


def aot_specs() -> list[KernelSpec]:
    """Both kernels at the width of 4 that models have, and once at the widest with everything that can be asked for."""
    specs = []
    for dtype, width, boundaries in (("bf16", 4, False), ("fp32", 4, False), ("bf16", 4, True), ("bf16", 8, True)):
        for kernel, configs in ((_conv_fwd_kernel, FORWARD_CONFIGS), (_conv_bwd_kernel, BACKWARD_CONFIGS)):
            config = configs[0 if width <= 4 else -1]
            constexprs: dict[str, object] = {"WIDTH": width, "SILU": True, **config}
            del constexprs["num_warps"]
            signature = {
                "length": "i32",
                "channels": "i32:16",
                "grad_state": "*fp32",
                "sums": "*fp32",
                "reach": "*i32",
            }
            if kernel is _conv_bwd_kernel:
                constexprs["SPAN"] = SPAN
            if not boundaries:
                constexprs |= {"state": None, "reach": None, "grad_state": None}
            specs.append(
                KernelSpec(
                    kernel,
                    {
                        name: "constexpr"
                        if name in constexprs
                        else signature.get(name, "i32:16" if "stride" in name else f"*{dtype}")
                        for name in kernel.arg_names
                    },
                    {name: value for name, value in constexprs.items() if name in kernel.arg_names},
                    config["num_warps"],
                    num_stages=3,
                    label=f"{dtype} width {width}{' state documents' if boundaries else ''}",
                )
            )
    return specs
