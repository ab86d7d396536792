"""`expert_mlp` in Triton, forward and backward: matrix products grouped by expert.

The pairs are sorted by expert, and each program computes one tile of one expert's product. A program reads rows of x
and of the gradient of y by the sorted order, without a padded or repeated copy. Each pair's result is written to its
own place in (t, k, h), and PyTorch sums over k. So there are no atomics, and results repeat exactly.

The device computes the expert of each tile from the numbers of pairs: there are at most ``p / ROWS + e`` tiles, and
programs beyond the last tile return at once. The host never waits, and an expert without pairs is never read.

Why it should be fast: a program of the first product has the tiles of the gate and of the value, so that the activation
causes no memory traffic; a pair's weight multiplies the second product before it is written. Programs that run together
are tiles of one expert with the same columns, so that its matrix is read from the L2 cache. Only the first product is
kept for the backward; the gradient of a pair's weight is the product, in registers, of the inner layer with its own.

Letters: t tokens, k choices of a token, p pairs of a token and one of its choices, e experts, h hidden, i inner.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_archs.kernels.aot import FUSED, KernelSpec
from hf_archs.kernels.triton_functions import sigmoid

# ROWS is the pairs of a tile; COLUMNS the columns of its result (half as many for the inner layer, since the activation
# needs registers); STEP the length over which a product sums at once. The first config is for 16 bits, the second for
# experts with few pairs, as in decoding, the third for float32, which has no tensor cores. The dtype and the average
# number of pairs choose the config.
CONFIGS = [
    {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3},
    {"ROWS": 16, "COLUMNS": 64, "STEP": 64, "num_warps": 4, "num_stages": 3},
    {"ROWS": 32, "COLUMNS": 64, "STEP": 16, "num_warps": 4, "num_stages": 2},
]
FEW = 16  # pairs per expert; up to this average, most rows of a large tile would be empty


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0)
        if ACTIVATION == "relu2":
            y *= y
    return y


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        y = s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_pytorch_tanh":
        s = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "relu2":
        y = 2 * tl.maximum(x, 0)
    else:
        y = tl.where(x > 0, 1.0, 0.0)
    return y


@triton.jit
def _tile(tiles, offsets, ROWS: tl.constexpr):
    """The sorted pairs of this program's tile, the mask of those that exist, and the expert."""
    expert = tl.load(tiles + 2 * tl.program_id(0))
    pair = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, ROWS)
    return pair, pair < tl.load(offsets + expert + 1), expert.to(tl.int64)


