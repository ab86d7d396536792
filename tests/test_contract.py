"""The contract, over every registered architecture: a new plugin is tested without writing a test."""

import pytest

import hf_archs
from hf_archs.testing.contract import ArchitectureContract


class TestContract(ArchitectureContract):
    @pytest.fixture(scope="class", params=hf_archs.architectures())
    @classmethod
    def architecture(cls, request):
        return hf_archs.get_architecture(request.param)


def test_there_are_architectures():
    """With no plugin loaded, every test above would be skipped without a word."""
    assert {"mamba", "mamba2", "retnet", "hyena"} <= set(hf_archs.architectures())
    assert not hf_archs.failed_plugins()
