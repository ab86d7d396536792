"""Benchmarks of RetNet: retention against flash-linear-attention's or the parallel form, the model against
Llama."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from hf_archs.testing import measuring
from hf_archs_retnet.ops.retention import cases, retention, retention_parallel


def _fla(**tensors: torch.Tensor) -> torch.Tensor:
    from fla.ops.retention import chunk_retention

    return chunk_retention(**tensors)


def ops(device: torch.device) -> Iterator[measuring.Measure]:
    """Retention, forward and with its backward."""
    fused = device.type == "cuda" and importlib.util.find_spec("fla")
    peer: Any = _fla if fused else retention_parallel
    name = "fla" if fused else "the parallel form"
    shapes = [(1, 1024, 4, 64, 128), (1, 2048, 4, 64, 128)]
    if device.type == "cuda":
        shapes = [(8, 2048, 8, 256, 512), (1, 8192, 8, 256, 512), (8, 2048, 16, 64, 128), (8, 2048, 8, 128, 256)]
        if not fused:  # the parallel form has a score of every pair of tokens
            shapes = [(1, *shape[1:]) for shape in shapes]
    sizes = [{"batch": b, "length": l, "heads": h, "key_dim": n, "value_dim": p} for b, l, h, n, p in shapes]
    for label, tensors in measuring.sized("retention", cases, ("q", "k", "v"), sizes, device):
        yield from measuring.op_measures(label, name, retention, peer, tensors, "v")


def models(device: torch.device) -> Iterator[measuring.Measure]:
    """The whole model."""
    fields: dict[str, Any] = {"num_heads": 4}
    targets = measuring.Targets(step=1.1, long_step=0.5, long_growth=4.9)
    yield from measuring.model_measures("retnet", device, fields, targets)
