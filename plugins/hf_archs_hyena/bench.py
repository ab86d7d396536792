"""Benchmarks of Hyena: its convolution against the published form, the model against a Llama."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hf_archs.testing import measuring
from hf_archs_hyena.ops.long_conv import cases as long_conv_cases
from hf_archs_hyena.ops.long_conv import long_conv
from hf_archs_hyena.ops.modal import cases as modal_conv_cases
from hf_archs_hyena.ops.modal import modal_conv, modal_taps
from hf_archs_hyena.ops.toeplitz_conv import cases as toeplitz_conv_cases
from hf_archs_hyena.ops.toeplitz_conv import toeplitz_conv


def _published(x: Any, taps: Any, bias: Any, gate_in: Any, gate_out: Any) -> Any:
    """The Fourier convolution as HyenaDNA's code has it, in plain PyTorch operators."""
    v = (x * gate_in).transpose(1, 2)
    points = 2 * v.shape[2]
    spectrum = torch.fft.rfft(v.float(), points) * torch.fft.rfft(taps.float(), points)
    y = torch.fft.irfft(spectrum, points)[..., : v.shape[2]] + v * bias.unsqueeze(1)
    return y.to(x.dtype).transpose(1, 2) * gate_out


def _ours(**tensors: torch.Tensor) -> torch.Tensor:
    return long_conv(**tensors, need_state=False)[0]


def _conv1d(x: Any, taps: Any) -> Any:
    k, c = taps.shape[1], x.shape[2]
    y = F.conv1d(F.pad(x.transpose(1, 2), (k - 1, 0)), taps.flip(1).unsqueeze(1).to(x.dtype), groups=c)
    return y.transpose(1, 2)


def _by_taps(x: Any, log_decay: Any, phase: Any, residues: Any) -> Any:
    taps = modal_taps(log_decay, phase, residues, x.shape[1])
    return long_conv(x, taps, need_state=False)[0]


def ops(device: torch.device) -> Iterator[measuring.Measure]:
    """The convolutions, forward and with their backward."""
    shapes = [(8, 2048, 1024), (1, 65536, 1024)] if device.type == "cuda" else [(1, 1024, 256), (1, 16384, 256)]
    for b, l, c in shapes:
        rows = {"batch": b, "length": l}
        whole, modal = {**rows, "channels": c, "past": 0}, {**rows, "channels": c, "modes": 16}
        arguments: tuple[str, ...] = ("x", "gate_in", "gate_out", "taps", "bias")
        for label, tensors in measuring.sized("long_conv", long_conv_cases, arguments, [whole], device):
            yield from measuring.op_measures(label, "plain PyTorch", _ours, _published, tensors)
        explicit = [{**rows, "groups": c, "shared": 1, "taps": k} for k in (7, 128)]
        for label, tensors in measuring.sized("toeplitz_conv", toeplitz_conv_cases, ("x", "taps"), explicit, device):
            yield from measuring.op_measures(label, "conv1d", toeplitz_conv, _conv1d, tensors)
        arguments = ("x", "log_decay", "phase", "residues")
        for label, tensors in measuring.sized("modal_conv", modal_conv_cases, arguments, [modal], device):
            yield from measuring.op_measures(label, "taps and long_conv", modal_conv, _by_taps, tensors)


def models(device: torch.device) -> Iterator[measuring.Measure]:
    """The whole model."""
    fields: dict[str, Any] = {"max_positions": 16384}
    targets = measuring.Targets(step=1.0, long_step=0.45, long_growth=4.9)
    yield from measuring.model_measures("hyena", device, fields, targets)