@triton.jit
def _up_kernel(
    x,  # (t, h)
    order,  # (p,): the index in (t, k) of each sorted pair
    tiles,  # (tiles, 2): expert and first sorted pair
    offsets,  # (e + 1,): first sorted pair of each expert
    up,  # (e, 2 i, h) or (e, i, h)
    pre,  # (p, 2 i) or (p, i): the product, or None
    inner,  # (p, i)
    k,
    experts,
    hidden,
    width,  # i
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    if tl.load(tiles + 2 * tl.program_id(0)) == experts:
        return
    pair, there, expert = _tile(tiles, offsets, ROWS)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    h = tl.arange(0, STEP)
    token = (tl.load(order + pair, there, 0) // k).to(tl.int64)
    x += token[:, None] * hidden + h[None, :]
    HALVES: tl.constexpr = 2 if GATED else 1
    up += (expert * HALVES * width + i[None, :]) * hidden + h[:, None]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden, STEP):
        inside = h < hidden - start
        seen = (i < width)[None, :] & inside[:, None]
        rows = tl.load(x + start, there[:, None] & inside[None, :], 0)
        product = tl.dot(rows, tl.load(up + start, seen, 0), product, input_precision="ieee")
        if GATED:
            matrix = tl.load(up + tl.cast(width, tl.int64) * hidden + start, seen, 0)
            value = tl.dot(rows, matrix, value, input_precision="ieee")
    seen = there[:, None] & (i < width)[None, :]
    pair = pair.to(tl.int64)
    if pre is not None:
        pre += pair[:, None] * (HALVES * width) + i[None, :]
        tl.store(pre, product, seen)
        if GATED:
            tl.store(pre + width, value, seen)
    result = _activation(product, ACTIVATION)
    if GATED:
        result *= value
    tl.store(inner + pair[:, None] * width + i[None, :], result, seen)


@triton.jit
def _pairs_kernel(
    rows,  # (p, n), sorted
    order,
    tiles,
    offsets,
    matrix,  # (e, n, h), strides given
    weight,  # (p,) in the order of (t, k), or None for ones
    out,  # (p, h) in the order of (t, k)
    experts,
    size,  # n
    hidden,
    m_e,
    m_n,
    m_h,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """``weight * (rows @ matrix)``, with each row stored at its pair's index in (t, k)."""
    if tl.load(tiles + 2 * tl.program_id(0)) == experts:
        return
    pair, there, expert = _tile(tiles, offsets, ROWS)
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n = tl.arange(0, STEP)
    rows += pair.to(tl.int64)[:, None] * size + n[None, :]
    matrix += expert * m_e + n.to(tl.int64)[:, None] * m_n + h.to(tl.int64)[None, :] * m_h
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, STEP):
        inside = n < size - start
        row = tl.load(rows + start, there[:, None] & inside[None, :], 0)
        column = tl.load(matrix, (h < hidden)[None, :] & inside[:, None], 0)
        product = tl.dot(row, column, product, input_precision="ieee")
        matrix += m_n * STEP
    place = tl.load(order + pair, there, 0).to(tl.int64)
    if weight is not None:
        product *= tl.load(weight + place, there, 0).to(tl.float32)[:, None]
    tl.store(out + place[:, None] * hidden + h[None, :], product, there[:, None] & (h < hidden)[None, :])


@triton.jit(do_not_specialize=["pairs"])
def _grad_inner_kernel(
    grad_y,  # (t, h)
    order,
    tiles,
    offsets,
    down,  # (e, h, i)
    pre,  # (p, 2 i) or (p, i)
    weight,  # (p,) in the order of (t, k)
    inner,  # (p, i), output: the inner layer times the pair's weight
    grad_pre,  # as pre
    grad_weight,  # (blocks of i, p): the sum over each block, in the order of (t, k)
    k,
    experts,
    pairs,
    hidden,
    width,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """From the gradient of the inner layer, those of ``pre`` and of the weights; and the inner layer again."""
    if tl.load(tiles + 2 * tl.program_id(0)) == experts:
        return
    pair, there, expert = _tile(tiles, offsets, ROWS)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    h = tl.arange(0, STEP)
    place = tl.load(order + pair, there, 0).to(tl.int64)
    grad_y += (place // k)[:, None] * hidden + h[None, :]
    down += (expert * hidden + h[:, None]) * width + i[None, :]
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, hidden, STEP):
        inside = h < hidden - start
        tokens = tl.load(grad_y + start, there[:, None] & inside[None, :], 0)
        column = tl.load(down, (i < width)[None, :] & inside[:, None], 0)
        grad = tl.dot(tokens, column, grad, input_precision="ieee")
        down += tl.cast(width, tl.int64) * STEP
    seen = there[:, None] & (i < width)[None, :]
    HALVES: tl.constexpr = 2 if GATED else 1
    pair = pair.to(tl.int64)[:, None]
    at = pair * (HALVES * width) + i[None, :]
    gate = tl.load(pre + at, seen, 0).to(tl.float32)
    scale = tl.load(weight + place, there, 0).to(tl.float32)[:, None]
    slope = _slope(gate, ACTIVATION)
    result = _activation(gate, ACTIVATION)
    if GATED:
        tl.store(grad_pre + width + at, grad * scale * result, seen)
        value = tl.load(pre + width + at, seen, 0).to(tl.float32)
        result *= value
        slope *= value
    tl.store(grad_pre + at, grad * scale * slope, seen)
    sums = grad_weight + tl.program_id(1).to(tl.int64) * pairs + place
    tl.store(sums, tl.sum(tl.where(seen, grad * result, 0), 1), there)
    tl.store(inner + pair * width + i[None, :], result * scale, seen)


@triton.jit
def _grad_matrix_kernel(
    rows,  # (p, n), sorted
    of_tokens,  # (t, h)
    order,
    offsets,
    grad,  # (e, n, h), strides given
    k,
    size,  # n
    hidden,
    g_e,
    g_n,
    g_h,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sum over an expert's pairs of ``rows^T of_tokens``; zeros for an expert without pairs."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(2)
    end = tl.load(offsets + expert + 1)
    rows += n[:, None]
    of_tokens += h[None, :]
    total = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for start in range(tl.load(offsets + expert), end, STEP):
        pair = start + tl.arange(0, STEP)
        there = pair < end
        token = (tl.load(order + pair, there, 0) // k).to(tl.int64)
        row = tl.load(rows + pair.to(tl.int64)[None, :] * size, there[None, :] & (n < size)[:, None], 0)
        column = tl.load(of_tokens + token[:, None] * hidden, there[:, None] & (h < hidden)[None, :], 0)
        total = tl.dot(row, column, total, input_precision="ieee")
    grad += expert.to(tl.int64) * g_e + n.to(tl.int64)[:, None] * g_n + h.to(tl.int64)[None, :] * g_h
    tl.store(grad, total, (n < size)[:, None] & (h < hidden)[None, :])


class _Pairs(NamedTuple):
    order: Tensor
    tiles: Tensor
    offsets: Tensor


def _sorted(index: Tensor, experts: int, rows: int) -> _Pairs:
    """The tables that the kernels read, int32. The host does not wait for the device."""
    by_expert, order = index.flatten().sort(stable=True)
    offsets = torch.searchsorted(by_expert, torch.arange(experts + 1, device=index.device, dtype=by_expert.dtype))
    number = (offsets.diff() + rows - 1) // rows  # of tiles of each expert
    ends = number.cumsum(0)
    tile = torch.arange(index.numel() // rows + experts, device=index.device)
    expert = torch.searchsorted(ends, tile, right=True)  # is ``experts`` beyond the last tile
    own = expert.clamp(max=experts - 1)
    tiles = torch.stack([expert, offsets[own] + (tile - ends[own] + number[own]) * rows], 1)
    return _Pairs(order.to(torch.int32), tiles.to(torch.int32), offsets.to(torch.int32))


def _config(x: Tensor, pairs: int, experts: int, config: dict[str, int] | None) -> dict[str, int]:
    if config is None:
        config = CONFIGS[2 if x.dtype.itemsize > 2 else 1 if pairs <= FEW * experts else 0]
    return dict(config)


def _narrow(config: dict[str, int]) -> dict[str, int]:
    """The config for products whose result is the inner layer."""
    return config | {"COLUMNS": config["COLUMNS"] // 2}


def expert_mlp_fwd(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    keep: bool,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `experts_portable.expert_mlp_fwd`; ``config`` is one of `CONFIGS`."""
    (e, h, i), p = down.shape, index.numel()
    x, weight, up, down = (t.contiguous() for t in (x, weight, up, down))
    config = _config(x, p, e, config)
    pairs = _sorted(index, e, config["ROWS"])
    pre = x.new_empty((p, up.shape[1]) if keep else 0)
    inner = x.new_empty(p, i)
    outputs = x.new_zeros(p, h)  # pairs of no expert stay 0
    if p:
        narrow = _narrow(config)
        _up_kernel[len(pairs.tiles), triton.cdiv(i, narrow["COLUMNS"])](
            x, *pairs, up, pre if keep else None, inner, index.shape[1], e, h, i, gated, activation, **narrow, **FUSED
        )
        _pairs_kernel[len(pairs.tiles), triton.cdiv(h, config["COLUMNS"])](
            inner, *pairs, down, weight, outputs, e, i, h, down.stride(0), down.stride(2), down.stride(1),
            **config, **FUSED,
        )  # fmt: skip
    return outputs.view(*index.shape, h).sum(1), pre


def expert_mlp_bwd(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    pre: Tensor,
    activation: str,
    gated: bool,
    wanted: Sequence[bool] = (True,) * 4,
    config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `experts_portable.expert_mlp_bwd`; ``config`` is one of `CONFIGS`."""
    (e, h, i), (_, k), p = down.shape, index.shape, index.numel()
    grad_y, x, weight, up, down = (t.contiguous() for t in (grad_y, x, weight, up, down))
    config = _config(x, p, e, config)
    pairs = _sorted(index, e, config["ROWS"])
    narrow = _narrow(config)
    blocks = triton.cdiv(i, narrow["COLUMNS"])
    inner, grad_pre = x.new_empty(p, i), torch.empty_like(pre)
    grad_weight = torch.zeros(blocks, p, dtype=torch.float32, device=x.device)
    grad_pairs = x.new_zeros(p, h)
    if p:
        _grad_inner_kernel[len(pairs.tiles), blocks](
            grad_y, *pairs, down, pre, weight, inner, grad_pre, grad_weight, k, e, p, h, i, gated, activation,
            **narrow, **FUSED,
        )  # fmt: skip
        _pairs_kernel[len(pairs.tiles), triton.cdiv(h, config["COLUMNS"])](
            grad_pre, *pairs, up, None, grad_pairs, e, up.shape[1], h, *up.stride(), **config, **FUSED
        )
    del config["ROWS"]

    def grad_matrix(rows: Tensor, of_tokens: Tensor, shape: torch.Size, by_rows: int, by_tokens: int) -> Tensor:
        grad = x.new_empty(shape)
        grid = (*(triton.cdiv(n, config["COLUMNS"]) for n in (rows.shape[1], h)), e)
        strides = grad.stride(0), grad.stride(by_rows), grad.stride(by_tokens)
        _grad_matrix_kernel[grid](
            rows, of_tokens, pairs.order, pairs.offsets, grad, k, rows.shape[1], h, *strides, **config, **FUSED
        )
        return grad

    return (
        grad_pairs.view(*index.shape, h).sum(1),
        grad_weight.sum(0).view_as(weight),
        grad_matrix(grad_pre, x, up.shape, 1, 2) if wanted[2] else None,
        grad_matrix(inner, grad_y, down.shape, 2, 1) if wanted[3] else None,
    )


def aot_specs() -> list[KernelSpec]:
    """Every kernel with every configuration, with a gate (silu) and without one (gelu), for `hf_archs.kernels.aot`."""
    types = {name: "*i32" for name in ("order", "tiles", "offsets")} | {"weight": "*fp32", "grad_weight": "*fp32"}
    types |= {name: "i32" for name in ("k", "experts", "pairs")}
    types |= {name: "i32:16" for name in ("hidden", "width", "size", "m_e", "m_n", "m_h", "g_e", "g_n", "g_h")}
    specs = []
    for dtype, config in (("bf16", CONFIGS[0]), ("bf16", CONFIGS[1]), ("fp32", CONFIGS[2])):
        gate: dict[str, object] = {"GATED": True, "ACTIVATION": "silu"}
        none: dict[str, object] = {"GATED": False, "ACTIVATION": "gelu"}
        for kernel, label, given in (
            (_up_kernel, "gated", gate | _narrow(config)),
            (_up_kernel, "not gated", none | _narrow(config)),
            (_pairs_kernel, "down", {"m_n": 1, **config}),
            (_pairs_kernel, "up", {"m_h": 1, "weight": None, **config}),
            (_grad_inner_kernel, "gated", gate | _narrow(config)),
            (_grad_inner_kernel, "not gated", none | _narrow(config)),
            (_grad_matrix_kernel, "up", {"g_h": 1, **config}),
            (_grad_matrix_kernel, "down", {"g_n": 1, **config}),
        ):
            constexprs = {name: value for name, value in given.items() if name in kernel.arg_names}
            signature = {
                name: "constexpr" if name in constexprs else types.get(name, f"*{dtype}") for name in kernel.arg_names
            }
            model = "" if label == "not gated" else "Mixtral 8x7B, "
            label = f"{model}{dtype} {config['ROWS']} x {config['COLUMNS']}, {label}"
            specs.append(KernelSpec(kernel, signature, constexprs, config["num_warps"], config["num_stages"], label))
    return specs
