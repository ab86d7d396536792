"""Functions that several Triton kernels call, and what their launchers share."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``. It takes fewer registers and more instructions than `sigmoids`, with which large tiles
    spill.
    """
    return 1 / (1 + tl.exp(tl.minimum(-x, 88.0)))  # beyond, exp overflows and the sigmoid is nothing


@triton.jit
def sigmoids(x):
    """``1 / (1 + exp(-x))`` and one less that, within three units of the last place of float32, in seven instructions.

    exp2 and rsqrt are one instruction each; exp and a division are five each, four of them for denormal numbers.
    """
    # beyond, exp2 overflows and the sigmoid is nothing
    e = tl.exp2(tl.minimum(x * -1.4426950408889634, 126.0))
    root = tl.rsqrt(1 + e)
    return root * root, root * root * e


def row_unit(*sizes: int) -> int:
    """8 where it divides every size, else 1: the unit in which a kernel is handed its strides.

    Triton asks a number for its divisibility by 16 only, and reads rows that are 8 apart, or 3,352 of them (the
    projection of a Mamba-2 of 130M), element by element. A stride times 8 it knows to be a multiple of 8.
    """
    return 1 if any(size % 8 for size in sizes) else 8


def row_strides(t: Tensor, dims: int) -> list[int]:
    """The strides of the first ``dims`` dimensions; 0 for one of a single entry, whose stride may be anything."""
    return [0 if t.shape[dim] == 1 else t.stride(dim) for dim in range(dims)]
