"""Functions that several kernels call, and the unit in which they are handed strides."""

import pytest
import torch

from hf_archs.kernels import causal_conv1d
from hf_archs.kernels.backend import use_backend
from hf_archs.kernels.rms_norm_gated import rms_norm_gated

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
functions = pytest.importorskip("hf_archs.kernels.triton_functions")
sigmoids = functions.sigmoids


@triton.jit
def _sigmoids_kernel(x, positive, negative, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    s, rest = sigmoids(tl.load(x + place))
    tl.store(positive + place, s)
    tl.store(negative + place, rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_sigmoids_keep_their_small_values(dtype):
    """The relative error of exp(-x) is x units of the last place, since the exponent is rounded."""
    x = torch.linspace(-80, 80, 1024, dtype=dtype)
    found = torch.empty(2, 1024, dtype=dtype)
    _sigmoids_kernel[(1,)](x, found[0], found[1], SIZE=1024)
    expected = torch.stack([x.double(), -x.double()]).sigmoid()
    relative = ((found - expected) / expected).abs()
    assert relative.max() < 100 * torch.finfo(dtype).eps
    assert relative[:, x.abs() < 1].max() < 4 * torch.finfo(dtype).eps
    far = torch.tensor([-1e4, 1e4, -torch.inf, torch.inf] * 256, dtype=dtype)
    _sigmoids_kernel[(1,)](far, found[0], found[1], SIZE=1024)
    torch.testing.assert_close(found, torch.stack([far, -far]).sigmoid(), rtol=0, atol=1e-37)


def test_rows_of_eight_are_handed_over_in_units(monkeypatch):
    """A slice of Mamba2-130m's projection of 3,352: in units of one, every load would be of 2 bytes."""
    launches = []
    jit = pytest.importorskip("triton.runtime.jit")
    monkeypatch.setattr(
        jit.KernelInterface, "__getitem__", lambda kernel, grid: lambda *_, **given: launches.append(given["UNIT"])
    )

    def units(width, channels, batch=2):
        launches.clear()
        projected = torch.zeros(batch, 5, width, requires_grad=True)
        x, z = projected[:, :, :channels], projected[:, :, width - channels :]
        with use_backend("triton"):
            causal_conv1d(x, torch.zeros(channels, 4))[0].sum().backward()
            rms_norm_gated(x, torch.zeros(channels), z, eps=1e-5).sum().backward()
        return launches

    assert units(3352, 1536) == units(3352, 1536, batch=1) == [8] * 4
    assert units(3350, 1536) == units(3352, 1533) == [1] * 4
