"""Every op's Triton form on a real GPU: outputs and all gradients against the float64 reference, and compiled."""

from __future__ import annotations

import pytest
import torch

from hf_archs.kernels import causal_conv1d
from hf_archs.kernels.backend import use_backend
from hf_archs.kernels.conv import causal_conv1d_reference
from hf_archs.kernels.decay_scan import decay_scan, decay_scan_reference
from hf_archs.kernels.rms_norm_gated import rms_norm_gated, rms_norm_gated_reference
from hf_archs.testing.ops import check_op
from hf_archs_hyena.ops.long_conv import long_conv, long_conv_reference
from hf_archs_hyena.ops.modal import modal_conv, modal_conv_reference
from hf_archs_hyena.ops.toeplitz_conv import toeplitz_conv, toeplitz_conv_reference
from hf_archs_mamba.ops.selective_scan import selective_scan, selective_scan_reference
from hf_archs_mamba2.ops.ssd_scan import ssd_scan, ssd_scan_reference
from hf_archs_retnet import retention, retention_reference

pytestmark = pytest.mark.gpu


def _randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def _boundaries(batch, length, packed):
    """Documents that end anywhere, and one row that ends early."""
    if not packed:
        return {}
    seq_idx = (torch.rand(batch, length, device="cuda") < 0.05).long().cumsum(1)
    return {"seq_idx": seq_idx, "lengths": torch.tensor([length, length // 3], device="cuda")[:batch]}


def _selective_scan(length, dtype, packed):
    b, c, n = 2, 80, 16
    tensors = {
        "x": _randn(b, length, c, dtype=dtype),
        "dt": _randn(b, length, c) - 2,
        "A": -torch.rand(c, n, device="cuda") * 8,
        "B": _randn(b, length, n, dtype=dtype),
        "C": _randn(b, length, n, dtype=dtype),
        "D": _randn(c),
        "z": _randn(b, length, c, dtype=dtype),
        "dt_bias": _randn(c),
        "initial_state": _randn(b, c, n),
    }
    return selective_scan, selective_scan_reference, tensors, _boundaries(b, length, packed)


def _ssd_scan(length, dtype, packed):
    b, h, p, g, n = 2, 4, 64, 2, 128
    tensors = {
        "x": _randn(b, length, h, p, dtype=dtype),
        "dt": _randn(b, length, h) - 2,
        "A": -torch.rand(h, device="cuda") * 8,
        "B": _randn(b, length, g, n, dtype=dtype),
        "C": _randn(b, length, g, n, dtype=dtype),
        "D": _randn(h),
        "dt_bias": _randn(h),
        "initial_state": _randn(b, h, p, n),
    }
    return ssd_scan, ssd_scan_reference, tensors, _boundaries(b, length, packed)


def _decay_scan(length, dtype, packed):
    b, h, p, n = 1, 2, 512, 256  # the largest heads that must stay fast
    tensors = {
        "q": _randn(b, length, h, n, dtype=dtype),
        "k": _randn(b, length, h, n, dtype=dtype) / 16,
        "v": _randn(b, length, h, p, dtype=dtype),
        "log_decay": -torch.rand(b, length, h, device="cuda"),
        "initial_state": _randn(b, h, p, n),
    }
    return decay_scan, decay_scan_reference, tensors, _boundaries(b, length, packed)


def _retention(length, dtype, packed):
    b, h, p, n = 1, 2, 512, 256  # decays that nothing learns: the backward has less to do
    tensors = {
        "q": _randn(b, length, h, n, dtype=dtype),
        "k": _randn(b, length, h, n, dtype=dtype),
        "v": _randn(b, length, h, p, dtype=dtype),
        "initial_state": _randn(b, h, p, n),
    }
    return retention, retention_reference, tensors, _boundaries(b, length, packed)


def _causal_conv1d(length, dtype, packed):
    b, c, w = 2, 200, 4
    tensors = {
        "x": _randn(b, length, c, dtype=dtype),
        "weight": _randn(c, w),
        "bias": _randn(c),
        "initial_state": _randn(b, c, w - 1, dtype=dtype),
    }
    return causal_conv1d, causal_conv1d_reference, tensors, {"activation": "silu", **_boundaries(b, length, packed)}


def _rms_norm_gated(length, dtype, packed):
    tensors = {
        "x": _randn(2, length, 512, dtype=dtype),
        "weight": _randn(512, dtype=dtype),
        "z": _randn(2, length, 512, dtype=dtype),
    }
    return rms_norm_gated, rms_norm_gated_reference, tensors, {"eps": 1e-5, "group_size": 256}


def _long_conv(length, dtype, packed):
    b, c = 2, 100
    tensors = {name: _randn(b, length, c, dtype=dtype) for name in ("x", "gate_in", "gate_out")}
    tensors |= {
        "taps": _randn(c, 200),
        "bias": _randn(c),
        "initial_state": _randn(b, c, 40, dtype=dtype),
    }
    return long_conv, long_conv_reference, tensors, _boundaries(b, length, packed)


def _toeplitz_conv(length, dtype, packed, groups=200, channels=1, taps=7):
    b, c = 2, groups * channels
    tensors = {
        "x": _randn(b, length, c, dtype=dtype),
        "taps": _randn(groups, taps),
        "bias": _randn(c),
        "initial_state": _randn(b, c, taps - 1, dtype=dtype),
    }
    return toeplitz_conv, toeplitz_conv_reference, tensors, _boundaries(b, length, packed)


def _toeplitz_conv_of_groups(length, dtype, packed):
    return _toeplitz_conv(length, dtype, packed, groups=4, channels=32, taps=128)  # as matrix products


def _modal_conv(length, dtype, packed):
    b, c, m = 2, 100, 16
    tensors = {
        "x": _randn(b, length, c, dtype=dtype),
        "log_decay": _randn(c, m) - 3,
        "phase": _randn(c, m),
        "residues": _randn(c, m, 2),
        "bias": _randn(c),
        "initial_state": _randn(b, c, m, 2),
    }
    return modal_conv, modal_conv_reference, tensors, _boundaries(b, length, packed)


OPS = (_selective_scan, _ssd_scan, _decay_scan, _retention, _causal_conv1d, _rms_norm_gated)
OPS += (_long_conv, _toeplitz_conv, _toeplitz_conv_of_groups, _modal_conv)
CASES = {f.__name__.lstrip("_"): f for f in OPS}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 65, 300])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, length, dtype, packed):
    op, reference, tensors, options = CASES[case](length, dtype, packed)
    with use_backend("triton"):
        check_op(op, reference, tensors, options)


@pytest.mark.parametrize("case", CASES)
def test_compiles_once_for_all_lengths(case):
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    op = CASES[case](64, torch.bfloat16, False)[0]
    compiled = torch.compile(op, backend=counter, fullgraph=True, dynamic=True)
    for length in (64, 96, 200):
        _, _, tensors, options = CASES[case](length, torch.bfloat16, False)
        got, expected = compiled(**tensors, **options), op(**tensors, **options)
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
