"""Functions that several Triton kernels or their launchers call."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``, with fewer registers and more instructions than `sigmoids`: for large tiles, which would
    spill.
    """
    return 1 / (1 + tl.exp(tl.minimum(-x, 88.0)))  # above 88, exp overflows; the sigmoid is below 1e-38 there


@triton.jit
def sigmoids(x):
    """The sigmoid ``1 / (1 + exp(-x))`` and 1 minus it, in seven instructions, exact to three units in the last place
    of float32.

    exp2 and rsqrt are one instruction each; exp and a division would be five each, four of them for denormal numbers.
    """
    # exp2 overflows from 128 on, and the last product would be 0 * inf; the sigmoid is about 1e-38 there
    e = tl.exp2(tl.minimum(x * -1.4426950408889634, 126.0))
    root = tl.rsqrt(1 + e)
    return root * root, root * root * e


def row_unit(*sizes: int) -> int:
    """8 if it divides every size, else 1: the UNIT by which a launcher divides the sizes that a kernel gets.

    Triton looks only for arguments that are divisible by 16, and reads rows with another stride element by element,
    such as the 3,352 of the projection of Mamba2-130m. If a kernel gets stride / 8 and multiplies it by 8, the compiler
    knows a multiple of 8.
    """
    return 1 if any(size % 8 for size in sizes) else 8


def row_strides(t: Tensor, dims: int) -> list[int]:
    """The strides of the first ``dims`` dimensions; 0 for a dimension of size 1, whose stride is arbitrary."""
    return [0 if t.shape[dim] == 1 else t.stride(dim) for dim in range(dims)]
