"""Mamba-2's scan against transformers' own mathematics and against its reference."""

import math

import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from hf_archs.kernels.backend import use_backend
from hf_archs.testing.ops import check_op, outputs_and_gradients, relative_distance
from hf_archs_mamba2.ops.ssd_scan import ssd_scan, ssd_scan_reference


def make(b=2, l=70, g=2, h=4, n=8, p=6, dtype=torch.float32, state=True):
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": torch.randn(b, l, h, p, dtype=dtype),
        "dt": torch.randn(b, l, h, dtype=dtype),
        "A": -torch.rand(h, dtype=wide) - 0.1,
        "B": torch.randn(b, l, g, n, dtype=dtype),
        "C": torch.randn(b, l, g, n, dtype=dtype),
        "D": torch.randn(h, dtype=wide),
        "dt_bias": torch.randn(h, dtype=wide),
        "initial_state": torch.randn(b, h, p, n, dtype=wide) if state else None,
    }


def transformers_scan(x, dt, A, B, C, D, dt_bias, initial_state, dt_limit=(0.0, math.inf)):
    return mamba2_chunk_scan(
        x, dt, A, B, C, 16, D=D, dt_bias=dt_bias, initial_states=initial_state, dt_softplus=True, dt_limit=dt_limit,
        return_final_states=True,
    )  # fmt: skip


@pytest.mark.parametrize("op", [ssd_scan, ssd_scan_reference])
@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.2, 1.5)])
def test_it_is_the_scan_of_transformers(op, limits):
    """To float32's error, since transformers casts to float32 inside."""
    tensors = make()
    found = outputs_and_gradients(op, tensors, {"dt_limit": limits})
    expected = outputs_and_gradients(transformers_scan, tensors, {"dt_limit": limits})
    for name, value in expected.items():
        assert relative_distance(found[name], value) < 5e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("l", [1, 2, 70, 130])
def test_it_is_the_reference(l, dtype):
    options = {"seq_idx": (torch.rand(2, l) < 0.05).cumsum(1), "lengths": torch.tensor([l, l - l // 3])}
    check_op(ssd_scan, ssd_scan_reference, make(l=l, dtype=dtype), options)


def test_without_options():
    tensors = make(l=20, state=False) | {"D": None, "dt_bias": None}
    check_op(ssd_scan, ssd_scan_reference, tensors)


def test_precision_of_a_mixed_model():
    tensors = make(dtype=torch.bfloat16)
    y, state = ssd_scan(**tensors)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ssd_scan(**tensors)
    assert torch.equal(cast[0], y)
    assert torch.equal(cast[1], state)


def test_the_backend_is_asked():
    tensors = make(l=9)
    with use_backend("reference"):
        assert torch.equal(ssd_scan(**tensors)[0], ssd_scan_reference(**tensors)[0])
