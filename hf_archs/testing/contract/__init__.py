"""The promises of every architecture, as tests. A plugin inherits all of them in a few lines:

::

    from hf_archs.testing.contract import ArchitectureContract

    class TestMine(ArchitectureContract):
        @pytest.fixture(scope="class")
        @classmethod
        def architecture(cls):
            return hf_archs.get_architecture("mine")

The models under test are tiny, but do not have their initial weights: with these, a state hardly changes the logits, so
tests would not notice the loss of a state. See `hf_archs.testing.contract.models`.
"""

import pytest

pytest.register_assert_rewrite(
    *(
        f"hf_archs.testing.contract.{name}"
        for name in (
            "adapters",
            "caching",
            "calls",
            "compiling",
            "configs",
            "generation",
            "masks",
            "models",
            "packing",
            "padding",
            "placement",
            "precision",
            "saving",
            "training",
        )
    )
)

from hf_archs.testing.contract.adapters import AdapterContract  # noqa: E402
from hf_archs.testing.contract.caching import CacheContract  # noqa: E402
from hf_archs.testing.contract.calls import CallContract  # noqa: E402
from hf_archs.testing.contract.compiling import CompileContract  # noqa: E402
from hf_archs.testing.contract.configs import ConfigContract  # noqa: E402
from hf_archs.testing.contract.generation import GenerationContract  # noqa: E402
from hf_archs.testing.contract.masks import MaskContract  # noqa: E402
from hf_archs.testing.contract.packing import PackingContract  # noqa: E402
from hf_archs.testing.contract.padding import PaddingContract  # noqa: E402
from hf_archs.testing.contract.placement import PlacementContract  # noqa: E402
from hf_archs.testing.contract.precision import PrecisionContract  # noqa: E402
from hf_archs.testing.contract.saving import SavingContract  # noqa: E402
from hf_archs.testing.contract.training import TrainingContract  # noqa: E402


class ArchitectureContract(
    SavingContract,
    PaddingContract,
    CacheContract,
    CallContract,
    GenerationContract,
    MaskContract,
    PackingContract,
    TrainingContract,
    AdapterContract,
    CompileContract,
    PrecisionContract,
    PlacementContract,
    ConfigContract,
):
    """Every promise of every architecture; see the module's docstring."""


__all__ = [
    "AdapterContract",
    "ArchitectureContract",
    "CacheContract",
    "CallContract",
    "CompileContract",
    "ConfigContract",
    "GenerationContract",
    "MaskContract",
    "PackingContract",
    "PaddingContract",
    "PlacementContract",
    "PrecisionContract",
    "SavingContract",
    "TrainingContract",
]
