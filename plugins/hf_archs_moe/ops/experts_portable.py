"""`expert_mlp` in plain PyTorch, forward and backward, expert by expert.

The pairs are sorted by expert once. Every expert that has any then takes one slice of them: its weights are read once,
its part of the gradients is written once, in place, and whatever is as wide as the inner layer lives for that slice
only. Experts with few pairs share what is no product, since calls that small cost more than their work. The product
with ``up`` alone is kept for the backward, which needs no other: the gradient of a pair's weight is the product of the
inner layer with its own gradient, so the experts' outputs are not computed again.

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

BLOCK = 128  # pairs that are enough to hide the cost of a call

aten = torch.ops.aten

# activation(x), and what writes the gradient of x into `grad_input` from that of activation(x) and x
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


Own = list[tuple[int, slice]]  # experts, and the place of each among the pairs of a block


class _Pairs:
    """The pairs in the order of their experts; those of no expert are left out."""

    def __init__(self, index: Tensor, experts: int) -> None:
        flat = index.flatten()
        self.shape = index.shape
        ends = list(accumulate(torch.bincount(flat, minlength=experts).tolist()[:experts], initial=0))
        self.slices = [slice(start, end) for start, end in pairwise(ends)]  # of each expert
        self.count = ends[-1]
        self.order = flat.argsort(stable=True)[: self.count]
        self.tokens = self.order // index.shape[1]

    def blocks(self, least: int, *others: Tensor) -> Iterator[tuple[Any, ...]]:
        """The pairs of one or more experts, ``least`` of them but for the last: whose they are, their tokens, and their
        rows of what is sorted as they are.
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
        """The weight of each pair, (p, 1), as wide as what it multiplies: x, in float32 or wider."""
        return weight.flatten()[self.order].to(_wider(x)).unsqueeze(1)

    def sum(self, rows: Tensor) -> Tensor:
        """The sum of each token's ``rows``, which are sorted and end on one of zeros: (t, h), in a fixed order."""
        place = self.order.new_full((self.shape.numel(),), self.count)
        place[self.order] = torch.arange(self.count, device=place.device)
        return rows.index_select(0, place).view(*self.shape, rows.shape[1]).sum(1)


def _wider(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(count: int, x: Tensor) -> Tensor:
    """For `_Pairs.sum`, as wide as x, in float32 or wider."""
    rows = x.new_empty(count + 1, x.shape[1], dtype=_wider(x))
    rows[count] = 0
    return rows


def _products(rows: Tensor, own: Own, weights: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The rows of each expert times its matrix, (columns of rows, columns of out)."""
    if out is None:
        out = rows.new_empty(len(rows), weights[0].shape[1])
    if len(own) == 1:  # a slice takes as long as a small operator
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
    """y, and the products with ``up`` of the sorted pairs, (p, 2 i) or (p, i), or nothing unless ``keep``."""
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
    """A decode step: nothing to sort, and no operator that is not a product or the activation."""
    y = torch.zeros_like(x, dtype=_wider(x))
    for e, w in zip(index[0].tolist(), weight[0].tolist()):
        if e < len(up):
            y.add_(_row_product(_inner(_row_product(x, up[e]), act, gated), down[e]), alpha=w)
    return cast(y, x.dtype)


def _row_product(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` of one row in float32: MKL takes one thread for it, but one for each matrix of a batch.

    (Reading the weights is all it does; on two threads it takes two thirds of the time.)
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
    """The gradients of x, weight, up and down."""
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
    """The gradient of each expert's matrix, (columns of of_output, columns of of_input)."""
    if len(own) == 1:
        torch.mm(of_output.t(), of_input, out=out[own[0][0]])
        return
    for e, place in own:
        torch.mm(of_output[place].t(), of_input[place], out=out[e])
