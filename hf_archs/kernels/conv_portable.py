"""`causal_conv1d` in PyTorch: shifted multiply-adds with the channel innermost, which beat `F.conv1d` on a CPU.

Time is cut into blocks, so that a block's temporaries fit the processor's cache.

Letters: b batch, l length, c channels. ``size`` is width - 1: the inputs before a position that its filter sees.
``reach``, (b, l), is how many of these belong to the position's document; None means all of them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**18  # elements of x per block: 1 MB in float32, and enough to outweigh the overhead of PyTorch calls


def _blocks(
    x: Tensor, size: int, initial_state: Tensor | None, dtype: torch.dtype, elements: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Blocks of time: (start, end, the inputs from ``start - size`` to ``end``, in ``dtype``).

    The first block ends at ``size``, so that only its inputs must be concatenated with the initial state.
    """
    b, l, c = x.shape
    end = min(size, l)
    before = x.new_zeros(b, size, c) if initial_state is None else initial_state.transpose(1, 2)
    yield 0, end, torch.cat([before.to(dtype), x[:, :end].to(dtype)], dim=1)
    step = max(1, elements // (b * c))
    for start in range(end, l, step):
        end = min(start + step, l)
        yield start, end, x[:, start - size : end].to(dtype)


def _visible(term: Tensor, reach: Tensor | None, start: int, end: int, back: int) -> Tensor:
    """``term``, but 0 at positions whose input ``back`` steps earlier is of another document (``reach`` < ``back``)."""
    return term if reach is None else term.masked_fill((reach[:, start:end] < back).unsqueeze(2), 0)


def _convolve(
    seen: Tensor, weight: Tensor, bias: Tensor | None, reach: Tensor | None, start: int, end: int, out: Tensor
) -> Tensor:
    size, count = weight.shape[0] - 1, end - start
    if bias is None:
        torch.mul(seen[:, size:], weight[size], out=out)
    else:
        torch.addcmul(bias, seen[:, size:], weight[size], out=out)
    for back in range(1, size + 1):
        term = _visible(seen[:, size - back : size - back + count], reach, start, end, back)
        out.addcmul_(term, weight[size - back])
    return out


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reach: Tensor | None,
    silu: bool,
    *,
    block: int = BLOCK_ELEMENTS,
) -> Tensor:
    """The output, (b, l, c), in the dtype of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for start, end, seen in _blocks(x, weight.shape[0] - 1, initial_state, dtype, block):
        part = y[:, start:end]
        out = part if y.dtype == dtype else torch.empty_like(part, dtype=dtype)
        _convolve(seen, weight, bias, reach, start, end, out)
        if silu:
            torch.ops.aten.silu_(out)
        if out is not part:
            part.copy_(out)
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
    *,
    block: int = BLOCK_ELEMENTS,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and initial_state. With SiLU, the pre-activation is computed again.

    The value of a gradient that is not ``wanted`` is undefined.
    """
    of_x, of_weight, of_bias, of_state = wanted
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)
    (b, l, c), size = x.shape, weight.shape[0] - 1
    grad_x = torch.empty(b, l, c, dtype=dtype, device=x.device)
    grad_state = torch.zeros(b, size, c, dtype=dtype, device=x.device)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(weight[0])
    for start, end, seen in _blocks(x, size, initial_state, dtype, block):
        count = end - start
        g = grad_y[:, start:end].to(dtype)
        buffer = torch.empty(b, count, c, dtype=dtype, device=x.device)  # for the pre-activation, then for products
        if silu:
            _convolve(seen, weight, bias, reach, start, end, buffer)
            g = torch.ops.aten.silu_backward(g, buffer)
        if of_bias:
            grad_bias += g.sum((0, 1))
        if of_x or of_state:
            torch.mul(g, weight[size], out=grad_x[:, start:end])
        for back in range(size + 1):
            term = _visible(g, reach, start, end, back) if back else g
            if of_weight:
                there = seen[:, size - back : size - back + count]
                grad_weight[size - back] += torch.mul(term, there, out=buffer).sum((0, 1))
            if back and (of_x or of_state):
                split = min(back, count) if start == 0 else 0  # positions that look back into the initial state
                grad_state[:, size - back : size - back + split].addcmul_(term[:, :split], weight[size - back])
                grad_x[:, start + split - back : end - back].addcmul_(term[:, split:], weight[size - back])
    return grad_x, grad_weight.t(), grad_bias, grad_state.transpose(1, 2)
