"""`expert_mlp` in plain PyTorch, forward and backward, expert by expert.

The pairs are sorted by expert once, so that those of one expert are a slice. An expert's weights are then read once,
its part of the gradients is written once, in place, and temporaries as wide as the inner layer exist for one slice at a
time. Experts with few pairs share all operators but the products, since calls on few pairs cost more than their work.
Only the product with ``up`` is kept for the backward: the gradient of a pair's weight is the product of the inner layer
with its own gradient, so the experts' outputs are not computed again.

Letters: t tokens, k choices of a token, p pairs of a token and one of its choices, e experts, h hidden, i inner.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.numerics import cast, wide

BLOCK = 128  # pairs per block, enough to outweigh the overhead of PyTorch calls

aten = torch.ops.aten

# activation(x), and its backward (gradient of activation(x), x), which writes the gradient of x into `grad_input`
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "silu": (F.silu, aten.silu_backward.grad_input),
    "gelu": (F.gelu, aten.gelu_backward.grad_input),
    "gelu_pytorch_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(aten.gelu_backward.grad_input, approximate="tanh"),
    ),
    "relu": (F.relu, partial(aten.threshold_backward.grad_input, threshold=0)),
    "relu2": (
        lambda x: F.relu(x).square(),
        lambda g, x, grad_input: torch.mul(F.relu(x), g, out=grad_input).mul_(2),
    ),
}


Own = list[tuple[int, slice]]  # the experts of a block, and the slice of its pairs that each has


class _Pairs:
    """The pairs sorted by expert, without those of no expert."""

    def __init__(self, index: Tensor, experts: int) -> None:
        flat = index.flatten()
        self.shape = index.shape
        ends = list(accumulate(torch.bincount(flat, minlength=experts).tolist()[:experts], initial=0))
        self.slices = [slice(start, end) for start, end in pairwise(ends)]  # of each expert
        self.count = ends[-1]
        self.order = flat.argsort(stable=True)[: self.count]
        self.tokens = self.order // index.shape[1]

    def blocks(self, least: int, *others: Tensor) -> Iterator[tuple[Any, ...]]:
        """Cut the pairs into blocks of whole experts, with at least ``least`` pairs except in the last. For each block:
        its experts, its pairs' tokens, and its rows of ``others``, which are sorted like the pairs.
        """
        start, blocks = 0, []
        owns: list[Own] = []
        own: Own = []
        for e, s in enumerate(self.slices):
            if s.stop > s.start:
                own.append((e, slice(s.start - start, s.stop - start)))
            if own and (s.stop - start >= least or s.stop == self.count):
                blocks.append(s.stop - start)
                owns.append(own)
                start, own = s.stop, []
        return zip(owns, *(t.split(blocks) for t in (self.tokens, *others)), strict=True)

    def scale(self, weight: Tensor, x: Tensor) -> Tensor:
        """The weight of each pair, (p, 1), in the dtype of x or float32, whichever is wider."""
        return weight.flatten()[self.order].to(_wider(x)).unsqueeze(1)

    def sum(self, rows: Tensor) -> Tensor:
        """The sum of each token's ``rows``, in a fixed order: (t, h). Rows are sorted like the pairs, and the last one
        is of zeros, for pairs of no expert."""
        place = self.order.new_full((self.shape.numel(),), self.count)
        place[self.order] = torch.arange(self.count, device=place.device)
        return rows.index_select(0, place).view(*self.shape, rows.shape[1]).sum(1)


def _wider(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(count: int, x: Tensor) -> Tensor:
    """Rows for `_Pairs.sum`, as long as those of x, in float32 or wider."""
    rows = x.new_empty(count + 1, x.shape[1], dtype=_wider(x))
    rows[count] = 0
    return rows


def _products(rows: Tensor, own: Own, weights: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The rows of each expert times its matrix in ``weights``, (columns of rows, columns of out)."""
    if out is None:
        out = rows.new_empty(len(rows), weights[0].shape[1])
    if len(own) == 1:  # no slicing, which takes as long as a small operator
        return torch.mm(rows, weights[own[0][0]], out=out)
    for e, place in own:
        torch.mm(rows[place], weights[e], out=out[place])
    return out


