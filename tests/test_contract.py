"""The contract, over every registered architecture: a new plugin is tested without writing a test."""

import pytest

import hf_archs
from hf_archs.testing.contract import ArchitectureContract


class TestContract(ArchitectureContract):
    @pytest.fixture(scope="class", params=hf_archs.architectures())
    @classmethod
    def architecture(cls, request):
        return hf_archs.get_architecture(request.param)
