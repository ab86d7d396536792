"""`toeplitz_conv` in Triton, forward and backward, in two forms.

If fewer than 16 channels share a filter, a tile of positions and channels takes one multiply-add per tap. x is read
from device memory once and its shifted copies from the L1 cache; channels run along the threads, so that each row of a
tile is one coalesced read. For the gradient of the taps, a program walks along a span of positions with the sums of up
to 16 taps in registers, and writes these once.

If 16 channels or more share a filter, a tile of outputs is a product of Toeplitz tiles, which are made from the filter
when needed, with tiles of x, on tensor cores (Ku et al. 2025, section 3). A product with few columns would waste tensor
cores, so a product of 64 columns takes several tiles of positions, which share their Toeplitz tiles (with documents
they do not, and a product takes one). The gradient of the taps is the sum over positions of products of tiles of grad_y
and x, whose diagonals PyTorch adds up in the end.

Inputs of 16 bits are multiplied as they are and summed in float32; taps are rounded to bfloat16 if x is bfloat16.
Products of float32 are made of six bfloat16 products ("bf16x6"), products of float16 with taps of three; both are as
exact as their inputs. There are no atomics, so results repeat exactly.

Letters: b batch, l length, c channels, g groups of channels that share a filter, k taps; ``rows`` are the inputs with
the initial state before them, if there is one, (b, before + l, c).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from hf_archs.kernels.aot import FUSED, KernelSpec

SHARED = 16  # the fewest channels per filter for which tensor cores are faster
# Shape and dtype alone choose the config, so nothing is tuned at run time. The first of each is for 16 bits, the second
# for float32, whose products of six terms need more registers.
SHIFT_CONFIGS = [
    {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_T": 32, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2},
]
SUM_CONFIGS = [  # the first for more than 8 taps
    {"BLOCK_M": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 8, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2},
]
MATRIX_CONFIGS = [
    {"BLOCK_I": 64, "BLOCK_J": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_I": 32, "BLOCK_J": 32, "COLUMNS": 32, "num_warps": 4, "num_stages": 1},
]
PROGRAMS = 2048  # enough to fill a large GPU; more would only write more sums of the gradient of the taps
SPAN = 256  # the fewest positions that a program sums over


@triton.jit
def _document(documents, t, length):
    """The documents of positions ``t``; positions before the first belong to document 0, like position 0."""
    return tl.load(documents + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit(do_not_specialize=["length", "inputs", "before"])
def _shift_kernel(
    rows,  # (b, inputs, c): x with the state before it; REVERSED: the gradient of y
    taps,  # (k, g)
    bias,  # (c,) or None
    documents,  # (b, l) or None
    out,  # (b, outputs, c): y; REVERSED: the gradient of rows
    length,  # of the sequence
    inputs,
    before,  # the number of inputs before position 0; REVERSED: of outputs before it
    channels,
    groups,
    TAPS: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``y_t = sum_m h_m x_{t - m}``; REVERSED: ``sum_m h_m g_{t + m}`` for all t from -before on."""
    first = 0
    outputs = length
    if REVERSED:
        first = -before
        outputs = length + before
    blocks = tl.cdiv(outputs, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = first + tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    fits = (c < channels)[None, :]
    group = c // (channels // groups)
    rows += b * inputs * channels
    if documents is not None:
        documents += b * length
        here = _document(documents, t, length)

    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for m in range(TAPS):
        other = t - m
        place = other + before
        if REVERSED:
            other = t + m
            place = other
        seen = (place >= 0) & (place < inputs)
        if documents is not None:
            seen = seen & (_document(documents, other, length) == here)
        value = tl.load(rows + place.to(tl.int64)[:, None] * channels + c[None, :], seen[:, None] & fits, 0)
        total += value.to(tl.float32) * tl.load(taps + m * groups + group, c < channels, 0)[None, :]
    if bias is not None:
        place = t
        if not REVERSED:
            place = t + before
        seen = (place >= 0) & (place < inputs)
        value = tl.load(rows + place.to(tl.int64)[:, None] * channels + c[None, :], seen[:, None] & fits, 0)
        total += value.to(tl.float32) * tl.load(bias + c, c < channels, 0).to(tl.float32)[None, :]
    written = (t - first).to(tl.int64)
    out += b * outputs * channels
    tl.store(out + written[:, None] * channels + c[None, :], total, (written < outputs)[:, None] & fits)


@triton.jit(do_not_specialize=["length", "inputs", "before", "span"])
def _shift_sums_kernel(
    rows,  # (b, inputs, c)
    grad_y,  # (b, l, c)
    documents,  # (b, l) or None
    sums,  # (b * spans, k, c)
    length,
    inputs,
    before,
    channels,
    span,  # positions per program
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``sum_t g_t x_{t - m}`` over the positions of a span."""
    spans = tl.cdiv(length, span)
    b = (tl.program_id(0) // spans).to(tl.int64)
    start = tl.program_id(0) % spans * span
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    fits = c < channels
    rows += b * inputs * channels
    grad_y += b * length * channels
    if documents is not None:
        documents += b * length
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for t in range(start, tl.minimum(start + span, length)):
        place = before + t - m
        seen = (place >= 0) & (m < TAPS)
        if documents is not None:
            seen = seen & (_document(documents, t - m, length) == tl.load(documents + t))
        value = tl.load(rows + place.to(tl.int64)[:, None] * channels + c[None, :], seen[:, None] & fits[None, :], 0)
        g = tl.load(grad_y + tl.cast(t, tl.int64) * channels + c, fits, 0)
        total += value.to(tl.float32) * g.to(tl.float32)[None, :]
    place = (tl.program_id(0).to(tl.int64) * TAPS + m[:, None]) * channels + c[None, :]
    tl.store(sums + place, total, (m < TAPS)[:, None] & fits[None, :])


@triton.jit(do_not_specialize=["length", "inputs", "before"])
def _matrix_kernel(
    rows,
    taps,  # (g, k)
    bias,
    documents,
    out,
    length,
    inputs,
    before,
    channels,
    TAPS: tl.constexpr,
    REVERSED: tl.constexpr,
    GROUP: tl.constexpr,  # channels of a group
    WIDE: tl.constexpr,  # channels of a group that are columns of one product, a power of 2
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `_shift_kernel`, for groups of many channels. A product has rows i (outputs), sums over j (inputs), and has a
    column for each channel of each tile of positions."""
    BLOCKS: tl.constexpr = (BLOCK_I + TAPS - 1 + BLOCK_J - 1) // BLOCK_J
    PARTS: tl.constexpr = (GROUP + WIDE - 1) // WIDE
    TOGETHER: tl.constexpr = COLUMNS // WIDE  # tiles of positions
    first = 0
    outputs = length
    if REVERSED:
        first = -before
        outputs = length + before
    steps = tl.cdiv(outputs, BLOCK_I * TOGETHER)
    b = (tl.program_id(0) // steps).to(tl.int64)
    start = first + tl.program_id(0) % steps * (BLOCK_I * TOGETHER)
    group = tl.program_id(1) // PARTS
    column = tl.arange(0, COLUMNS)
    tile = column // WIDE * BLOCK_I
    channel = tl.program_id(1) % PARTS * WIDE + column % WIDE
    fits = channel < GROUP
    c = group * GROUP + channel
    i = tl.arange(0, BLOCK_I)
    rows += b * inputs * channels
    if documents is not None:
        documents += b * length
        here = _document(documents, start + i, length)

    total = tl.zeros((BLOCK_I, COLUMNS), tl.float32)
    for block in range(BLOCKS):
        if REVERSED:
            j = block * BLOCK_J + tl.arange(0, BLOCK_J)
            back = j[None, :] - i[:, None]
        else:
            j = BLOCK_I - (block + 1) * BLOCK_J + tl.arange(0, BLOCK_J)
            back = i[:, None] - j[None, :]
        inside = (back >= 0) & (back < TAPS)
        if documents is not None:  # then TOGETHER is 1
            inside = inside & (_document(documents, start + j, length)[None, :] == here[:, None])
        matrix = tl.load(taps + group * TAPS + back, inside, 0)
        place = start + j[:, None] + tile[None, :]
        if not REVERSED:
            place += before
        seen = (place >= 0) & (place < inputs) & fits[None, :]
        value = tl.load(rows + place.to(tl.int64) * channels + c[None, :], seen, 0)
        if value.dtype == tl.bfloat16:
            total = tl.dot(matrix.to(tl.bfloat16), value, total)
        else:
            total = tl.dot(matrix, value.to(tl.float32), total, input_precision=PRECISION)
    t = start + i[:, None] + tile[None, :]
    if bias is not None:
        place = t
        if not REVERSED:
            place = t + before
        seen = (place >= 0) & (place < inputs) & fits[None, :]
        value = tl.load(rows + place.to(tl.int64) * channels + c[None, :], seen, 0)
        total += value.to(tl.float32) * tl.load(bias + c, fits, 0).to(tl.float32)[None, :]
    written = t - first
    out += b * outputs * channels
    tl.store(out + written.to(tl.int64) * channels + c[None, :], total, (written < outputs) & fits[None, :])


@triton.jit(do_not_specialize=["length", "inputs", "before", "span"])
def _matrix_sums_kernel(
    rows,
    grad_y,
    documents,
    sums,  # (b * spans, g, blocks, i, j)
    length,
    inputs,
    before,
    channels,
    span,
    TAPS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum g_i x_j`` for each output i and input j of a tile, over the channels of a group and the tiles of a span."""
    BLOCKS: tl.constexpr = (BLOCK_I + TAPS - 1 + BLOCK_J - 1) // BLOCK_J
    spans = tl.cdiv(length, span)
    b = (tl.program_id(0) // spans).to(tl.int64)
    group, block = tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, BLOCK_I)
    j = BLOCK_I - (block + 1) * BLOCK_J + tl.arange(0, BLOCK_J)
    rows += b * inputs * channels + group * GROUP
    grad_y += b * length * channels + group * GROUP
    if documents is not None:
        documents += b * length
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    begin = tl.program_id(0) % spans * span
    for start in range(begin, begin + span, BLOCK_I):
        product = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        for part in range(0, GROUP, WIDE):
            c = part + tl.arange(0, WIDE)
            t = start + i
            seen = (t < length)[:, None] & (c < GROUP)[None, :]
            g = tl.load(grad_y + t.to(tl.int64)[:, None] * channels + c[None, :], seen, 0)
            place = before + start + j
            seen = ((place >= 0) & (place < inputs))[None, :] & (c < GROUP)[:, None]
            value = tl.load(rows + place.to(tl.int64)[None, :] * channels + c[:, None], seen, 0)
            product = tl.dot(g, value, product, input_precision=PRECISION)
        if documents is not None:
            same = _document(documents, start + j, length)[None, :] == _document(documents, start + i, length)[:, None]
            product = tl.where(same, product, 0)
        total += product
    groups = channels // GROUP
    sums += ((tl.program_id(0).to(tl.int64) * groups + group) * BLOCKS + block) * (BLOCK_I * BLOCK_J)
    tl.store(sums + i[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :], total)


def _precision(dtype: torch.dtype) -> str:
    if knobs.runtime.interpret:  # the interpreter multiplies exactly
        return "ieee"
    return "bf16x6" if dtype == torch.float32 else "bf16x3"


def _config(configs: list[dict[str, int]], dtype: torch.dtype, config: dict[str, int] | None) -> dict[str, int]:
    return dict(config or configs[0 if dtype.itemsize == 2 else 1])


def _rows(x: Tensor, initial_state: Tensor | None) -> tuple[Tensor, int]:
    """The inputs after the state, contiguous, and the number of inputs in the state."""
    if initial_state is None:
        return x.contiguous(), 0
    return torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1), initial_state.shape[2]


def _span(length: int, programs: int) -> int:
    """Positions per program that sums, a multiple of `SPAN`; ``programs`` is the number of programs per span."""
    spans = triton.cdiv(PROGRAMS, programs)
    return SPAN * triton.cdiv(length, SPAN * min(spans, triton.cdiv(length, SPAN)))


def _convolve(
    rows: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    documents: Tensor | None,
    length: int,
    before: int,
    backwards: bool,
    config: dict[str, int] | None,
) -> Tensor:
    (b, inputs, c), (groups, k) = rows.shape, taps.shape
    outputs = length + before if backwards else length
    out = torch.empty(b, outputs, c, dtype=rows.dtype, device=rows.device)
    taps, bias = taps.float(), None if bias is None else bias.contiguous()
    common = (documents, out, length, inputs, before, c)
    if c // groups < SHARED:
        config = _config(SHIFT_CONFIGS, rows.dtype, config)
        grid = (b * triton.cdiv(outputs, config["BLOCK_T"]), triton.cdiv(c, config["BLOCK_C"]))
        _shift_kernel[grid](rows, taps.t().contiguous(), bias, *common, groups, k, backwards, **config, **FUSED)
        return out
    config = _config(MATRIX_CONFIGS, rows.dtype, config)
    wide = min(config["COLUMNS"], triton.next_power_of_2(c // groups))
    if documents is not None:
        config["COLUMNS"] = wide
    together = config["BLOCK_I"] * config["COLUMNS"] // wide
    grid = (b * triton.cdiv(outputs, together), groups * triton.cdiv(c // groups, wide))
    _matrix_kernel[grid](
        rows,
        taps.contiguous(),
        bias,
        *common,
        k,
        backwards,
        c // groups,
        wide,
        PRECISION=_precision(rows.dtype),
        **config,
        **FUSED,
    )
    return out


def _diagonals(sums: Tensor, k: int) -> Tensor:
    """The sums over entries whose i - j is 0 to k - 1: (g, blocks, i, j), with the last block of j first, to (g, k)."""
    by_input = sums.flip(1).transpose(1, 2).flatten(2)  # (g, i, all j); the last inputs are at the outputs' positions
    rows, columns = by_input.shape[1:]
    skewed = F.pad(by_input.flip(2), (0, rows)).flatten(1)[:, :-rows].unflatten(1, (rows, columns + rows - 1))
    return skewed.sum(1)[:, rows - 1 : rows - 1 + k]


def toeplitz_conv_fwd(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    config: dict[str, int] | None = None,
) -> Tensor:
    """The convolution; ``config`` is one of `MATRIX_CONFIGS` if `SHARED` channels share a filter, else of
    `SHIFT_CONFIGS`."""
    rows, before = _rows(x, initial_state)
    return _convolve(rows, taps, bias, documents, x.shape[1], before, False, config)


def toeplitz_conv_bwd(
    grad_y: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    wanted: Sequence[bool] = (True,) * 4,
    config: dict[str, int] | None = None,
    sum_config: dict[str, int] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, taps, bias and initial_state; ``sum_config`` is one of `SUM_CONFIGS` or `MATRIX_CONFIGS`."""
    (b, l, c), (groups, k) = x.shape, taps.shape
    rows, before = _rows(x, initial_state)
    inputs, grad_y = rows.shape[1], grad_y.to(x.dtype).contiguous()
    of_x, of_taps, of_bias, of_state = wanted
    grad_x = grad_state = grad_taps = grad_bias = None
    if of_x or of_state:
        grad_rows = _convolve(grad_y, taps, bias, documents, l, before, True, config)
        grad_state, grad_x = grad_rows[:, :before].transpose(1, 2), grad_rows[:, before:]
    if not of_taps:
        pass
    elif c // groups < SHARED:
        sum_config = sum_config or SUM_CONFIGS[0 if k > 8 else 1]
        parts = triton.cdiv(c, sum_config["BLOCK_C"]), triton.cdiv(k, sum_config["BLOCK_M"])
        span = _span(l, b * parts[0] * parts[1])
        spans = b * triton.cdiv(l, span)
        sums = torch.empty(spans, k, c, dtype=torch.float32, device=x.device)
        _shift_sums_kernel[spans, *parts](
            rows, grad_y, documents, sums, l, inputs, before, c, span, k, **sum_config, **FUSED
        )
        by_channel = sums.sum(0)  # (k, c)
        grad_taps = by_channel.unflatten(1, (groups, -1)).sum(2).t()
    else:
        sum_config = _config(MATRIX_CONFIGS, x.dtype, sum_config)
        wide = min(sum_config.pop("COLUMNS"), triton.next_power_of_2(c // groups))
        block_i, block_j = sum_config["BLOCK_I"], sum_config["BLOCK_J"]
        blocks = triton.cdiv(block_i + k - 1, block_j)
        span = _span(l, b * groups * blocks)
        spans = b * triton.cdiv(l, span)
        sums = torch.empty(spans, groups, blocks, block_i, block_j, dtype=torch.float32, device=x.device)
        _matrix_sums_kernel[spans, groups, blocks](
            rows,
            grad_y,
            documents,
            sums,
            l,
            inputs,
            before,
            c,
            span,
            k,
            c // groups,
            wide,
            PRECISION=_precision(x.dtype),
            **sum_config,
            **FUSED,
        )
        grad_taps = _diagonals(sums.sum(0), k)
    if of_bias:
        grad_bias = (grad_y.float() * x).sum((0, 1))
    return grad_x, grad_taps, grad_bias, grad_state


def aot_specs() -> list[KernelSpec]:
    """Every kernel, forward and backward, with few and many taps, for all dtypes; once with bias and documents."""
    specs = []
    types = {"documents": "*i32", "sums": "*fp32", "taps": "*fp32", "bias": "*fp32", "channels": "i32:16"}
    precisions = {"bf16": "bf16x6", "fp32": "bf16x6", "fp16": "bf16x3"}
    for dtype, taps, everything in (
        ("bf16", 7, False),
        ("bf16", 128, False),
        ("fp16", 128, False),
        ("bf16", 128, True),
        ("fp32", 128, False),
    ):
        place = int(dtype == "fp32")
        for kernel, config, backwards in (
            (_shift_kernel, SHIFT_CONFIGS[place], False),
            (_shift_kernel, SHIFT_CONFIGS[place], True),
            (_shift_sums_kernel, SUM_CONFIGS[0 if taps > 8 else 1], None),
            (_matrix_kernel, MATRIX_CONFIGS[place], False),
            (_matrix_kernel, MATRIX_CONFIGS[place], True),
            (_matrix_sums_kernel, MATRIX_CONFIGS[place], None),
        ):
            wide = 16 if everything or taps < 128 else config.get("COLUMNS")
            given: dict[str, object] = {"TAPS": taps, "REVERSED": backwards, "GROUP": wide, "WIDE": wide}
            given |= {"PRECISION": precisions[dtype], **config}
            if everything:
                given["COLUMNS"] = 16
            else:
                given |= {"bias": None, "documents": None}
            constexprs = {name: value for name, value in given.items() if name in kernel.arg_names}
            signature = {
                name: "constexpr"
                if name in constexprs
                else types.get(name, f"*{dtype}" if name in ("rows", "grad_y", "out") else "i32")
                for name in kernel.arg_names
            }
            way = "" if backwards is None else " backward" if backwards else " forward"
            model = "Evo 2 7B, " if dtype == "bf16" and wide == 16 else ""
            label = f"{model}{dtype} {taps} taps{way}{' bias documents' if everything else ''}"
            specs.append(KernelSpec(kernel, signature, constexprs, config["num_warps"], config["num_stages"], label))
    return specs
