"""The selective scan in Triton, forward and backward.

Letters: b batch, l length, c channels, n state, s segments of the length.

A program is one warp on one row and one block of channels, and walks along time in tiles of a few tokens. A tile is a
tuple of (channels,) vectors, one per token, so every thread has the whole recurrence of its channels in registers: no
scan across threads, no shared memory, no barrier inside a tile. The outer loop is over the rows n of the state: for
each row, the tile's tokens are computed one after another. delta, x and the output stay in registers; the row's current
value is kept in a small scratch tensor, which stays in the cache. So a state may have any size.

The forward is limited by one exp2 for each token, channel and state, since an H100 computes eight times fewer of them
than multiply-adds. The other five instructions overlap with it, and memory is read once. All loads of a tile precede
its arithmetic, so that their latencies overlap. The backward takes the chunks of `CHUNK` tokens in reverse. For each,
it recomputes the states at the starts of the tiles (in scratch again), and then takes the tiles in reverse, with a
tile's states in registers. dB and dC are sums over channels: a program writes the sums over its own channels, and torch
adds those of all blocks, which is deterministic.

If rows and channels are too few to fill the GPU, the length is cut into segments that run in parallel. A first pass
(``SUMMARY``) computes each segment's final state from an empty start, and the product of its decays; the second pass
computes each segment's start from those of the segments before it.

The number of channels and the strides between tokens are constants of the kernels, since a model has only one of each:
as arguments, their multiples by the tokens of a tile would fill the registers. The length is an ordinary argument.
There is no autotuning: the shape alone chooses the configuration, so results repeat exactly.
"""

# to mypy, a tuple that grows in a kernel has another type at each length
# mypy: disable-error-code="assignment,var-annotated"

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec
from hf_archs_mamba.ops.selective_scan_portable import BLOCK

CHUNK = BLOCK  # tokens between two states that are kept for the backward

# With 64 channels per block, a thread has two, which halves the loads of B and C, and the sums over channels, for each.
# Blocks of 32 are for narrow models. Tiles of 8 tokens leave registers for several programs per multiprocessor. The
# last config is for decoding.
CONFIGS = [
    {"BLOCK_C": 64, "T": 8, "num_warps": 1},
    {"BLOCK_C": 32, "T": 8, "num_warps": 1},
    {"BLOCK_C": 64, "T": 1, "num_warps": 1},
]


# Arguments that change with the length or the batch: Triton would compile again for a 1 and for multiples of 16.
LENGTHS = ["length", "batch", "segment", "segments", "B_b", "B_n", "C_b", "C_n"]


@triton.jit
def _softplus(v):
    # log1p(e) = 2 atanh(e / (2 + e)) by its series, since log(1 + e) would lose the digits of a small e
    e = tl.exp(-tl.abs(v))
    r = e / (2.0 + e)
    q = r * r
    series = 1.0 / 15 + q * (1.0 / 17)
    series = 1.0 / 13 + q * series
    series = 1.0 / 11 + q * series
    series = 1.0 / 9 + q * series
    series = 1.0 / 7 + q * series
    series = 1.0 / 5 + q * series
    series = 1.0 / 3 + q * series
    return tl.maximum(v, 0.0) + 2.0 * r * (1.0 + q * series)


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _here(in_c, t, length):
    """The mask of the channels at token t: all False from ``length`` on."""
    # not `in_c & (t < length)`: the interpreter of Triton 3.9 rejects the dtype of a mask combined with a scalar
    return tl.where(t < length, in_c, False)


@triton.jit
def _delta(dt, bias, real, mask):
    """softplus(dt + bias) at real tokens, 0 at pads and beyond the end."""
    return tl.where(real & mask, _softplus(_load(dt, mask) + bias), 0.0)


@triton.jit
def _goes_on(seq_idx, t, limit):
    """0 if a document begins at token t (never at position 0 or at a pad), else 1."""
    inside = (t > 0) & (t < limit)
    document = tl.load(seq_idx + t, mask=inside, other=0)
    return tl.where(document == tl.load(seq_idx + t - 1, mask=inside, other=0), 1.0, 0.0)


