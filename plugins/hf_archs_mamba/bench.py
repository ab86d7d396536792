"""Benchmarks of Mamba: the selective scan against mamba_ssm's CUDA kernel, the model against transformers'."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from transformers import MambaConfig, MambaForCausalLM

from hf_archs.kernels.backend import use_backend
from hf_archs.testing import measuring
from hf_archs_mamba.ops.selective_scan import cases, selective_scan


def _mamba_ssm(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any) -> torch.Tensor:
    """The same through mamba_ssm, which wants the length last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C, z = (t.transpose(1, 2).contiguous() for t in (x, dt, B, C, z))
    return selective_scan_fn(x, dt, A, B, C, D, z, delta_softplus=True).transpose(1, 2)


def _portable(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with use_backend("portable"):
        return selective_scan(**tensors)


def _loop(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with use_backend("reference"):
        return selective_scan(**tensors)


def ops(device: torch.device) -> Iterator[measuring.Measure]:
    """The scan, forward and with its backward."""
    peer: Any
    if device.type == "cuda":
        shapes = [(8, 2048, 1536), (8, 2048, 5120), (1, 8192, 5120), (64, 1, 5120)]
        fused = importlib.util.find_spec("mamba_ssm") is not None
        peer, name = (_mamba_ssm, "mamba_ssm") if fused else (_portable, "portable")
    else:
        shapes = [(1, 1024, 512), (8, 512, 512)]
        peer, name = _loop, "the paper's loop"
    sizes = [{"batch": b, "length": l, "channels": c, "state": 16} for b, l, c in shapes]
    for label, tensors in measuring.sized("selective_scan", cases, ("x", "dt", "A", "B", "C", "D", "z"), sizes, device):
        yield from measuring.op_measures(label, name, selective_scan, peer, tensors)


def models(device: torch.device) -> Iterator[measuring.Measure]:
    """The whole model; transformers' training step takes many seconds, so it is run twice only."""
    fields: dict[str, Any] = {"state_size": 16, "expand": 2}
    targets = measuring.Targets(step=1.0, long_step=0.45, growth=4.4, native_step=0.01, prefill=0.25, decode=0.6)
    native = MambaForCausalLM(MambaConfig(**measuring.SIZE, **fields))
    yield from measuring.model_measures("mamba", device, fields, targets, native, native_pairs=1)
