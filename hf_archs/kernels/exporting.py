"""Helpers for ops in exported graphs, which are made from one example and must be right at every length.

A graph of `torch.export`, and of `torch.onnx.export` on top of it, must hold no custom operator, which other runtimes
lack, and no Python loop over a symbolic length. `torch.jit.trace` makes a length that Python computes with a constant.

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
    """Whether a graph is being exported. A branch may then depend only on ``length == 1``: exporters fix that case."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def scan(step: Callable[[Any, Any], tuple[Any, Tensor]], state: Any, inputs: Any) -> tuple[Any, Tensor]:
    """Loop over t: ``step(state, inputs at t)`` gives the next state and an output. It is one operator of the graph.

    Args:
        state: tensors in tuples; ``step`` must keep their shapes and dtypes.
        inputs: tensors in tuples, whose first dimension is t.

    Returns:
        the last state, and the outputs of all t, stacked along the first dimension.
    """

    def own(state: Any, token: Any) -> tuple[Any, Any]:
        # torch's scan requires states with the strides of the initial one, and outputs that share no memory
        state, output = step(state, token)
        return tree_map(_fresh, state), output.clone()

    # ONNX graphs have no gradients, and their export may fail if the inputs of a scan require them
    if torch.onnx.is_in_onnx_export():
        state, inputs = tree_map(Tensor.detach, (state, inputs))
    return _scan(own, tree_map(_fresh, state), inputs)


def _fresh(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def count_chunks(length: int, size: int) -> int:
    """Chunks for ``length``, and one spare: with at least two, exporters do not fix this dimension at 1."""
    return (length + 2 * size - 1) // size


def in_chunks(t: Tensor, size: int) -> Tensor:
    """(b, l, ...) to (b, `count_chunks`, size, ...), zeros after the end."""
    chunks = count_chunks(t.shape[1], size)
    padded = F.pad(t, (*[0, 0] * (t.dim() - 2), 0, chunks * size - t.shape[1]))
    return padded.unflatten(1, (chunks, size))


def out_of_chunks(t: Tensor, length: int) -> Tensor:
    """The inverse of `in_chunks`: (b, chunks, size, ...) to (b, length, ...)."""
    # not a slice: exporters cannot prove that chunks * size >= length
    return t.flatten(1, 2).index_select(1, torch.arange(length, device=t.device))
