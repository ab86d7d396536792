"""Benchmarks of Mamba-2: its scan against mamba_ssm's and transformers', the model against transformers'."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from hf_archs.testing import measuring
from hf_archs_mamba2.ops.ssd_scan import cases, ssd_scan


def _mamba_ssm(**tensors: torch.Tensor) -> torch.Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(**tensors, chunk_size=256, dt_softplus=True)


def _transformers(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256, D=D, dt_softplus=True)


def ops(device: torch.device) -> Iterator[measuring.Measure]:
    """The scan, forward and with its backward."""
    fused = device.type == "cuda" and importlib.util.find_spec("mamba_ssm")
    peer: Any = _mamba_ssm if fused else _transformers
    name = "mamba_ssm" if fused else "transformers"
    shapes = (
        [(8, 2048, 80, 128), (1, 8192, 80, 128)] if device.type == "cuda" else [(1, 1024, 8, 16), (1, 1024, 8, 128)]
    )
    rest = {"head_dim": 64, "groups": 1}
    sizes = [{"batch": b, "length": l, "heads": h, "state": n, **rest} for b, l, h, n in shapes]
    for label, tensors in measuring.sized("ssd_scan", cases, ("x", "dt", "A", "B", "C", "D"), sizes, device):
        yield from measuring.op_measures(label, name, ssd_scan, peer, tensors)


def models(device: torch.device) -> Iterator[measuring.Measure]:
    """The whole model."""
    fields: dict[str, Any] = {"state_size": 16, "head_dim": 64}
    targets = measuring.Targets(step=1.0, long_step=0.45, growth=4.4, native_step=0.8, prefill=1.0, decode=0.7)
    config = Mamba2Config(**measuring.SIZE, **fields, expand=2, num_heads=8, n_groups=1, tie_word_embeddings=True)
    yield from measuring.model_measures("mamba2", device, fields, targets, Mamba2ForCausalLM(config))
