"""Helpers of ops in exported graphs, which are made from one example and must be right at every length.

`torch.export`, and `torch.onnx.export` through it, know no custom operator and no loop over a symbolic length;
`torch.jit.trace` writes down the example's length wherever Python computes with it.

Letters: b batch, l length.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan as _scan
from torch.utils._pytree import tree_map


def any_length() -> bool:
    """Whether a graph is being exported: no branch may depend on a length, except on whether it is 1."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def scan(step: Callable[[Any, Any], tuple[Any, Tensor]], state: Any, inputs: Any) -> tuple[Any, Tensor]:
    """``step(state, inputs[t])`` gives the state after t and what comes of it; the loop is one operator of the graph.

    Args:
        state: tensors in tuples, which keep their shapes and dtypes.
        inputs: tensors in tuples, whose first dimension is t.

    Returns:
        the last state, and what came of all t, t first.
    """

    def own(state: Any, token: Any) -> tuple[Any, Any]:
        # which the operator asks for: states laid out as the first one, and no output in the memory of another
        state, output = step(state, token)
        return tree_map(_fresh, state), output.clone()

    if torch.onnx.is_in_onnx_export():  # whose graphs have no gradients, and lose their way where a loop might have one
        state, inputs = tree_map(Tensor.detach, (state, inputs))
    return _scan(own, tree_map(_fresh, state), inputs)


def _fresh(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def count_chunks(length: int, size: int) -> int:
    """One more than are needed, and so at least two: exporters take a dimension that is 1 for one that always is."""
    return (length + 2 * size - 1) // size


def in_chunks(t: Tensor, size: int) -> Tensor:
    """(b, l, ...) to (b, `count_chunks`, size, ...), zeros after the end."""
    chunks = count_chunks(t.shape[1], size)
    padded = F.pad(t, (*[0, 0] * (t.dim() - 2), 0, chunks * size - t.shape[1]))
    return padded.unflatten(1, (chunks, size))


def out_of_chunks(t: Tensor, length: int) -> Tensor:
    """The way back: (b, chunks, size, ...) to (b, length, ...)."""
    # not a slice: exporters cannot show that there are enough chunks for any length
    return t.flatten(1, 2).index_select(1, torch.arange(length, device=t.device))
