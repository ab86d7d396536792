"""What is measured of Hyena: its convolution against the published form of it, the model against a Llama."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hf_archs import bench
from hf_archs_hyena.long_conv import long_conv


def _published(x: Any, taps: Any, bias: Any, gate_in: Any, gate_out: Any) -> Any:
    """The Fourier convolution as HyenaDNA's code has it, in plain PyTorch operators."""
    v = (x * gate_in).transpose(1, 2)
    points = 2 * v.shape[2]
    spectrum = torch.fft.rfft(v.float(), points) * torch.fft.rfft(taps.float(), points)
    y = torch.fft.irfft(spectrum, points)[..., : v.shape[2]] + v * bias.unsqueeze(1)
    return y.to(x.dtype).transpose(1, 2) * gate_out


def _ours(**tensors: torch.Tensor) -> torch.Tensor:
    return long_conv(**tensors, need_state=False)[0]


def ops(device: torch.device) -> Iterator[bench.Measure]:
    """The convolution, forward and with its backward."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for b, l, c in [(8, 2048, 1024), (1, 65536, 1024)] if gpu else [(1, 1024, 256), (1, 16384, 256)]:
        tensors = {name: torch.randn(b, l, c, device=device, dtype=dtype) for name in ("x", "gate_in", "gate_out")}
        tensors |= {"taps": torch.randn(c, l, device=device), "bias": torch.randn(c, device=device)}
        label = f"long_conv {b} x {l} x {c}"
        moved = sum(t.nbytes for t in tensors.values()) + tensors["x"].nbytes
        alone = bench.forward(_ours, tensors), bench.forward(_published, tensors)
        yield bench.Measure(f"{label}, forward", "plain PyTorch", *alone, bytes_moved=moved)
        both = bench.forward_backward(_ours, tensors), bench.forward_backward(_published, tensors)
        yield bench.Measure(f"{label}, forward and backward", "plain PyTorch", *both, bytes_moved=3 * moved)


def models(device: torch.device) -> Iterator[bench.Measure]:
    """The whole model."""
    fields: dict[str, Any] = {"max_positions": 16384}
    targets = bench.Targets(step=1.0, long_step=0.45, long_growth=4.9)
    yield from bench.model_measures("hyena", device, fields, targets)