@triton.jit
def _decay(delta, A, goes_on, PACKED: tl.constexpr):
    a = tl.exp2(delta * A)
    if PACKED:
        a *= goes_on
    return a


@triton.jit(do_not_specialize=LENGTHS)
def _selective_scan_fwd_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial,
    seq_idx,
    lengths,
    y,  # (b, l, c)
    final,  # (b, c, n)
    kept,  # (l / CHUNK, b, n, c), or None
    running,  # (s, b, n, c): the current state; in a summary, at last the final state of each segment
    ends,  # (s, b, n, c): the final states from the summaries
    products,  # (s, b, n, c): the products of the segments' decays, from the summaries
    length,
    channels: tl.constexpr,
    state,
    batch,
    segment,  # tokens, a multiple of CHUNK
    x_b,
    x_l: tl.constexpr,
    x_c,
    dt_b,
    dt_l: tl.constexpr,
    dt_c,
    z_b,
    z_l: tl.constexpr,
    z_c,
    B_b,
    B_n,
    C_b,
    C_n,
    A_c,
    A_n,
    initial_b,
    initial_c,
    initial_n,
    SUMMARY: tl.constexpr,
    CHUNK: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    PACKED: tl.constexpr = seq_idx is not None
    BLOCKS: tl.constexpr = (channels + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (tl.program_id(0) // BLOCKS).to(tl.int64)
    s = tl.program_id(1)
    in_c = c < channels
    first = s * segment
    last = tl.minimum(first + segment, length)
    limit = length
    if lengths is not None:
        limit = tl.load(lengths + b).to(tl.int32)
    if PACKED:
        seq_idx += b * length
    row = tl.cast(state, tl.int64) * channels  # elements of one state
    x += b * x_b + c * x_c
    dt += b * dt_b + c * dt_c
    B += b * B_b
    C += b * C_b
    A += c * A_c
    if z is not None:
        z += b * z_b + c * z_c
    y += b * length * channels + c
    running += (s * batch + b) * row + c
    d = tl.zeros([BLOCK_C], tl.float32)
    if D is not None:
        d = _load(D + c, in_c)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if dt_bias is not None:
        bias = _load(dt_bias + c, in_c)

    for n in range(state):
        h = tl.zeros([BLOCK_C], tl.float32)
        if not SUMMARY:
            if initial is not None:
                h = _load(initial + b * initial_b + c * initial_c + n * initial_n, in_c)
            for e in range(s):
                at = (e * batch + b) * row + n * channels + c
                h = _load(products + at, in_c) * h + _load(ends + at, in_c)
        tl.store(running + n * channels, h, mask=in_c)
    tl.debug_barrier()  # since a thread may read a value that another one wrote

    total = tl.zeros([BLOCK_C], tl.float32)  # of delta
    alive = 1.0  # 0 after a document began
    for t0 in range(first, last, T):
        at = tl.cast(t0, tl.int64)
        x_tile = x + at * x_l
        dt_tile = dt + at * dt_l
        if z is not None:
            z_tile = z + at * z_l
        y_tile = y + at * channels
        deltas = ()
        inputs = ()
        outputs = ()
        goes_on = ()
        for i in tl.static_range(T):
            here = _here(in_c, t0 + i, length)
            delta = _delta(dt_tile + i * dt_l, bias, t0 + i < limit, here)
            value = _load(x_tile + i * x_l, here)
            deltas += (delta,)
            inputs += (delta * value,)
            outputs += (d * value,)
            if PACKED:
                goes_on += (_goes_on(seq_idx, t0 + i, limit),)
            else:
                goes_on += (1.0,)
        for n in range(state):
            A_n_row = _load(A + n * A_n, in_c) * LOG2E
            B_row = B + n * B_n + t0
            C_row = C + n * C_n + t0
            h = _load(running + n * channels, in_c)
            if kept is not None:
                boundary = tl.where(t0 % CHUNK == 0, in_c, False)
                tl.store(kept + ((t0 // CHUNK) * batch + b) * row + n * channels + c, h, mask=boundary)
            news = ()
            for i in tl.static_range(T):
                a = _decay(deltas[i], A_n_row, goes_on[i], PACKED)
                h = a * h + inputs[i] * tl.load(B_row + i).to(tl.float32)
                if not SUMMARY:
                    news += (outputs[i] + h * tl.load(C_row + i).to(tl.float32),)
            if not SUMMARY:
                outputs = news
            tl.store(running + n * channels, h, mask=in_c)
        for i in tl.static_range(T):
            here = _here(in_c, t0 + i, length)
            if SUMMARY:
                total += deltas[i]
                if PACKED:
                    alive *= goes_on[i]
            else:
                out = outputs[i]
                if z is not None:
                    gate = _load(z_tile + i * z_l, here)
                    out = out * gate * tl.sigmoid(gate)
                tl.store(y_tile + i * channels, out, mask=here)
        tl.debug_barrier()

    for n in range(state):
        if SUMMARY:
            product = alive * tl.exp2(total * _load(A + n * A_n, in_c) * LOG2E)
            tl.store(products + (s * batch + b) * row + n * channels + c, product, mask=in_c)
        elif last == length:
            h = _load(running + n * channels, in_c)
            tl.store(final + (b * channels + c) * state + n, h, mask=in_c)


@triton.jit(do_not_specialize=LENGTHS)
def _selective_scan_bwd_kernel(
    dy,
    d_final,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    seq_idx,
    lengths,
    kept,  # (l / CHUNK, b, n, c)
    dx,  # (b, l, c), like ddt and dz; this and the next seven may be None
    ddt,
    dz,
    dA,  # (s, b, n, c)
    dB,  # (blocks of channels, b, n, l padded), like dC
    dC,
    dD,  # (s, b, c), like d_bias
    d_bias,
    starts,  # (s, b, CHUNK / T + 1, n, c): states at the starts of a chunk's tiles
    running,  # (s, b, n, c): the gradient of the state; at the end, of the state before the segment
    ends,  # (s, b, n, c): the gradients of the states before the segments, from the summaries
    products,  # (s, b, n, c)
    length,
    channels: tl.constexpr,
    state,
    batch,
    segment,
    segments,
    x_b,
    x_l: tl.constexpr,
    x_c,
    dt_b,
    dt_l: tl.constexpr,
    dt_c,
    z_b,
    z_l: tl.constexpr,
    z_c,
    B_b,
    B_n,
    C_b,
    C_n,
    A_c,
    A_n,
    d_final_b,
    d_final_c,
    d_final_n,
    SUMMARY: tl.constexpr,
    CHUNK: tl.constexpr,
    T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    PACKED: tl.constexpr = seq_idx is not None
    TILES: tl.constexpr = CHUNK // T
    BLOCKS: tl.constexpr = (channels + BLOCK_C - 1) // BLOCK_C
    block = (tl.program_id(0) % BLOCKS).to(tl.int64)
    c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (tl.program_id(0) // BLOCKS).to(tl.int64)
    s = tl.program_id(1)
    in_c = c < channels
    first = s * segment
    last = tl.minimum(first + segment, length)
    limit = length
    if lengths is not None:
        limit = tl.load(lengths + b).to(tl.int32)
    if PACKED:
        seq_idx += b * length
    row = tl.cast(state, tl.int64) * channels
    if dy is not None:
        dy += b * length * channels + c
    x += b * x_b + c * x_c
    dt += b * dt_b + c * dt_c
    B += b * B_b
    C += b * C_b
    A += c * A_c
    if z is not None:
        z += b * z_b + c * z_c
    if dz is not None:
        dz += b * length * channels + c
    if dx is not None:
        dx += b * length * channels + c
    if ddt is not None:
        ddt += b * length * channels + c
    padded = tl.cdiv(length, T) * T
    if dB is not None:
        dB += (block * batch + b) * state * padded
    if dC is not None:
        dC += (block * batch + b) * state * padded
    if dA is not None:
        dA += (s * batch + b) * row + c
    starts += (s * batch + b) * (TILES + 1) * row + c
    running += (s * batch + b) * row + c
    d = tl.zeros([BLOCK_C], tl.float32)
    if D is not None:
        d = _load(D + c, in_c)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if dt_bias is not None:
        bias = _load(dt_bias + c, in_c)
    dd = tl.zeros([BLOCK_C], tl.float32)
    d_bias_sum = tl.zeros([BLOCK_C], tl.float32)

    for n in range(state):
        q = tl.zeros([BLOCK_C], tl.float32)
        if not SUMMARY:
            if d_final is not None:
                q = _load(d_final + b * d_final_b + c * d_final_c + n * d_final_n, in_c)
            for e in range(segments - 1 - s):
                at = ((segments - 1 - e) * batch + b) * row + n * channels + c
                q = _load(products + at, in_c) * q + _load(ends + at, in_c)
            if dA is not None:
                tl.store(dA + n * channels, tl.zeros([BLOCK_C], tl.float32), mask=in_c)
        tl.store(running + n * channels, q, mask=in_c)
    tl.debug_barrier()

    total = tl.zeros([BLOCK_C], tl.float32)
    alive = 1.0
    chunks = tl.cdiv(last - first, CHUNK)
    for k in range(chunks):
        chunk = first + (chunks - 1 - k) * CHUNK
        tiles = tl.cdiv(tl.minimum(CHUNK, last - chunk), T)

        if not SUMMARY:
            # Forwards: the states at the starts of the tiles, and the gradients of C, D and z.
            for n in range(state):
                h = _load(kept + ((chunk // CHUNK) * batch + b) * row + n * channels + c, in_c)
                tl.store(starts + n * channels, h, mask=in_c)
            tl.debug_barrier()
            for tile in range(tiles):
                t0 = chunk + tile * T
                at = tl.cast(t0, tl.int64)
                deltas = ()
                inputs = ()
                goes_on = ()
                grads = ()  # of C h + D x
                outputs = ()  # C h + D x
                for i in tl.static_range(T):
                    here = _here(in_c, t0 + i, length)
                    delta = _delta(dt + at * dt_l + i * dt_l, bias, t0 + i < limit, here)
                    value = _load(x + at * x_l + i * x_l, here)
                    deltas += (delta,)
                    inputs += (delta * value,)
                    outputs += (d * value,)
                    if dy is not None:
                        grad = _load(dy + at * channels + i * channels, here)
                    else:
                        grad = tl.zeros([BLOCK_C], tl.float32)
                    if z is not None:
                        gate = _load(z + at * z_l + i * z_l, here)
                        grad = grad * gate * tl.sigmoid(gate)
                    grads += (grad,)
                    dd += grad * value
                    if PACKED:
                        goes_on += (_goes_on(seq_idx, t0 + i, limit),)
                    else:
                        goes_on += (1.0,)
                for n in range(state):
                    A_n_row = _load(A + n * A_n, in_c) * LOG2E
                    B_row = B + n * B_n + t0
                    C_row = C + n * C_n + t0
                    h = _load(starts + tile * row + n * channels, in_c)
                    news = ()
                    for i in tl.static_range(T):
                        a = _decay(deltas[i], A_n_row, goes_on[i], PACKED)
                        h = a * h + inputs[i] * tl.load(B_row + i).to(tl.float32)
                        if dC is not None:  # a sum over this program's channels
                            tl.store(dC + n * padded + t0 + i, tl.sum(h * grads[i]))
                        if dz is not None:
                            news += (outputs[i] + h * tl.load(C_row + i).to(tl.float32),)
                    if dz is not None:
                        outputs = news
                    tl.store(starts + (tile + 1) * row + n * channels, h, mask=in_c)
                if dz is not None:
                    for i in tl.static_range(T):
                        here = _here(in_c, t0 + i, length)
                        gate = _load(z + at * z_l + i * z_l, here)
                        sigmoid = tl.sigmoid(gate)
                        d_gate = outputs[i] * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                        if dy is not None:
                            d_gate *= _load(dy + at * channels + i * channels, here)
                        else:
                            d_gate *= 0.0
                        tl.store(dz + at * channels + i * channels, d_gate, mask=here)
                tl.debug_barrier()

        # Backwards: the gradient of the state, and the other gradients, which depend on it.
        for back in range(tiles):
            tile = tiles - 1 - back
            t0 = chunk + tile * T
            at = tl.cast(t0, tl.int64)
            deltas = ()
            inputs = ()
            goes_on = ()
            grads = ()
            d_inputs = ()  # of delta x
            d_deltas = ()  # of delta, through the decay
            for i in tl.static_range(T):
                here = _here(in_c, t0 + i, length)
                delta = _delta(dt + at * dt_l + i * dt_l, bias, t0 + i < limit, here)
                deltas += (delta,)
                if dy is not None:
                    grad = _load(dy + at * channels + i * channels, here)
                else:
                    grad = tl.zeros([BLOCK_C], tl.float32)
                if z is not None:
                    gate = _load(z + at * z_l + i * z_l, here)
                    grad = grad * gate * tl.sigmoid(gate)
                grads += (grad,)
                if not SUMMARY:
                    inputs += (delta * _load(x + at * x_l + i * x_l, here),)
                    d_inputs += (tl.zeros([BLOCK_C], tl.float32),)
                    d_deltas += (tl.zeros([BLOCK_C], tl.float32),)
                if PACKED:
                    goes_on += (_goes_on(seq_idx, t0 + i, limit),)
                else:
                    goes_on += (1.0,)

            for n in range(state):
                A_n_row = _load(A + n * A_n, in_c) * LOG2E
                B_row = B + n * B_n + t0
                C_row = C + n * C_n + t0
                q = _load(running + n * channels, in_c)  # the gradient of the state after the tile
                decays = ()
                befores = ()  # a h: the decayed state of the token before
                if not SUMMARY:
                    h = _load(starts + tile * row + n * channels, in_c)
                for i in tl.static_range(T):
                    a = _decay(deltas[i], A_n_row, goes_on[i], PACKED)
                    decays += (a,)
                    if not SUMMARY:
                        befores += (a * h,)
                        h = befores[i] + inputs[i] * tl.load(B_row + i).to(tl.float32)
                d_A = tl.zeros([BLOCK_C], tl.float32)
                new_inputs = ()
                new_deltas = ()
                for i in tl.static_range(T - 1, -1, -1):
                    g = grads[i] * tl.load(C_row + i).to(tl.float32) + q  # the gradient of h_i
                    if not SUMMARY:
                        if dB is not None:
                            tl.store(dB + n * padded + t0 + i, tl.sum(g * inputs[i]))
                        by_exponent = g * befores[i]
                        new_inputs = (d_inputs[i] + g * tl.load(B_row + i).to(tl.float32),) + new_inputs  # noqa: RUF005
                        new_deltas = (d_deltas[i] + by_exponent * A_n_row,) + new_deltas  # noqa: RUF005
                        d_A += by_exponent * deltas[i]
                    q = g * decays[i]
                if not SUMMARY:
                    d_inputs = new_inputs
                    d_deltas = new_deltas
                    if dA is not None:
                        tl.store(dA + n * channels, _load(dA + n * channels, in_c) + d_A, mask=in_c)
                tl.store(running + n * channels, q, mask=in_c)

            for i in tl.static_range(T):
                here = _here(in_c, t0 + i, length)
                if SUMMARY:
                    total += deltas[i]
                    if PACKED:
                        alive *= goes_on[i]
                else:
                    value = _load(x + at * x_l + i * x_l, here)
                    if dx is not None:
                        tl.store(dx + at * channels + i * channels, d_inputs[i] * deltas[i] + d * grads[i], mask=here)
                    d_delta = d_deltas[i] * LN2 + d_inputs[i] * value  # A_n_row has log2(e) in it
                    raw = _load(dt + at * dt_l + i * dt_l, here) + bias
                    d_dt = tl.where(t0 + i < limit, d_delta * tl.sigmoid(raw), 0.0)
                    d_bias_sum += d_dt
                    if ddt is not None:
                        tl.store(ddt + at * channels + i * channels, d_dt, mask=here)
            tl.debug_barrier()

    if SUMMARY:
        for n in range(state):
            product = alive * tl.exp2(total * _load(A + n * A_n, in_c) * LOG2E)
            tl.store(products + (s * batch + b) * row + n * channels + c, product, mask=in_c)
    else:
        if dD is not None:
            tl.store(dD + (s * batch + b) * channels + c, dd, mask=in_c)
        if d_bias is not None:
            tl.store(d_bias + (s * batch + b) * channels + c, d_bias_sum, mask=in_c)


def _config(channels: int, length: int) -> dict[str, int]:
    if length == 1:
        return CONFIGS[2]
    return CONFIGS[0] if channels > 32 else CONFIGS[1]


def _segmentation(programs: int, length: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a segment and the number of segments: one, unless the programs are too few for the GPU."""
    if device.type != "cuda":
        return length, 1
    # Eight warps on each of an H100's multiprocessors hide most latencies. Segments cost the exponentials a second
    # time, so they pay from three segments on, of at least four chunks.
    wanted = 8 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    number = min(wanted, length // (4 * CHUNK), 64)
    if number < 3:
        return length, 1
    segment = CHUNK * math.ceil(length / number / CHUNK)
    return segment, math.ceil(length / segment)


def _strides(names: str, *tensors: Tensor | None) -> dict[str, int]:
    """The strides as arguments: ``x_b=..., x_l=..., x_c=...`` for ``x_of_blc``; zeros for a tensor that is None."""
    strides = {}
    for name, t in zip(names.split(), tensors):
        tensor, dims = name.split("_of_")
        for i, dim in enumerate(dims):
            strides[f"{tensor}_{dim}"] = 0 if t is None else t.stride(i)
    return strides


def _arranged(A: Tensor, B: Tensor, C: Tensor, length: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and C in the layout of the kernels. For one token nothing is copied.

    A, (c, n), gets neighbouring channels adjacent in memory. B and C become (b, n, l), so that a tile's tokens are
    adjacent, and are padded with zeros to whole tiles, so that they need no mask.
    """
    if length > 1:
        A = A.t().contiguous().t()
    B, C = (F.pad(t.transpose(1, 2), (0, -length % tile)) for t in (B, C))
    if length > 1:
        B, C = B.contiguous(), C.contiguous()
    return A, B, C


def selective_scan_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    keep_states: bool,
    *,
    config: dict[str, int] | None = None,
    segment: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `selective_scan_portable.selective_scan_fwd`. ``config`` and ``segment`` (tokens, a multiple of `CHUNK`)
    override the choice by shape."""
    (b, l, c), n = x.shape, A.shape[1]
    config = config or _config(c, l)
    blocks = triton.cdiv(c, config["BLOCK_C"])
    if segment is None:
        segment, segments = _segmentation(blocks * b, l, x.device)
    else:
        segments = triton.cdiv(l, segment)
    A, B, C = _arranged(A, B, C, l, config["T"])
    D, dt_bias, seq_idx, lengths = (None if t is None else t.contiguous() for t in (D, dt_bias, seq_idx, lengths))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty(b, c, n, dtype=torch.float32)
    kept = x.new_empty((triton.cdiv(l, CHUNK), b, n, c) if keep_states else 0, dtype=torch.float32)
    running, ends, products = (x.new_empty(segments, b, n, c, dtype=torch.float32) for _ in range(3))

    def launch(running: Tensor, summary: bool) -> None:
        _selective_scan_fwd_kernel[(blocks * b, segments)](
            x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, lengths,
            y, final_state, kept if keep_states and not summary else None, running, ends, products,
            l, c, n, b, segment,
            **_strides(
                "x_of_blc dt_of_blc z_of_blc B_of_bn C_of_bn A_of_cn initial_of_bcn", x, dt, z, B, C, A, initial_state
            ),
            SUMMARY=summary, CHUNK=CHUNK, **config, **FUSED,
        )  # fmt: skip

    with torch.cuda.device_of(x):  # Triton launches on the current device
        if segments > 1:
            launch(ends, True)
        launch(running, False)
    return y, final_state, kept.flatten()


def selective_scan_bwd(
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
    kept: Tensor,
    wanted: Sequence[bool] = (True,) * 9,
    *,
    config: dict[str, int] | None = None,
    segment: int | None = None,
) -> tuple[Tensor | None, ...]:
    """As `selective_scan_portable.selective_scan_bwd`, but gradients that are not wanted are None, except for the
    initial state's. ``config`` and ``segment`` as in `selective_scan_fwd`."""
    of_x, of_dt, of_A, of_B, of_C, of_D, of_z, of_bias, _ = wanted
    (b, l, c), n = x.shape, A.shape[1]
    config = config or _config(c, l)
    blocks = triton.cdiv(c, config["BLOCK_C"])
    if segment is None:
        segment, segments = _segmentation(blocks * b, l, x.device)
    else:
        segments = triton.cdiv(l, segment)
    A, B, C = _arranged(A, B, C, l, config["T"])
    D, dt_bias, seq_idx, lengths = (None if t is None else t.contiguous() for t in (D, dt_bias, seq_idx, lengths))
    grad_y = None if grad_y is None else grad_y.contiguous()
    dx, ddt, dz = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if asked and t is not None else None
        for t, asked in ((x, of_x), (dt, of_dt), (z, of_z))
    )

    def scratch(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    running, ends, products = (scratch(segments, b, n, c) for _ in range(3))
    dA = scratch(segments, b, n, c) if of_A else None
    dB, dC = (scratch(blocks, b, n, B.shape[2]) if asked else None for asked in (of_B, of_C))
    dD, d_bias = (scratch(segments, b, c) if asked else None for asked in (of_D, of_bias))
    starts = scratch(segments, b, CHUNK // config["T"] + 1, n, c)

    def launch(running: Tensor, summary: bool) -> None:
        _selective_scan_bwd_kernel[(blocks * b, segments)](
            grad_y, grad_final_state, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, kept,
            dx, ddt, dz, dA, dB, dC, dD, d_bias, starts, running, ends, products,
            l, c, n, b, segment, segments,
            **_strides(
                "x_of_blc dt_of_blc z_of_blc B_of_bn C_of_bn A_of_cn d_final_of_bcn",
                x, dt, z, B, C, A, grad_final_state,
            ),
            SUMMARY=summary, CHUNK=CHUNK, **config, **FUSED,
        )  # fmt: skip

    with torch.cuda.device_of(x):  # Triton launches on the current device
        if segments > 1:
            launch(ends, True)
        launch(running, False)
    return (
        dx,
        ddt,
        None if dA is None else dA.sum((0, 1)).t(),
        *(None if t is None else t.sum(0)[:, :, :l].transpose(1, 2) for t in (dB, dC)),
        None if dD is None else dD.sum((0, 1)),
        dz,
        None if d_bias is None else d_bias.sum((0, 1)),
        running[0].transpose(1, 2),
    )


def aot_specs() -> list[KernelSpec]:
    """Both kernels with every configuration, for `hf_archs.kernels.aot`."""
    activations = ["x", "dt", "z", "B", "C", "dy", "y", "dx", "ddt", "dz"]
    specs = []
    for kernel in (_selective_scan_fwd_kernel, _selective_scan_bwd_kernel):
        for config, dtype, packed, summary in (
            (CONFIGS[0], "bf16", False, False),
            (CONFIGS[0], "bf16", True, False),
            (CONFIGS[0], "bf16", True, True),
            (CONFIGS[0], "fp32", True, False),
            (CONFIGS[1], "bf16", True, False),
            (CONFIGS[2], "bf16", False, False),
        ):
            given: dict[str, object] = {"SUMMARY": summary, "CHUNK": CHUNK, "T": config["T"]}
            given |= {"channels": 1536, "x_l": 1536, "dt_l": 1536, "z_l": 3072}
            given |= {"BLOCK_C": config["BLOCK_C"]} | {f"{t}_c": 1 for t in ("x", "dt", "z", "A")}
            if not packed:
                given |= {"seq_idx": None, "lengths": None}
            signature = {}
            for name in kernel.arg_names:
                if name in given:
                    signature[name] = "constexpr"
                elif name in activations:
                    signature[name] = f"*{dtype}"
                elif name in ("seq_idx", "lengths"):
                    signature[name] = "*i64"
                elif name in LENGTHS:
                    signature[name] = "i32"
                elif name == "state" or name[-2:] in ("_b", "_l", "_c", "_n"):
                    signature[name] = "i32:16"
                else:
                    signature[name] = "*fp32"
            constexprs = {name: value for name, value in given.items() if name in signature}
            label = f"Mamba-130m, {dtype} {config['BLOCK_C']} x {config['T']}"
            label += ", packed" * packed + ", summary" * summary
            specs.append(KernelSpec(kernel, signature, constexprs, config["num_warps"], num_stages=3, label=label))
    return specs
