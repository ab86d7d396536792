"""Settings for every test, made before torch and triton are imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# inductor's cache does not depend on the fakes of ops, so it could return the graph of an older checkout
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run on CPU tensors

import pytest


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_memory():
    """`torch.empty` returns not-a-number, so that whatever a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` belong to machines that have one (`scripts/gpu`): elsewhere they are not part of the run."""
    if torch.cuda.is_available():
        return
    there = [item for item in items if item.get_closest_marker("gpu")]
    if there:
        config.hook.pytest_deselected(items=there)
        items[:] = [item for item in items if item not in there]
