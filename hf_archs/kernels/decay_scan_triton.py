"""`decay_scan` in Triton, forward and backward.

The sequence is cut into chunks of 128 tokens. Besides the sums of the decays, the forward is three kernels: the first
computes the contribution of each chunk to the state, all chunks in parallel; the second passes the states from chunk to
chunk, elementwise, and is the only sequential one; the third computes the outputs, again all chunks in parallel. The
backward does the same in the other direction.

Why it should be fast: nearly all the work is matrix products of tiles of at most 64 by 256, whatever the key and value
dimensions, so no accumulator outgrows the registers (`aot_specs` shows it). Most memory traffic is that of the states
between chunks. States of 128 by 64 are 256 bytes per token and head each time they are read or written; with chunks of
64 tokens they would be twice that, and in a chunk of 128 the pairs of tokens are still less work than the states.
Gradients of q and k are summed over the heads of a group in registers, not in memory.

If no gradient of the decays is needed, as in RetNet, the backward leaves out its sums in float64, which take as many
registers as all else.

Why it is exact: inputs of 16 bits are multiplied as they are and summed in float32. Computed factors (decayed weights,
states) are float32. A product whose result stays in float32 takes such a factor as three bfloat16 terms, which hold all
of its bits; a product whose result is rounded to 16 bits takes one term. Products of float32 inputs are made of six
bfloat16 products ("bf16x6"): as exact as float32, several times faster than the float32 units, and the same on NVIDIA
and AMD. Decays are sums in float64, stored as two float32, since differences of float32 sums lose the digits of weak
decays beside strong ones. There are no atomics, so results repeat exactly.

Letters: b batch, l length, h heads, g groups of heads that share q and k, n key_dim, p value_dim, c chunks;
i tokens that read, j tokens that write. ``padded`` is the length in whole chunks. States are (c, b, h, p, n).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from hf_archs.kernels.aot import FUSED, KernelSpec

CHUNK = 128  # tokens between two kept states
ROWS = 64  # tokens of a tile; `_grad_scores_kernel` and `_grad_decays_kernel` rely on two tiles a chunk
HEADS = 4  # heads whose decays one program sums
PASSED = 1024  # elements of the state that one program passes on
PROGRAMS = 512  # enough programs to fill a large GPU
MOST_CHUNKS = 2**16 - 1  # CUDA's limit for the second dimension of a grid, which counts chunks
# Each table has a config for inputs of 16 bits, and one for float32, whose products have six terms. The dtype alone
# chooses it, so nothing is tuned at run time. A block is at most as large as its dimension.
#
# For 16 bits, four warps are one warp group of Hopper, which multiplies 64 rows at once. With eight warps on the same
# tile, each group would get half of the columns, and both would compute every weight and cut it into terms.
STATE_CONFIGS = [  # `_chunk_states_kernel`: BLOCK_P by BLOCK_N of a state, summed over ROWS tokens at once
    {"ROWS": 32, "BLOCK_N": 256, "BLOCK_P": 64, "num_warps": 4, "num_stages": 3},
    {"ROWS": 16, "BLOCK_N": 64, "BLOCK_P": 64, "num_warps": 8, "num_stages": 2},
]
OUTPUT_CONFIGS = [  # `_outputs_kernel`, `_grad_values_kernel`: BLOCK_P is large, since each block recomputes the scores
    {"COLUMNS": 64, "BLOCK_N": 32, "BLOCK_P": 128, "num_warps": 4, "num_stages": 3},
    {"COLUMNS": 32, "BLOCK_N": 16, "BLOCK_P": 64, "num_warps": 8, "num_stages": 2},
]
SCORE_CONFIGS = [  # `_grad_scores_kernel`: key and value channels that a step of its sums takes
    {"BLOCK_N": 32, "BLOCK_P": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 16, "BLOCK_P": 16, "num_warps": 8, "num_stages": 2},
]
KEY_CONFIGS = [  # `_grad_keys_kernel`: BLOCK_N of a key, summed over BLOCK_P values at once
    {"BLOCK_N": 128, "BLOCK_P": 32, "num_warps": 8, "num_stages": 3},
    {"BLOCK_N": 32, "BLOCK_P": 16, "num_warps": 8, "num_stages": 2},
]


@triton.jit
def _dot(a, b, total, FINE: tl.constexpr, PRECISION: tl.constexpr):
    """``total + a @ b``, where one factor is an input, and the other one an input or a computed float32."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        total = tl.dot(a, b, total)
    elif a.dtype == tl.bfloat16:
        term = b.to(tl.bfloat16)
        total = tl.dot(a, term, total)
        if FINE:
            b -= term.to(tl.float32)
            term = b.to(tl.bfloat16)
            total = tl.dot(a, term, total)
            total = tl.dot(a, (b - term.to(tl.float32)).to(tl.bfloat16), total)
    elif b.dtype == tl.bfloat16:
        term = a.to(tl.bfloat16)
        total = tl.dot(term, b, total)
        if FINE:
            a -= term.to(tl.float32)
            term = a.to(tl.bfloat16)
            total = tl.dot(term, b, total)
            total = tl.dot((a - term.to(tl.float32)).to(tl.bfloat16), b, total)
    else:  # a computed float32 may overflow in float16, so both become float32
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _rows(x, t, d, length, x_l, D: tl.constexpr):
    """Tokens ``t`` and columns ``d`` of x, whose tokens have the stride ``x_l``: (tokens, columns)."""
    return tl.load(x + t.to(tl.int64)[:, None] * x_l + d[None, :], (t < length)[:, None] & (d < D)[None, :], 0)


