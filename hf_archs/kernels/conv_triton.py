"""`causal_conv1d` in Triton, forward and backward.

A program walks along a span of time. Each of its threads has a few neighbouring channels, and keeps their last inputs
in registers, so that a span loads each element once. No thread needs values of another one, so a program has no
reductions, and with UNIT 8 no shared memory; PyTorch adds the programs' gradients of the filters. The backward computes
the pre-activation again instead of storing it.

Letters: b batch, l length, c channels. SIZE is WIDTH - 1: the inputs before a position that its filter sees.
``reach``, (b, l), is how many of these belong to the position's document; None means all of them. UNIT is 8 or 1
(`row_unit`): the host divides channels and strides by it, and the kernel multiplies them by it again, so that the
compiler knows them to be multiples of it.
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

# The width alone chooses the config (the second one is for more than 4 taps), so that results repeat and nothing is
# tuned at run time. The loads of T positions are issued together, to overlap their latencies. With the first configs, a
# thread of the forward has 8 channels (16 bytes of bfloat16), and one of the backward 4: it keeps inputs, taps, sums
# and unfinished gradients, and so needs 128 registers on an H100, which allow 16 warps per multiprocessor.
FORWARD_CONFIGS = [{"BLOCK_C": 256, "T": 4, "num_warps": 1}, {"BLOCK_C": 128, "T": 4, "num_warps": 1}]
BACKWARD_CONFIGS = [{"BLOCK_C": 128, "T": 4, "num_warps": 1}, {"BLOCK_C": 64, "T": 4, "num_warps": 1}]
# Positions per program, a multiple of T and at least SIZE. A program of the backward also computes the SIZE positions
# after its span (at width 4, 1/20 more instructions), and writes one sum per tap and bias (1/20 more traffic).
SPAN = 64
STRIDES = ["length", "channels", "g_stride_b", "g_stride_t", "x_stride_b", "x_stride_t"]


@triton.jit
def _load(pointers, mask, ACC: tl.constexpr):
    return tl.load(pointers, mask, 0).to(ACC)


@triton.jit
def _mask(fits, t, first, end):
    """The mask of the channels at position t: ``fits`` if first <= t < end, else all False."""
    # not `fits & (t < end)`: the interpreter of Triton 3.9 rejects the dtype of a mask that a scalar was combined with
    return tl.where((t >= first) & (t < end), fits, False)


@triton.jit
def _before(x, state, start, x_stride_t, channels, fits, SIZE: tl.constexpr, ACC: tl.constexpr):
    """The SIZE inputs before position ``start``, oldest first. Only at ``start`` 0 are they in the initial state, since
    other spans start at SPAN >= SIZE or later."""
    seen = ()
    for i in tl.static_range(SIZE):
        t = start - SIZE + i
        value = _load(x + tl.cast(t, tl.int64) * x_stride_t, _mask(fits, t, 0, start), ACC)
        if state is not None:
            value += _load(state + i * channels, _mask(fits, t, -SIZE, 0), ACC)
        seen += (value,)
    return seen


@triton.jit
def _load_taps(weight, channels, fits, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """The taps of the filters, that of the newest input first."""
    taps = ()
    for back in tl.static_range(WIDTH):
        taps += (_load(weight + (WIDTH - 1 - back) * channels, fits, ACC),)
    return taps


@triton.jit
def _visible(seen, reach, t, length, AT: tl.constexpr, WIDTH: tl.constexpr):
    """``seen[AT]``, the input at t, and the SIZE inputs before it, newest first; 0 for inputs of another document."""
    terms = ()
    if reach is not None:
        inside = t < length
        count = tl.load(reach + t, inside, 0)
    for back in tl.static_range(WIDTH):
        term = seen[AT - back]
        if reach is not None and back > 0:
            term = tl.where(count >= back, term, 0)
        terms += (term,)
    return terms


@triton.jit
def _convolve(terms, taps, offset, WIDTH: tl.constexpr):
    total = offset
    for back in tl.static_range(WIDTH):
        total += terms[back] * taps[back]
    return total


@triton.jit
def _through_silu(grad, total):
    """The gradient of ``total``, given ``grad``, the gradient of silu(total)."""
    s, rest = sigmoids(total)
    return grad * (s + s * total * rest)


@triton.jit
def _spread(unfinished, g, taps, reach, t, length, WIDTH: tl.constexpr):
    """The gradients of the WIDTH inputs that position t sees, oldest first: ``unfinished`` plus the part from t.

    The first one is then complete, since no later position sees that input.
    """
    if reach is not None:
        inside = t < length
        count = tl.load(reach + t, inside, 0)
    grads = ()
    for i in tl.static_range(WIDTH):
        part = g
        if reach is not None and i < WIDTH - 1:
            part = tl.where(count >= WIDTH - 1 - i, g, 0)
        part *= taps[WIDTH - 1 - i]
        if i < WIDTH - 1:
            part += unfinished[i]
        grads += (part,)
    return grads


@triton.jit
def _store(grad_x, grad_state, grad, t, start, length, channels, fits, SIZE: tl.constexpr):
    """Store the gradient of input t - SIZE. A negative one is of the initial state; inputs before ``start`` are left to
    the program before."""
    place = tl.cast(t - SIZE, tl.int64)
    tl.store(grad_x + place * channels, grad, _mask(fits, t - SIZE, start, length))
    if grad_state is not None:
        tl.store(grad_state + t * channels, grad, _mask(fits, t, 0, SIZE))


@triton.jit(do_not_specialize=STRIDES)
def _conv_fwd_kernel(
    x,  # (b, l, c), strides given, channels adjacent
    weight,  # (WIDTH, c)
    bias,  # (c,) or None
    state,  # (b, SIZE, c) or None
    reach,  # (b, l) or None
    y,  # (b, l, c)
    length,
    channels,  # divided by UNIT, like the strides
    x_stride_b,
    x_stride_t,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    T: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SIZE: tl.constexpr = WIDTH - 1
    channels *= UNIT
    x_stride_t *= UNIT
    spans = tl.cdiv(length, SPAN)
    b = (tl.program_id(0) // spans).to(tl.int64)
    start = (tl.program_id(0) % spans) * SPAN
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = c < channels
    x += b * x_stride_b * UNIT + c
    y += b * length * channels + c
    if state is not None:
        state += b * SIZE * channels + c
    if reach is not None:
        reach += b * length

    taps = _load_taps(weight + c, channels, fits, WIDTH, ACC)
    offset = tl.zeros((BLOCK_C,), ACC)
    if bias is not None:
        offset += _load(bias + c, fits, ACC)
    seen = _before(x, state, start, x_stride_t, channels, fits, SIZE, ACC)
    for t0 in range(start, tl.minimum(start + SPAN, length), T):
        at = tl.cast(t0, tl.int64)
        for i in tl.static_range(T):
            seen += (_load(x + at * x_stride_t + i * x_stride_t, _mask(fits, t0 + i, 0, length), ACC),)
        for i in tl.static_range(T):
            terms = _visible(seen, reach, t0 + i, length, SIZE + i, WIDTH)
            total = _convolve(terms, taps, offset, WIDTH)
            if SILU:
                total *= sigmoids(total)[0]
            tl.store(y + at * channels + i * channels, total, _mask(fits, t0 + i, 0, length))
        last = ()
        for i in tl.static_range(SIZE):
            last += (seen[T + i],)
        seen = last


@triton.jit(do_not_specialize=STRIDES)
def _conv_bwd_kernel(
    grad_y,  # (b, l, c), strides given, channels adjacent
    x,  # this and the next four as in the forward
    weight,
    bias,
    state,
    reach,
    grad_x,  # (b, l, c), or None if the gradients of x and of the state are both not wanted
    grad_state,  # (b, SIZE, c), or None
    sums,  # (b * spans, WIDTH + 1, c): each program's gradients of the taps, oldest first, and of the bias; or None
    length,
    channels,
    g_stride_b,
    g_stride_t,
    x_stride_b,
    x_stride_t,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    T: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SIZE: tl.constexpr = WIDTH - 1
    channels *= UNIT
    g_stride_t *= UNIT
    x_stride_t *= UNIT
    spans = tl.cdiv(length, SPAN)
    b = (tl.program_id(0) // spans).to(tl.int64)
    start = (tl.program_id(0) % spans) * SPAN
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = c < channels
    grad_y += b * g_stride_b * UNIT + c
    x += b * x_stride_b * UNIT + c
    if state is not None:
        state += b * SIZE * channels + c
    if reach is not None:
        reach += b * length
    if grad_x is not None:
        grad_x += b * length * channels + c
    if grad_state is not None:
        grad_state += b * SIZE * channels + c

    taps = _load_taps(weight + c, channels, fits, WIDTH, ACC)
    zero = tl.zeros((BLOCK_C,), ACC)
    offset = zero
    if bias is not None:
        offset += _load(bias + c, fits, ACC)
    sum_bias = zero
    sum_taps = ()
    for _ in tl.static_range(WIDTH):
        sum_taps += (zero,)
    unfinished = ()  # gradients of the last SIZE inputs, oldest first, without the parts from later positions
    for _ in tl.static_range(SIZE):
        unfinished += (zero,)
    seen = _before(x, state, start, x_stride_t, channels, fits, SIZE, ACC)
    end = tl.minimum(start + SPAN, length)
    for t0 in range(start, end, T):
        at = tl.cast(t0, tl.int64)
        loaded = ()
        for i in tl.static_range(T):
            here = _mask(fits, t0 + i, 0, length)
            seen += (_load(x + at * x_stride_t + i * x_stride_t, here, ACC),)
            loaded += (_load(grad_y + at * g_stride_t + i * g_stride_t, here, ACC),)
        for i in tl.static_range(T):
            t = t0 + i
            terms = _visible(seen, reach, t, length, SIZE + i, WIDTH)
            g = loaded[i]
            if SILU:
                g = _through_silu(g, _convolve(terms, taps, offset, WIDTH))
            if sums is not None:
                sum_bias += g
                new_sums = ()
                for back in tl.static_range(WIDTH):
                    new_sums += (sum_taps[back] + g * terms[back],)
                sum_taps = new_sums
            if grad_x is not None:
                grads = _spread(unfinished, g, taps, reach, t, length, WIDTH)
                _store(grad_x, grad_state, grads[0], t, start, length, channels, fits, SIZE)
                unfinished = ()
                for j in tl.static_range(SIZE):
                    unfinished += (grads[1 + j],)
        last = ()
        for i in tl.static_range(SIZE):
            last += (seen[T + i],)
        seen = last

    if grad_x is not None:
        # positions after the span see its last SIZE inputs: add their part of the gradients
        t0 = start + tl.cdiv(end - start, T) * T
        at = tl.cast(t0, tl.int64)
        for i in tl.static_range(SIZE):
            t = t0 + i
            here = _mask(fits, t, 0, length)
            seen += (_load(x + at * x_stride_t + i * x_stride_t, here, ACC),)
            g = _load(grad_y + at * g_stride_t + i * g_stride_t, here, ACC)
            if SILU:
                terms = _visible(seen, reach, t, length, SIZE + i, WIDTH)
                g = _through_silu(g, _convolve(terms, taps, offset, WIDTH))
            grads = _spread(unfinished, g, taps, reach, t, length, WIDTH)
            _store(grad_x, grad_state, grads[0], t, start, length, channels, fits, SIZE)
            unfinished = ()
            for j in tl.static_range(SIZE):
                unfinished += (grads[1 + j],)
    if sums is not None:
        sums += tl.program_id(0).to(tl.int64) * (WIDTH + 1) * channels + c
        for back in tl.static_range(WIDTH):
            tl.store(sums + (SIZE - back) * channels, sum_taps[back], fits)
        tl.store(sums + WIDTH * channels, sum_bias, fits)


def _rows(t: Tensor) -> Tensor:
    """``t`` itself if its channels are adjacent, as in a slice of a wider tensor; else a contiguous copy."""
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
    config = config or FORWARD_CONFIGS[width > 4]
    x = _rows(x)
    strides = row_strides(x, 2)
    unit = row_unit(c, *strides)
    y = torch.empty(b, l, c, dtype=x.dtype, device=x.device)
    _conv_fwd_kernel[b * triton.cdiv(l, SPAN), triton.cdiv(c, config["BLOCK_C"])](
        x,
        weight.t().contiguous(),
        None if bias is None else bias.contiguous(),
        None if initial_state is None else initial_state.transpose(1, 2).contiguous(),
        reach,
        y,
        l,
        c // unit,
        *(stride // unit for stride in strides),
        UNIT=unit,
        WIDTH=width,
        SILU=silu,
        SPAN=SPAN,
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
) -> tuple[Tensor | None, ...]:
    """The gradients of x (None if neither it nor the initial state is ``wanted``), of weight and bias (both None if
    neither is), and of the initial state (None if it is not wanted or absent).

    ``config`` is one of `BACKWARD_CONFIGS`.
    """
    of_x, of_weight, of_bias, of_state = wanted
    of_state = of_state and initial_state is not None
    (b, l, c), width = x.shape, weight.shape[1]
    config = config or BACKWARD_CONFIGS[width > 4]
    grad_y, x = _rows(grad_y), _rows(x)
    strides = row_strides(grad_y, 2) + row_strides(x, 2)
    unit = row_unit(c, *strides)
    dtype = torch.promote_types(x.dtype, torch.float32)
    programs = b * triton.cdiv(l, SPAN)
    grad_x = torch.empty(b, l, c, dtype=x.dtype, device=x.device) if of_x or of_state else None
    grad_state = torch.empty(b, width - 1, c, dtype=dtype, device=x.device) if of_state else None
    sums = torch.empty(programs, width + 1, c, dtype=dtype, device=x.device) if of_weight or of_bias else None
    _conv_bwd_kernel[programs, triton.cdiv(c, config["BLOCK_C"])](
        grad_y,
        x,
        weight.t().contiguous(),
        None if bias is None else bias.contiguous(),
        None if initial_state is None else initial_state.transpose(1, 2).contiguous(),
        reach,
        grad_x,
        grad_state,
        sums,
        l,
        c // unit,
        *(stride // unit for stride in strides),
        UNIT=unit,
        WIDTH=width,
        SILU=silu,
        SPAN=SPAN,
        **config,
        **FUSED,
    )
    total = None if sums is None else sums.sum(0)
    return (
        grad_x,
        None if total is None else total[:width].t(),
        None if total is None else total[width],
        None if grad_state is None else grad_state.transpose(1, 2),
    )


def aot_specs() -> list[KernelSpec]:
    """Both kernels at width 4, the models' width: rows divisible by 8 and any rows, bfloat16 and float32, without and
    with state and documents; and at width 8, the widest, with state and documents."""
    specs = []
    for dtype, width, boundaries, unit in (
        ("bf16", 4, False, 8),
        ("bf16", 4, False, 1),
        ("fp32", 4, False, 8),
        ("bf16", 4, True, 8),
        ("bf16", 8, True, 8),
    ):
        for kernel, configs in ((_conv_fwd_kernel, FORWARD_CONFIGS), (_conv_bwd_kernel, BACKWARD_CONFIGS)):
            config = dict(configs[width > 4])
            num_warps = config.pop("num_warps")
            constexprs: dict[str, object] = {"UNIT": unit, "WIDTH": width, "SILU": True, "SPAN": SPAN, **config}
            if not boundaries:
                constexprs |= {"state": None, "reach": None, "grad_state": None}
            types = dict.fromkeys(STRIDES, "i32") | {"grad_state": "*fp32", "sums": "*fp32", "reach": "*i32"}
            types |= dict.fromkeys(constexprs, "constexpr")
            signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
            constexprs = {name: value for name, value in constexprs.items() if name in signature}
            label = f"{dtype} width {width}, rows in {unit}s{', state documents' if boundaries else ''}"
            specs.append(KernelSpec(kernel, signature, constexprs, num_warps, num_stages=3, label=label))
    return specs
