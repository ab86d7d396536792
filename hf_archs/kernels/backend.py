"""The choice among the implementations of an op, which is made here and nowhere else.

There are three: ``reference`` (the recurrence as the paper writes it), ``portable`` (vectorised PyTorch, for CPU, MPS
and anything without Triton) and ``triton`` (CUDA and ROCm, or a CPU under ``TRITON_INTERPRET=1``).
NVIDIA GPUs below compute capability 8.0 (T4, RTX 20) get ``portable``: Triton's kernels use no tensor instructions
there, and spill kilobytes per thread.
The environment variable ``HF_ARCHS_BACKEND`` overrides the automatic choice, for debugging, also on those GPUs.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad

BACKENDS = ("reference", "portable", "triton")
OLDEST = (8, 0)  # the lowest compute capability for which Triton is chosen


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"HF_ARCHS_BACKEND is {name!r}; allowed are {', '.join(BACKENDS)}")
    return name


_override: str | None = _checked(os.environ.get("HF_ARCHS_BACKEND") or None)


# not functools.cache, of which torch.compile warns
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()


def has_triton() -> bool:
    """True where the ``triton`` package can be imported."""
    return _HAS_TRITON


def _warn_once(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"hf-archs: {why}, so every op runs in its portable PyTorch form", stacklevel=4)


@torch.compiler.assume_constant_result
def _is_too_old(device: torch.device) -> bool:
    """Whether ``device`` is an NVIDIA GPU below `OLDEST`; if so, warns once. (ROCm's capabilities mean other GPUs.)"""
    if torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return False
    number, oldest = (".".join(map(str, pair)) for pair in (capability, OLDEST))
    name = torch.cuda.get_device_name(device)
    _warn_once(f"{name} has compute capability {number}, and below {oldest} Triton does not use the tensor cores")
    return True


def _automatic(device: torch.device) -> str:
    if device.type != "cuda":  # ROCm devices are called "cuda" as well
        return "portable"
    if not has_triton():
        _warn_once("no triton package beside this GPU build of torch (install it: it is many times faster)")
        return "portable"
    return "portable" if _is_too_old(device) else "triton"


@torch.compiler.assume_constant_result  # safe, since torch.compile makes another graph under other transforms
def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active. Both ignore a custom operator or
    fail at it, so ops must then consist of PyTorch's own operators.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def backend_for(x: torch.Tensor) -> str:
    """The implementation for ``x``: one of `BACKENDS`, and ``reference`` if `is_transformed`."""
    return "reference" if is_transformed() else _override or _automatic(x.device)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one implementation inside a ``with`` block (``None``: the automatic choice).

    Raises:
        ValueError: for a name that is not in `BACKENDS`.
    """
    global _override
    before, _override = _override, _checked(name)
    try:
        yield
    finally:
        _override = before
