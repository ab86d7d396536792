"""`expert_mlp` in plain PyTorch, forward and backward, expert by expert.

The pairs are sorted by expert once. Every expert that has any then takes one slice of them: its weights are read once,
its part of the gradients is written once, in place, and whatever is as wide as the inner layer lives for that slice
only. Experts with few pairs share what is no product, since calls that small cost more than their work. The product
with ``up`` alone is kept for the backward, which needs no other: the gradient of a pair's weight is the product of the
inner layer with its own gradient, so the experts' outputs are not computed again.

Letters: t tokens, k choices of a token, p pairs of a token and one of its choices, e experts, h hidden, i inner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_archs.kernels.numerics import cast, wide

BLOCK = 128  # pairs that are enough to hide the cost of a call

aten = torch.ops.aten

# activation(x), and the gradient of x from that of activation(x) and x
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_pytorch_tanh": (partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")),
    "relu": (F.relu, lambda g, x: aten.threshold_backward(g, x, 0)),
    "relu2": (lambda x: F.relu(x).square(), lambda g, x: 2 * g * F.relu(x)),
}


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

    def blocks(self) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
        """The pairs of one or more experts, each with its place among them; at least `BLOCK` but for the last."""
        start, own = 0, []
        for e, s in enumerate(self.slices):
            if s.stop > s.start:
                own.append((e, slice(s.start - start, s.stop - start)))
            if own and (s.stop - start >= BLOCK or s.stop == self.count):
                yield slice(start, s.stop), own
                start, own = s.stop, []

    def sum(self, rows: Tensor) -> Tensor:
        """The sum of each token's ``rows``, which are sorted and end on one of zeros: (t, h), in a fixed order."""
        place = self.order.new_full((self.shape.numel(),), self.count)
        place[self.order] = torch.arange(self.count, device=place.device)
        return rows.index_select(0, place).view(*self.shape, rows.shape[1]).sum(1)


def _rows(count: int, x: Tensor) -> Tensor:
    """For `_Pairs.sum`, as wide as x, in float32 or wider."""
    rows = x.new_empty(count + 1, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    rows[count] = 0
    return rows


def _products(rows: Tensor, own: list[tuple[int, slice]], weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Each slice of ``rows`` times the matrix of its expert, (e, columns of rows, columns of out)."""
    if out is None:
        out = rows.new_empty(len(rows), weights.shape[2])
    for e, place in own:
        torch.mm(rows[place], weights[e], out=out[place])
    return out


def _inner(pre: Tensor, act: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
    if not gated:
        return cast(act(wide(pre)), pre.dtype)
    gate, up = wide(pre).chunk(2, -1)
    return cast(act(gate).mul_(up), pre.dtype)


def expert_mlp_fwd(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """y, and the products with ``up`` of the sorted pairs, (p, 2 i) or (p, i), or nothing unless ``keep``."""
    act = ACTIVATIONS[activation][0]
    if len(x) == 1 and not keep:
        return _one_token(x, index, weight, up, down, act, gated), x.new_empty(0)
    pairs = _Pairs(index, len(up))
    scale = wide(weight).flatten()[pairs.order].unsqueeze(1)
    kept = x.new_empty((index.numel(), up.shape[1]) if keep else 0)
    rows = _rows(pairs.count, x)
    up, down = up.transpose(1, 2), down.transpose(1, 2)
    for block, own in pairs.blocks():
        pre = _products(x.index_select(0, pairs.tokens[block]), own, up, kept[block] if keep else None)
        torch.mul(_products(_inner(pre, act, gated), own, down), scale[block], out=rows[block])
    return cast(pairs.sum(rows), x.dtype), kept


def _one_token(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor], gated: bool
) -> Tensor:
    """A decode step: nothing to sort, and no operator that is not a product or the activation."""
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for e, w in zip(index[0].tolist(), weight[0].tolist()):
        if e < len(up):
            y.add_(F.linear(_inner(F.linear(x, up[e]), act, gated), down[e]), alpha=w)
    return cast(y, x.dtype)


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
    up_learns: bool,
    down_learns: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, up and down."""
    act, act_backward = ACTIVATIONS[activation]
    pairs = _Pairs(index, len(up))
    scale = wide(weight).flatten()[pairs.order].unsqueeze(1)
    grad_scale = torch.zeros(weight.numel(), dtype=scale.dtype, device=x.device)
    rows = _rows(pairs.count, x)
    grad_up = torch.empty(up.shape, dtype=up.dtype, device=up.device) if up_learns else None
    grad_down = torch.empty(down.shape, dtype=down.dtype, device=down.device) if down_learns else None
    for grad in (grad_up, grad_down):
        for e, s in enumerate(pairs.slices):
            if grad is not None and s.start == s.stop:
                grad[e] = 0
    for block, own in pairs.blocks():
        tokens, pre = pairs.tokens[block], wide(kept[block])
        g = grad_y.index_select(0, tokens)
        grad_inner = wide(_products(g, own, down))
        if gated:
            gate, value = pre.chunk(2, -1)
            acted = act(gate)
            inner = acted * value
        else:
            inner = act(pre)
        grad_scale[pairs.order[block]] = torch.linalg.vecdot(inner, grad_inner)
        grad_inner *= scale[block]
        if gated:
            grad_pre = torch.empty_like(pre)
            torch.mul(grad_inner, acted, out=grad_pre[:, gate.shape[1] :])
            grad_pre[:, : gate.shape[1]] = act_backward(grad_inner.mul_(value), gate)
        else:
            grad_pre = act_backward(grad_inner, pre)
        grad_pre, inner = cast(grad_pre, x.dtype), cast(inner.mul_(scale[block]), x.dtype)
        for grad, of_output, of_input in (
            (grad_down, g, inner),
            (grad_up, grad_pre, x.index_select(0, tokens)),
        ):
            if grad is not None:
                for e, place in own:
                    torch.mm(of_output[place].t(), of_input[place], out=grad[e])
        if rows.dtype == x.dtype:
            _products(grad_pre, own, up, rows[block])
        else:
            rows[block] = _products(grad_pre, own, up)
    return cast(pairs.sum(rows), x.dtype), grad_scale.view_as(weight), grad_up, grad_down