@triton.jit
def _columns(x, t, d, length, x_l, D: tl.constexpr):
    """`_rows`, transposed: (columns, tokens)."""
    return tl.load(x + t.to(tl.int64)[None, :] * x_l + d[:, None], (t < length)[None, :] & (d < D)[:, None], 0)


@triton.jit
def _document(documents, t, length):
    """The documents of tokens ``t``; positions before the first token have its document, those after the last have
    that one's."""
    return tl.load(documents + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit
def _from_start(high, low, documents, t, c, length, CHUNK: tl.constexpr):
    """The decay from the start of chunk c to tokens ``t`` of it."""
    decay = tl.exp2(tl.load(high + t) + tl.load(low + t))
    if documents is not None:
        decay = tl.where(_document(documents, t, length) == _document(documents, c * CHUNK - 1, length), decay, 0)
    return decay


@triton.jit
def _to_end(high, low, documents, t, c, length, CHUNK: tl.constexpr):
    """The decay from after tokens ``t`` to the end of their chunk c."""
    end = c * CHUNK + CHUNK - 1
    decay = tl.exp2((tl.load(high + end) - tl.load(high + t)) + (tl.load(low + end) - tl.load(low + t)))
    if documents is not None:
        decay = tl.where(_document(documents, t, length) == _document(documents, end, length), decay, 0)
    return decay


@triton.jit
def _between(high, low, documents, i, j, length):
    """The decay from after tokens ``j`` to after tokens ``i``, 0 where j > i; ``i`` and ``j`` broadcast."""
    log = (tl.load(high + i) - tl.load(high + j)) + (tl.load(low + i) - tl.load(low + j))
    seen = i >= j
    if documents is not None:
        seen = seen & (_document(documents, i, length) == _document(documents, j, length))
    return tl.where(seen, tl.exp2(tl.minimum(log, 0)), 0)


@triton.jit(do_not_specialize=["length", "padded"])
def _decay_sums_kernel(
    log_decay,  # (b, l, h), strides given
    scale,  # (b, l, h), strides given, or None
    high,  # (b, h, padded): the sum of the log2 decays from the chunk's start to each token, inclusive
    low,  # (b, h, padded): the rest of this sum, which does not fit in one float32
    scales,  # (b, h, padded), or None
    length,
    padded,
    heads,
    a_b,
    a_l,
    a_h,
    s_b,
    s_l,
    s_h,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    parts = tl.cdiv(heads, HEADS)
    b = (tl.program_id(0) // parts).to(tl.int64)
    h = (tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    t = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :].to(tl.int64)
    inside = (t < length) & (h < heads)
    logs = tl.load(log_decay + b * a_b + t * a_l + h * a_h, inside, 0).to(tl.float64)
    logs *= 1.4426950408889634
    # 2 to -1100 is 0, and differences of infinities would be no numbers; not `tl.maximum`, which drops a NaN
    sums = tl.cumsum(tl.where(logs < -1100.0, -1100.0, logs), axis=1)
    place = (b * heads + h) * padded + t
    above = sums.to(tl.float32)
    tl.store(high + place, above, h < heads)
    tl.store(low + place, (sums - above.to(tl.float64)).to(tl.float32), h < heads)
    if scale is not None:
        tl.store(scales + place, tl.load(scale + b * s_b + t * s_l + h * s_h, inside, 0).to(tl.float32), h < heads)


@triton.jit(do_not_specialize=["length", "padded"])
def _chunk_states_kernel(
    keys,  # (b, l, g, n), strides given: k, or q if READS
    values,  # (b, l, h, p), strides given: v, or the gradient of y if READS
    high,
    low,
    scales,  # None if READS
    documents,  # (b, l) or None
    out,  # (c, b, h, p, n)
    length,
    padded,
    batch,
    heads,
    shared,  # heads that share a key
    k_b,
    k_l,
    k_g,
    v_b,
    v_l,
    v_h,
    N: tl.constexpr,
    P: tl.constexpr,
    READS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The contribution of each chunk to the state after it, or (READS) to the gradient of the state before it."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tile = tl.program_id(0) % (TILES_N * TILES_P)
    row = (tl.program_id(0) // (TILES_N * TILES_P)).to(tl.int64)  # of (b, h)
    c = tl.program_id(1)
    b, h = row // heads, row % heads
    n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tile // TILES_N * BLOCK_P + tl.arange(0, BLOCK_P)
    keys += b * k_b + h // shared * k_g
    values += b * v_b + h * v_h
    high += row * padded
    low += row * padded
    if scales is not None:
        scales += row * padded
    if documents is not None:
        documents += b * length

    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for first in range(0, CHUNK, ROWS):
        t = c * CHUNK + first + tl.arange(0, ROWS)
        if READS:
            weight = _from_start(high, low, documents, t, c, length, CHUNK)
        else:
            weight = _to_end(high, low, documents, t, c, length, CHUNK)
            if scales is not None:
                weight *= tl.load(scales + t)
        weighted = _columns(values, t, p, length, v_l, P).to(tl.float32) * weight[None, :]
        total = _dot(weighted, _rows(keys, t, n, length, k_l, N), total, True, PRECISION)
    place = (c * batch * heads + row) * (N * P) + p[:, None] * N + n[None, :]
    tl.store(out + place, total, (p < P)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["length", "padded", "chunks"])
def _pass_states_kernel(
    added,  # (c, b, h, p, n): the contribution of each chunk
    passed,  # (c, b, h, p, n): the state before each chunk; REVERSED: the gradient of the state after it
    first,  # (b, h, p, n): the initial state, or the gradient of the final one, or None
    last,  # (b, h, p, n): the final state, or the gradient of the initial one
    starts,  # REVERSED: the state before each chunk
    across,  # REVERSED: (tiles, b, h, c): the part of d loss / d log decay that every token of the chunk has in common
    high,
    low,
    documents,
    length,
    padded,
    chunks,
    batch,
    heads,
    STATE: tl.constexpr,
    REVERSED: tl.constexpr,
    CHUNK: tl.constexpr,
    PASSED: tl.constexpr,
):
    TILES: tl.constexpr = (STATE + PASSED - 1) // PASSED
    AHEAD: tl.constexpr = 4  # chunks that are loaded together, to overlap their latencies
    tile = tl.program_id(0) % TILES
    row = (tl.program_id(0) // TILES).to(tl.int64)  # of (b, h)
    element = tile * PASSED + tl.arange(0, PASSED)
    inside = element < STATE
    high += row * padded
    low += row * padded
    if documents is not None:
        documents += row // heads * length

    state = tl.zeros((PASSED,), tl.float32)
    if first is not None:
        state = tl.load(first + row * STATE + element, inside, 0).to(tl.float32)
    for begin in range(0, chunks, AHEAD):
        news, olds, decays = (), (), ()  # type: ignore[var-annotated]
        for ahead in tl.static_range(AHEAD):
            c = begin + ahead
            there = c < chunks
            # not `inside & there`: the interpreter of Triton 3.9 rejects the dtype of a mask combined with a scalar
            mask = tl.where(there, inside, False)
            if REVERSED:
                c = chunks - 1 - c
            place = (c * batch * heads + row) * STATE + element
            news += (tl.load(added + place, mask, 0),)  # type: ignore[assignment]
            if across is not None:
                olds += (tl.load(starts + place, mask, 0),)  # type: ignore[assignment]
            end = c * CHUNK + CHUNK - 1
            decay = tl.exp2(tl.load(high + end, there, 0) + tl.load(low + end, there, 0))
            if documents is not None:
                same = _document(documents, c * CHUNK - 1, length) == _document(documents, end, length)
                decay = tl.where(same, decay, 0)
            decays += (decay,)  # type: ignore[assignment]
        for ahead in tl.static_range(AHEAD):
            c = begin + ahead
            there = c < chunks
            if REVERSED:
                c = chunks - 1 - c
            place = (c * batch * heads + row) * STATE + element
            tl.store(passed + place, state, tl.where(there, inside, False))
            if across is not None:
                part = tl.sum(state * olds[ahead]) * decays[ahead]
                tl.store(across + (tile * batch * heads + row) * chunks + c, part, there)
            state = tl.where(there, decays[ahead] * state + news[ahead], state)
    tl.store(last + row * STATE + element, state, inside)


@triton.jit(do_not_specialize=["length", "padded"])
def _outputs_kernel(
    q,  # (b, l, g, n), strides given
    k,  # (b, l, g, n), strides given
    v,  # (b, l, h, p), strides given
    high,
    low,
    scales,
    skips,  # (h,), or None
    documents,
    starts,  # (c, b, h, p, n): the state before each chunk
    y,  # (b, l, h, p)
    length,
    padded,
    batch,
    heads,
    shared,
    q_b,
    q_l,
    q_g,
    k_b,
    k_l,
    k_g,
    v_b,
    v_l,
    v_h,
    N: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    PARTS: tl.constexpr = CHUNK // ROWS
    tile = tl.program_id(0) % (TILES_P * PARTS)
    row = (tl.program_id(0) // (TILES_P * PARTS)).to(tl.int64)  # of (b, h)
    c = tl.program_id(1)
    part = tile // TILES_P
    b, h = row // heads, row % heads
    p = tile % TILES_P * BLOCK_P + tl.arange(0, BLOCK_P)
    i = c * CHUNK + part * ROWS + tl.arange(0, ROWS)
    q += b * q_b + h // shared * q_g
    k += b * k_b + h // shared * k_g
    v += b * v_b + h * v_h
    high += row * padded
    low += row * padded
    if scales is not None:
        scales += row * padded
    if documents is not None:
        documents += b * length
    starts += (c * batch * heads + row) * (N * P)

    total = tl.zeros((ROWS, BLOCK_P), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        state = tl.load(starts + p[None, :] * N + n[:, None], (p < P)[None, :] & (n < N)[:, None], 0)
        total = _dot(_rows(q, i, n, length, q_l, N), state, total, False, PRECISION)
    total *= _from_start(high, low, documents, i, c, length, CHUNK)[:, None]
    for others in range(0, part * ROWS + ROWS, COLUMNS):
        j = c * CHUNK + others + tl.arange(0, COLUMNS)
        weight = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            weight = _dot(_rows(q, i, n, length, q_l, N), _columns(k, j, n, length, k_l, N), weight, True, PRECISION)
        weight *= _between(high, low, documents, i[:, None], j[None, :], length)
        if scales is not None:
            weight *= tl.load(scales + j)[None, :]
        total = _dot(weight, _rows(v, j, p, length, v_l, P), total, False, PRECISION)
    if skips is not None:
        total += tl.load(skips + h) * _rows(v, i, p, length, v_l, P).to(tl.float32)
    place = ((b * length + i)[:, None] * heads + h) * P + p[None, :]
    tl.store(y + place, total, (i < length)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["length", "padded"])
def _grad_values_kernel(
    q,
    k,
    grad_y,  # (b, l, h, p), strides given
    high,
    low,
    scales,
    skips,
    documents,
    grad_ends,  # (c, b, h, p, n): the gradient of the state after each chunk
    grad_v,  # (b, l, h, p)
    length,
    padded,
    batch,
    heads,
    shared,
    q_b,
    q_l,
    q_g,
    k_b,
    k_l,
    k_g,
    y_b,
    y_l,
    y_h,
    N: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES_P: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    PARTS: tl.constexpr = CHUNK // ROWS
    tile = tl.program_id(0) % (TILES_P * PARTS)
    row = (tl.program_id(0) // (TILES_P * PARTS)).to(tl.int64)  # of (b, h)
    c = tl.program_id(1)
    part = tile // TILES_P
    b, h = row // heads, row % heads
    p = tile % TILES_P * BLOCK_P + tl.arange(0, BLOCK_P)
    j = c * CHUNK + part * ROWS + tl.arange(0, ROWS)
    q += b * q_b + h // shared * q_g
    k += b * k_b + h // shared * k_g
    grad_y += b * y_b + h * y_h
    high += row * padded
    low += row * padded
    if documents is not None:
        documents += b * length
    grad_ends += (c * batch * heads + row) * (N * P)

    total = tl.zeros((ROWS, BLOCK_P), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        state = tl.load(grad_ends + p[None, :] * N + n[:, None], (p < P)[None, :] & (n < N)[:, None], 0)
        total = _dot(_rows(k, j, n, length, k_l, N), state, total, False, PRECISION)
    total *= _to_end(high, low, documents, j, c, length, CHUNK)[:, None]
    for others in range(part * ROWS, CHUNK, COLUMNS):
        i = c * CHUNK + others + tl.arange(0, COLUMNS)
        weight = tl.zeros((ROWS, COLUMNS), tl.float32)  # (j, i)
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            weight = _dot(_rows(k, j, n, length, k_l, N), _columns(q, i, n, length, q_l, N), weight, True, PRECISION)
        weight *= _between(high, low, documents, i[None, :], j[:, None], length)
        total = _dot(weight, _rows(grad_y, i, p, length, y_l, P), total, False, PRECISION)
    if scales is not None:
        total *= tl.load(scales + row * padded + j)[:, None]
    if skips is not None:
        total += tl.load(skips + h) * _rows(grad_y, j, p, length, y_l, P).to(tl.float32)
    place = ((b * length + j)[:, None] * heads + h) * P + p[None, :]
    tl.store(grad_v + place, total, (j < length)[:, None] & (p < P)[None, :])


@triton.jit(do_not_specialize=["length", "padded", "splits"])
def _grad_scores_kernel(
    q,
    k,
    v,
    grad_y,
    high,
    low,
    scales,
    documents,
    grad_scores,  # (c, splits, b, g, 3, ROWS, ROWS): of q . k, summed over the heads of a split
    # A pair's path is d loss / d log of its decay. The next three are sums over pairs, by token, or None:
    inside,  # (b, h, padded), float64: pairs in one tile, the sum where the token reads less that where it writes
    crossing,  # (b, h, padded): pairs of both tiles; the tokens of the first tile write, those of the second read
    columns,  # (b, h, padded): d loss / d scale, from the pairs in one tile
    grad_skips,  # (c, 2, b, h): the part from each tile of tokens; or None
    length,
    padded,
    batch,
    heads,
    shared,
    splits,
    q_b,
    q_l,
    q_g,
    k_b,
    k_l,
    k_g,
    v_b,
    v_l,
    v_h,
    y_b,
    y_l,
    y_h,
    N: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of pairs of tokens: tiles (0, 0), (1, 0) and (1, 1) of a chunk, for one head after another."""
    pair = tl.program_id(0) % 3
    row = tl.program_id(0) // 3  # of (splits, b, g)
    groups = heads // shared
    split, b, g = row // (batch * groups), (row // groups % batch).to(tl.int64), row % groups
    c = tl.program_id(1)
    i = c * CHUNK + (pair + 1) // 2 * ROWS + tl.arange(0, ROWS)
    j = c * CHUNK + pair // 2 * ROWS + tl.arange(0, ROWS)
    q += b * q_b + g.to(tl.int64) * q_g
    k += b * k_b + g.to(tl.int64) * k_g
    if documents is not None:
        documents += b * length

    scores = tl.zeros((ROWS, ROWS), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        scores = _dot(_rows(q, i, n, length, q_l, N), _columns(k, j, n, length, k_l, N), scores, True, PRECISION)
    total = tl.zeros((ROWS, ROWS), tl.float32)
    each = tl.cdiv(shared, splits)
    begin = split * each
    for step in range(0, tl.minimum(each, shared - begin)):
        h = g.to(tl.int64) * shared + begin + step
        line = (b * heads + h) * padded
        grad = tl.zeros((ROWS, ROWS), tl.float32)
        for first in range(0, P, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            written = _columns(v + b * v_b + h * v_h, j, p, length, v_l, P)
            wanted = _rows(grad_y + b * y_b + h * y_h, i, p, length, y_l, P)
            grad = _dot(wanted, written, grad, True, PRECISION)
        grad *= _between(high + line, low + line, documents, i[:, None], j[None, :], length)
        if grad_skips is not None:
            # the diagonal has each token's own product of v and the gradient of y, which is not decayed
            own = tl.sum(tl.sum(tl.where(i[:, None] == j[None, :], grad, 0), 1), 0)
            tl.store(grad_skips + ((c.to(tl.int64) * 2 + pair // 2) * batch + b) * heads + h, own, pair != 1)
        scale = tl.full((ROWS,), 1, tl.float32)
        if scales is not None:
            scale = tl.load(scales + line + j)
        total += grad * scale[None, :]
        if inside is not None:
            paths = grad * scores
            by_column = tl.sum(paths, 0)
            paths *= scale[None, :]
            if pair == 1:
                tl.store(crossing + line + j, by_column)
                tl.store(crossing + line + i, tl.sum(paths, 1))
            else:
                tl.store(columns + line + j, by_column)
                # The gradient of a log decay is the sum of the paths that write before it and read at or after it:
                # of all paths that read from there on, less those that write from there on. In float64, since the
                # difference loses digits.
                wide = tl.where(i[:, None] > j[None, :], paths, 0).to(tl.float64)
                tl.store(inside + line + i, tl.sum(wide, 1) - tl.sum(wide, 0))
    place = ((c.to(tl.int64) * splits * batch * groups + row) * 3 + pair) * (ROWS * ROWS)
    tl.store(grad_scores + place + tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :], total)


@triton.jit(do_not_specialize=["length", "padded", "splits"])
def _grad_keys_kernel(
    keys,  # (b, l, g, n), strides given: k, or q if READS
    others,  # (b, l, g, n), strides given: q, or k if READS
    values,  # (b, l, h, p), strides given: v, or the gradient of y if READS
    high,
    low,
    scales,  # None if READS
    documents,
    states,  # (c, b, h, p, n): the gradients of the states after the chunks, or the states before them if READS
    grad_scores,
    grad_keys,  # (splits, b, l, g, n)
    along,  # (tiles of n, b, h, padded): each key's product with its gradient by the states, before the scale; or None
    length,
    padded,
    batch,
    heads,
    shared,
    splits,
    k_b,
    k_l,
    k_g,
    o_b,
    o_l,
    o_g,
    v_b,
    v_l,
    v_h,
    N: tl.constexpr,
    P: tl.constexpr,
    READS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of k, or of q (READS), summed over the heads of a split."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = CHUNK // ROWS
    tile = tl.program_id(0) % (TILES_N * PARTS)
    row = tl.program_id(0) // (TILES_N * PARTS)  # of (splits, b, g)
    groups = heads // shared
    split, b, g = row // (batch * groups), (row // groups % batch).to(tl.int64), row % groups
    c = tl.program_id(1)
    part = tile // TILES_N
    n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    t = c * CHUNK + part * ROWS + tl.arange(0, ROWS)
    others += b * o_b + g.to(tl.int64) * o_g
    if documents is not None:
        documents += b * length
    # Everything is transposed, (n, t), so that the factor that is cut into terms is the left one: of that, each warp
    # holds only its own rows.
    if along is not None:
        key = _columns(keys + b * k_b + g.to(tl.int64) * k_g, t, n, length, k_l, N).to(tl.float32)

    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    each = tl.cdiv(shared, splits)
    begin = split * each
    for step in range(0, tl.minimum(each, shared - begin)):
        h = g.to(tl.int64) * shared + begin + step
        line = (b * heads + h) * padded
        state = states + (c * batch * heads + b * heads + h) * (N * P)
        grad = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for first in range(0, P, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            wide = tl.load(state + p[None, :] * N + n[:, None], (p < P)[None, :] & (n < N)[:, None], 0)
            value = _columns(values + b * v_b + h * v_h, t, p, length, v_l, P)
            grad = _dot(wide, value, grad, True, PRECISION)
        if READS:
            grad *= _from_start(high + line, low + line, documents, t, c, length, CHUNK)[None, :]
        else:
            grad *= _to_end(high + line, low + line, documents, t, c, length, CHUNK)[None, :]
        if along is not None:
            tl.store(along + tile % TILES_N * batch * heads * padded.to(tl.int64) + line + t, tl.sum(grad * key, 0))
        if scales is not None:
            grad *= tl.load(scales + line + t)[None, :]
        total += grad

    grad_scores += (c.to(tl.int64) * splits * batch * groups + row) * (3 * ROWS * ROWS)
    x = tl.arange(0, ROWS)[None, :]
    begin, stop = part * ROWS, CHUNK
    if READS:
        begin, stop = 0, part * ROWS + ROWS
    for first in range(begin, stop, BLOCK_P):
        u = first + tl.arange(0, BLOCK_P)
        pair = grad_scores + (part + first // ROWS) * (ROWS * ROWS)
        y = (u % ROWS)[:, None]
        weight = tl.load(pair + (x * ROWS + y if READS else y * ROWS + x))
        total = _dot(_columns(others, c * CHUNK + u, n, length, o_l, N), weight, total, False, PRECISION)
    place = (((split * batch + b) * length + t)[None, :] * groups + g) * N + n[:, None]
    tl.store(grad_keys + place, total, (t < length)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["length", "padded", "chunks"])
def _grad_decays_kernel(
    inside,
    crossing,
    columns,
    reads,  # (tiles of n, b, h, padded)
    writes,  # (tiles of n, b, h, padded), before the scale
    across,  # (tiles, b, h, c)
    scales,
    grad_decay,  # (b, l, h)
    grad_scale,  # (b, l, h), or None
    length,
    padded,
    chunks,
    batch,
    heads,
    tiles,
    TILES_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Sum the paths of each log decay: those that are read at its token or later, and those written before it."""
    parts = tl.cdiv(heads, HEADS)
    b = (tl.program_id(0) // parts).to(tl.int64)
    h = (tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    c = tl.program_id(1)
    m = tl.arange(0, CHUNK)[None, :]
    t = c * CHUNK + m
    there = (h < heads) & (m < CHUNK)
    line = (b * heads + h) * padded + t
    read = tl.zeros((HEADS, CHUNK), tl.float64)
    written = tl.zeros((HEADS, CHUNK), tl.float64)
    for tile in tl.static_range(TILES_N):
        read += tl.load(reads + tile * batch * heads * padded.to(tl.int64) + line, there, 0).to(tl.float64)
        written += tl.load(writes + tile * batch * heads * padded.to(tl.int64) + line, there, 0).to(tl.float64)
    grad = tl.zeros((HEADS, 1), tl.float64)
    for tile in range(0, tiles):
        place = (tile * batch * heads + b * heads + h) * chunks + c
        grad += tl.load(across + place, h < heads, 0).to(tl.float64)
    crossed = tl.load(crossing + line, there, 0).to(tl.float64)
    scaled = tl.where(m < ROWS, crossed, 0)
    by_scale = tl.load(columns + line, there, 0).to(tl.float64) + scaled + written
    if scales is not None:
        scale = tl.load(scales + line, there, 0).to(tl.float64)
        scaled *= scale
        written *= scale
    crossed = tl.where(m < ROWS, 0, crossed)
    # crossing paths are written before a token of the first tile, and read at or after a token of the second
    before = tl.where(m < ROWS, tl.cumsum(scaled, 1) - scaled, 0) + tl.cumsum(written, 1) - written
    read += tl.load(inside + line, there, 0)
    after = tl.where(m < ROWS, 0, tl.cumsum(crossed, 1, reverse=True)) + tl.cumsum(read, 1, reverse=True)
    grad = grad + before + after
    place = (b * length + t) * heads + h
    tl.store(grad_decay + place, grad.to(tl.float32), there & (t < length))
    if grad_scale is not None:
        tl.store(grad_scale + place, by_scale.to(tl.float32), there & (t < length))


def _precision() -> str:
    # the interpreter multiplies exactly, and knows only the name "ieee"
    return "ieee" if knobs.runtime.interpret else "bf16x6"


def _arguments(config: dict[str, int], n: int, p: int) -> dict[str, Any]:
    """The constants of a kernel of products: its config, with no block larger than its dimension."""
    blocks = {name: _tile(size, config[name]) for name, size in (("BLOCK_N", n), ("BLOCK_P", p))}
    return {"N": n, "P": p, "CHUNK": CHUNK, "ROWS": ROWS, "PRECISION": _precision()} | config | blocks


def _tile(dimension: int, tile: int) -> int:
    """The tile for a dimension: a power of two, and at least 16, the least that tensor cores take."""
    return min(tile, max(16, triton.next_power_of_2(dimension)))


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype``, with a last dimension of stride 1."""
    t = t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


class _Launch:
    """The inputs as the kernels take them, and the launches that forward and backward share."""

    def __init__(self, q, k, v, log_decay, scale, skip, documents, config):
        (b, l, h, p), n = v.shape, q.shape[3]
        self.chunks = triton.cdiv(l, CHUNK)
        if self.chunks > MOST_CHUNKS:
            raise ValueError(
                f"decay_scan: length must be at most {MOST_CHUNKS * CHUNK} on a GPU, not {l}; a longer row is taken in "
                "pieces, each with the final state before it as its initial_state"
            )
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        self.dtype = dtype
        self.q, self.k, self.v = (_dense(t, dtype) for t in (q, k, v))
        place = (0 if dtype.itemsize == 2 else 1) if config is None else config
        self.over_states, self.over_values, self.over_pairs, self.over_keys = (
            _arguments(configs[place], n, p) for configs in (STATE_CONFIGS, OUTPUT_CONFIGS, SCORE_CONFIGS, KEY_CONFIGS)
        )
        self.tiles_n = triton.cdiv(n, self.over_keys["BLOCK_N"])
        self.tiles_p = triton.cdiv(p, self.over_values["BLOCK_P"])
        self.padded = self.chunks * CHUNK
        self.documents = None if documents is None else documents.contiguous()
        self.skips = None if skip is None else skip.to(torch.float32).contiguous()
        rows = v.new_empty(3 if scale is not None else 2, b, h, self.padded, dtype=torch.float32)
        self.high, self.low, self.scales = rows[0], rows[1], None if scale is None else rows[2]
        _decay_sums_kernel[(b * triton.cdiv(h, HEADS), self.chunks)](
            log_decay, scale, self.high, self.low, self.scales, l, self.padded, h, *log_decay.stride(),
            *(scale.stride() if scale is not None else (0, 0, 0)), CHUNK=CHUNK, HEADS=HEADS, **FUSED,
        )  # fmt: skip

    def chunk_states(self, keys: Tensor, values: Tensor, reads: bool) -> Tensor:
        b, l, h, p = self.v.shape
        g, n = keys.shape[2:]
        out = values.new_empty(self.chunks, b, h, p, n, dtype=torch.float32)
        tiles = triton.cdiv(n, self.over_states["BLOCK_N"]) * triton.cdiv(p, self.over_states["BLOCK_P"])
        _chunk_states_kernel[(tiles * b * h, self.chunks)](
            keys, values, self.high, self.low, None if reads else self.scales, self.documents, out, l, self.padded,
            b, h, h // g, *keys.stride()[:3], *values.stride()[:3], READS=reads, **self.over_states, **FUSED,
        )  # fmt: skip
        return out

    def pass_states(self, added, passed, first, last, starts=None, across=None) -> None:
        b, l, h, p = self.v.shape
        state = p * added.shape[4]
        first = None if first is None else first.contiguous()
        _pass_states_kernel[(triton.cdiv(state, PASSED) * b * h,)](
            added, passed, first, last, starts, across, self.high, self.low, self.documents, l, self.padded,
            self.chunks, b, h, STATE=state, REVERSED=starts is not None, CHUNK=CHUNK, PASSED=PASSED, **FUSED,
        )  # fmt: skip


def decay_scan_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    keep_states: bool,
    config: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the chunks' start states, flattened, or nothing unless ``keep_states``.

    ``config`` is an index into the tables of configs, and overrides the choice by dtype.
    """
    (b, l, h, p), g = v.shape, q.shape[2]
    x = _Launch(q, k, v, log_decay, scale, skip, documents, config)
    added = x.chunk_states(x.k, x.v, reads=False)
    starts, final_state = torch.empty_like(added), added.new_empty(added.shape[1:])
    x.pass_states(added, starts, initial_state, final_state)
    y = v.new_empty(b, l, h, p)
    _outputs_kernel[(x.tiles_p * (CHUNK // ROWS) * b * h, x.chunks)](
        x.q, x.k, x.v, x.high, x.low, x.scales, x.skips, x.documents, starts, y, l, x.padded, b, h, h // g,
        *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], **x.over_values, **FUSED,
    )  # fmt: skip
    return y, final_state, starts.flatten() if keep_states else starts.new_empty(0)


def decay_scan_bwd(
    grad_y: Tensor | None,
    grad_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    documents: Tensor | None,
    kept: Tensor,
    wanted: Sequence[bool] = (True,) * 7,
    config: int | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, log_decay, scale, skip and the initial state. One that is not ``wanted`` is None, or
    comes from a kernel that another one needs."""
    of_q, of_k, of_v, of_decay, of_scale, of_skip, _ = wanted
    factors = of_decay or of_scale
    (b, l, h, p), (g, n) = v.shape, q.shape[2:]
    r = h // g
    x = _Launch(q, k, v, log_decay, scale, skip, documents, config)
    grad_y = torch.zeros_like(x.v) if grad_y is None else _dense(grad_y, x.dtype)
    starts = kept.view(x.chunks, b, h, p, n)
    over_q, over_k, over_v, over_y = (t.stride()[:3] for t in (x.q, x.k, x.v, grad_y))

    added = x.chunk_states(x.q, grad_y, reads=True)
    grad_ends, grad_initial = torch.empty_like(added), added.new_empty(added.shape[1:])
    across = added.new_empty(triton.cdiv(p * n, PASSED), b, h, x.chunks) if factors else None
    x.pass_states(added, grad_ends, grad_final_state, grad_initial, starts, across)

    grad_v = None
    if of_v:
        grad_v = v.new_empty(b, l, h, p)
        _grad_values_kernel[(x.tiles_p * (CHUNK // ROWS) * b * h, x.chunks)](
            x.q, x.k, grad_y, x.high, x.low, x.scales, x.skips, x.documents, grad_ends, grad_v, l, x.padded, b, h, r,
            *over_q, *over_k, *over_y, **x.over_values, **FUSED,
        )  # fmt: skip
    if not (of_q or of_k or factors or of_skip):
        return None, None, grad_v, None, None, None, grad_initial

    # One program computes the heads of a group one after another; if that leaves a large GPU idle, several share them.
    splits = min(r, triton.cdiv(PROGRAMS, max(1, b * g * x.chunks)))
    inside = crossing = columns = along = None
    if factors:
        crossing, columns = x.high.new_empty(2, b, h, x.padded)
        inside = torch.empty_like(columns, dtype=torch.float64)
        along = x.high.new_empty(2, x.tiles_n, b, h, x.padded)
    grad_skips = x.high.new_empty(x.chunks, CHUNK // ROWS, b, h) if of_skip and skip is not None else None
    grad_scores = x.high.new_empty(x.chunks, splits, b, g, 3, ROWS, ROWS)
    _grad_scores_kernel[(3 * splits * b * g, x.chunks)](
        x.q, x.k, x.v, grad_y, x.high, x.low, x.scales, x.documents, grad_scores, inside, crossing, columns, grad_skips,
        l, x.padded, b, h, r, splits, *over_q, *over_k, *over_v, *over_y, **x.over_pairs, **FUSED,
    )  # fmt: skip

    grads: list[Tensor | None] = []
    for reads, asked in ((True, of_q), (False, of_k)):
        if not (asked or factors):
            grads.append(None)
            continue
        key, other, value = (x.q, x.k, grad_y) if reads else (x.k, x.q, x.v)
        dtype = (q if reads else k).dtype if splits == 1 else torch.float32
        grad = v.new_empty(splits, b, l, g, n, dtype=dtype)
        _grad_keys_kernel[(x.tiles_n * (CHUNK // ROWS) * splits * b * g, x.chunks)](
            key, other, value, x.high, x.low, None if reads else x.scales, x.documents, starts if reads else grad_ends,
            grad_scores, grad, None if along is None else along[0 if reads else 1], l, x.padded, b, h, r, splits,
            *key.stride()[:3], *other.stride()[:3], *value.stride()[:3], READS=reads, **x.over_keys, **FUSED,
        )  # fmt: skip
        grads.append(grad[0] if splits == 1 else grad.sum(0))

    grad_skip = None if grad_skips is None else grad_skips.sum((0, 1, 2), dtype=torch.float64)
    if along is None or across is None:
        return grads[0], grads[1], grad_v, None, None, grad_skip, grad_initial
    grad_decay = x.high.new_empty(b, l, h)
    grad_scale = None if scale is None else torch.empty_like(grad_decay)
    _grad_decays_kernel[(b * triton.cdiv(h, HEADS), x.chunks)](
        inside, crossing, columns, along[0], along[1], across, x.scales, grad_decay, grad_scale, l, x.padded, x.chunks,
        b, h, across.shape[0], TILES_N=x.tiles_n, CHUNK=CHUNK, ROWS=ROWS, HEADS=HEADS, **FUSED,
    )  # fmt: skip
    return grads[0], grads[1], grad_v, grad_decay, grad_scale, grad_skip, grad_initial


def aot_specs() -> list[KernelSpec]:
    """Every kernel and config, for `hf_archs.kernels.aot`, at the shapes of published models: Mamba-2 2.7B, whose 80
    heads are a multiple of 16; Mamba2-130m, whose 24 heads are not; and RetNet 6.7B, whose decays are constants without
    a gradient, in float32 only its backward. Mamba2-130m, and RetNet 6.7B in bfloat16, have documents, as in packed
    training."""
    learnt = ("inside", "crossing", "columns", "along", "across")
    constant: dict[str, Any] = dict.fromkeys((*learnt, "scale", "scales", "skips", "grad_skips")) | {"shared": 1}
    specs = []
    for name, dtype, n, p, heads, model in (
        ("Mamba-2 2.7B", "bf16", 128, 64, "i32:16", {"documents": None}),
        ("RetNet 6.7B", "bf16", 256, 512, "i32:16", constant),
        ("Mamba2-130m", "fp32", 128, 64, "i32", {}),
        ("RetNet 6.7B", "fp32", 256, 512, "i32:16", constant | {"documents": None}),
    ):
        place = 0 if dtype == "bf16" else 1
        over_states, over_values, over_pairs, over_keys = (
            _arguments(configs[place], n, p) | {"PRECISION": "bf16x6"} | model
            for configs in (STATE_CONFIGS, OUTPUT_CONFIGS, SCORE_CONFIGS, KEY_CONFIGS)
        )
        sizes = {"CHUNK": CHUNK, "ROWS": ROWS, "HEADS": HEADS, "PASSED": PASSED, "STATE": n * p, "a_h": 1, "s_h": 1}
        sizes |= {"TILES_N": triton.cdiv(n, over_keys["BLOCK_N"]), "num_warps": 4, "num_stages": 3}
        tokens: dict[str, Any] = sizes | model
        of_q: dict[str, Any] = {"READS": True, "scales": None}
        of_k: dict[str, Any] = {"READS": False}
        kernels: list[tuple[Any, str, dict[str, Any]]] = [
            (_pass_states_kernel, ", reversed", tokens | {"REVERSED": True}),
            (_grad_scores_kernel, "", over_pairs),
            (_grad_keys_kernel, "", over_keys | of_k),
            (_grad_keys_kernel, ", of q", over_keys | of_q),
        ]
        if (name, dtype) != ("RetNet 6.7B", "fp32"):
            kernels += [
                (_decay_sums_kernel, "", tokens),
                (_chunk_states_kernel, "", over_states | of_k),
                (_chunk_states_kernel, ", of q", over_states | of_q),
                (_pass_states_kernel, "", tokens | {"REVERSED": False, "starts": None, "across": None}),
                (_outputs_kernel, "", over_values),
                (_grad_values_kernel, "", over_values),
            ]
        if "inside" not in model:
            kernels.append((_grad_decays_kernel, "", tokens))
        for kernel, more, known in kernels:
            signature = {argument: _kind(argument, known, dtype, heads) for argument in kernel.arg_names}
            constexprs = {argument: known[argument] for argument in signature if argument in known}
            label = f"{name}, {dtype}, keys {n}, values {p}{'' if 'documents' in model else ', packed'}{more}"
            config = known["num_warps"], known["num_stages"]
            specs.append(KernelSpec(kernel, signature, constexprs, *config, label))
    return specs


def _kind(argument: str, known: dict[str, Any], dtype: str, heads: str) -> str:
    if argument in known:
        return "constexpr"
    if argument == "inside":
        return "*fp64"
    if argument in ("q", "k", "v", "y", "grad_y", "grad_v", "keys", "others", "values", "grad_keys"):
        return f"*{dtype}"
    if argument == "documents":
        return "*i32"
    if argument[1:2] == "_" and argument[0] in "qkvyo":
        return "i32:16"
    if argument == "heads":
        return heads
    counts = ("length", "padded", "chunks", "batch", "shared", "splits", "tiles")
    if argument[1:2] == "_" or argument in counts:
        return "i32"
    return "*fp32"