def _inner(pre: Tensor, act: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
    if not gated:
        return cast(act(wide(pre)), pre.dtype)
    gate, up = wide(pre).chunk(2, -1)
    return cast(act(gate).mul_(up), pre.dtype)


def expert_mlp_fwd(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    keep: bool,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """y, and the products with ``up`` of the sorted pairs, (p, 2 i) or (p, i); these are empty unless ``keep``."""
    act = ACTIVATIONS[activation][0]
    if len(x) == 1 and not keep:
        return _one_token(x, index, weight, up, down, act, gated), x.new_empty(0)
    pairs = _Pairs(index, len(up))
    scale = pairs.scale(weight, x)
    kept = x.new_empty((index.numel(), up.shape[1]) if keep else 0)
    kept[pairs.count :] = 0  # pairs of no expert
    rows = _rows(pairs.count, x)
    ups, downs = up.mT.unbind(), down.mT.unbind()
    for own, tokens, s, y, *into in pairs.blocks(
        block, scale, rows[: pairs.count], *([kept[: pairs.count]] if keep else [])
    ):
        pre = _products(x.index_select(0, tokens), own, ups, *into)
        torch.mul(_products(_inner(pre, act, gated), own, downs), s, out=y)
    return cast(pairs.sum(rows), x.dtype), kept


def _one_token(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor], gated: bool
) -> Tensor:
    """A decode step: without sorting, with hardly any operators but the products and the activation."""
    y = torch.zeros_like(x, dtype=_wider(x))
    for e, w in zip(index[0].tolist(), weight[0].tolist()):
        if e < len(up):
            y.add_(_row_product(_inner(_row_product(x, up[e]), act, gated), down[e]), alpha=w)
    return cast(y, x.dtype)


def _row_product(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` of one row. MKL computes it on one thread in float32, so its matrix is cut into a batch of matrices,
    for which MKL uses one thread each.

    (Nearly all its time is reading the weights; two threads take two thirds of the time.)
    """
    parts = torch.get_num_threads()
    if parts == 1 or weight.shape[0] % parts or x.dtype != torch.float32:
        return F.linear(x, weight)
    return torch.bmm(x.expand(parts, 1, -1), weight.unflatten(0, (parts, -1)).mT).view(1, -1)


def expert_mlp_bwd(
    grad_y: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    kept: Tensor,
    activation: str,
    gated: bool,
    wanted: Sequence[bool] = (True,) * 4,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, up and down, the latter two None if they are not ``wanted``."""
    act, act_backward = ACTIVATIONS[activation]
    pairs = _Pairs(index, len(up))
    scale = pairs.scale(weight, x)
    grad_scale = scale.new_empty(pairs.count)
    rows = _rows(pairs.count, x)
    grad_up, grad_down = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if asked else None
        for t, asked in zip((up, down), wanted[2:])
    )
    ups, downs = up.unbind(), down.unbind()
    grad_ups, grad_downs = (() if grad is None else grad.unbind() for grad in (grad_up, grad_down))
    for e, place in enumerate(pairs.slices):
        if place.start == place.stop:
            for grad in (grad_ups, grad_downs):
                if grad:
                    grad[e].zero_()
    for own, tokens, s, pre, to_scale, to_x in pairs.blocks(
        block, scale, kept[: pairs.count], grad_scale, rows[: pairs.count]
    ):
        pre = wide(pre)
        g = grad_y.index_select(0, tokens)
        grad_inner = wide(_products(g, own, downs))
        grad_pre = torch.empty_like(pre)
        if gated:
            gate, value = pre.chunk(2, -1)
            grad_gate, grad_value = grad_pre.chunk(2, -1)
            acted = act(gate)
            inner = acted * value
        else:
            inner = act(pre)
        torch.linalg.vecdot(inner, grad_inner, out=to_scale)
        grad_inner *= s
        if gated:
            torch.mul(grad_inner, acted, out=grad_value)
            act_backward(grad_inner.mul_(value), gate, grad_input=grad_gate)
        else:
            act_backward(grad_inner, pre, grad_input=grad_pre)
        grad_pre = cast(grad_pre, x.dtype)
        if grad_downs:
            _outer_products(g, cast(inner.mul_(s), x.dtype), own, grad_downs)
        if grad_ups:
            _outer_products(grad_pre, x.index_select(0, tokens), own, grad_ups)
        if rows.dtype == x.dtype:
            _products(grad_pre, own, ups, to_x)
        else:
            to_x.copy_(_products(grad_pre, own, ups))
    grad_weight = torch.zeros(weight.numel(), dtype=scale.dtype, device=x.device)
    grad_weight[pairs.order] = grad_scale
    return cast(pairs.sum(rows), x.dtype), grad_weight.view_as(weight), grad_up, grad_down


def _outer_products(of_output: Tensor, of_input: Tensor, own: Own, out: Sequence[Tensor]) -> None:
    """Write into ``out`` the gradient of each expert's matrix, (columns of of_output, columns of of_input)."""
    if len(own) == 1:
        torch.mm(of_output.t(), of_input, out=out[own[0][0]])
        return
    for e, place in own:
        torch.mm(of_output[place].t(), of_input[place], out=out[e])
