"""The automatic choice of an op's form, with a stand-in for the device."""

from types import SimpleNamespace

import pytest
import torch

from hf_archs.kernels import backend
from hf_archs.kernels.backend import backend_for, use_backend

GPU = SimpleNamespace(device=torch.device("cuda", 1))
OLD = "Tesla T4 has compute capability 7.5, and below 8.0 .* portable"


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A machine whose second device is a T4, and whose first one is an A100."""
    capabilities = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "_override", None)
    return capabilities


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "triton"), ((8, 6), "triton"), ((12, 0), "triton")])
def test_from_capability_8_on_it_is_triton(device, capability, chosen):
    device[1] = capability
    assert backend_for(GPU) == chosen


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_below_it_is_portable_with_one_warning(device, capability):
    device[1] = capability
    with pytest.warns(UserWarning, match=OLD.replace("7.5", ".".join(map(str, capability)))) as warned:
        assert [backend_for(GPU) for _ in range(3)] == ["portable"] * 3
    assert len(warned) == 1


def test_each_device_is_asked_for_itself():
    with pytest.warns(UserWarning, match=OLD):
        assert backend_for(GPU) == "portable"
    assert backend_for(SimpleNamespace(device=torch.device("cuda", 0))) == "triton"


def test_rocm_has_other_numbers(monkeypatch, device):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    device[1] = (7, 5)
    assert backend_for(GPU) == "triton"


def test_a_request_stands():
    for name in backend.BACKENDS:
        with use_backend(name):
            assert backend_for(GPU) == name


def test_without_triton_it_is_portable_with_one_warning(monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.warns(UserWarning, match="no triton package") as warned:
        assert [backend_for(GPU) for _ in range(2)] == ["portable"] * 2
    assert len(warned) == 1


@pytest.mark.parametrize(("capability", "factor"), [((9, 0), 2), ((7, 5), 3)])
def test_the_choice_is_a_constant_of_a_compiled_graph(device, capability, factor):
    torch._dynamo.reset()
    device[None] = capability  # of the tensor below

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x * (3 if backend._is_too_old(x.device) else 2)

    if capability < backend.OLDEST:
        with pytest.warns(UserWarning, match=OLD):
            function(torch.ones(1))
    assert function(torch.ones(1)) == factor
