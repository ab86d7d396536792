"""The contract over configs that one tiny model does not cover: every router, and every pair of mixers."""

import dataclasses
import itertools

import pytest
import torch

import hf_archs
from hf_archs import registry
from hf_archs.testing.contract import (
    ArchitectureContract,
    CacheContract,
    GenerationContract,
    MaskContract,
    PackingContract,
    PaddingContract,
    PrecisionContract,
    SavingContract,
    TrainingContract,
)
from hf_archs.testing.contract.models import assert_remembers, lively

# with a capacity, a token's result in training depends on other tokens: these routers promise evaluation only, and
# tests/plugins/moe/test_routing.py checks training by hand
CAPACITIES = {
    "switch": {"router": "switch", "capacity_factor": 1.25},
    "gshard": {"router": "gshard", "capacity_factor": 2.0},
    "expert_choice": {"router": "expert_choice", "causal_predictor": True},
}
LOSS_FREE = {"router": "loss_free", "score_function": "sigmoid", "gated": False, "hidden_act": "relu2"}

# retention's first outputs may be nearly zero by chance, and its norm then amplifies float32's rounding errors; so do
# filters of large random weights at many positions
CALMER = {"retnet": {"num_heads": 4, "norm_eps": 0.1}, "hyena": {"max_positions": 256}}
ENTRIES = [registry.get_mixer(name) for name in registry.mixers()]
MIXERS = {
    entry.name: {"type": entry.name, **entry.tiny, **CALMER.get(entry.name, {})}
    for entry in ENTRIES
    if entry.parts is None and not entry.name.startswith("toy")
}
FEED_FORWARDS = {name: {"type": name, **registry.get_feed_forward(name).tiny} for name in ("mlp", "moe")}
HYBRIDS = [
    ("attention+mamba sliding_attention+retnet memory+hyena mamba2", "mlp"),
    ("attention mamba", "moe"),
    ("memory+hyena mamba2", ""),
    ("sliding_attention retnet+mamba", "mlp"),
]
IN_HYBRIDS = {name for pattern, _ in HYBRIDS for entry in pattern.split() for name in entry.split("+")}
HYBRIDS += [(f"{name} attention", "mlp") for name in MIXERS if name not in IN_HYBRIDS]  # newer mixers


def variant(name, **tiny):
    architecture = hf_archs.get_architecture(name)
    return dataclasses.replace(architecture, tiny={**architecture.tiny, **tiny})


def hybrid(pattern, feed_forward):
    named = {name for entry in pattern.split() for name in entry.split("+")}
    return variant(
        "hybrid",
        mixers={name: MIXERS[name] for name in named},
        layer_pattern=pattern,
        num_hidden_layers=len(pattern.split()),
        feed_forward={feed_forward: FEED_FORWARDS[feed_forward]} if feed_forward else {},
        feed_forward_pattern=None,
    )


def calm(architecture):
    """A lively model with linear layers that keep the size of what they get.

    Several mixers in a row would amplify what float32 rounds beyond any tolerance.
    """
    model = lively(architecture.causal_lm_class, architecture.tiny_config())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                module.weight.mul_(2 / 3)
    assert_remembers(model)
    return model


class StatesContract(
    SavingContract,
    PaddingContract,
    CacheContract,
    GenerationContract,
    PackingContract,
    TrainingContract,
    PrecisionContract,
):
    """Contracts that a combination of parts may break; adapters, compilers, places and fields are tested per part."""


class TestCapacities(PaddingContract, CacheContract, GenerationContract, PackingContract, PrecisionContract):
    @pytest.fixture(scope="class", params=CAPACITIES)
    @classmethod
    def architecture(cls, request):
        return variant("moe", **CAPACITIES[request.param])

    test_every_parameter_has_a_gradient = TrainingContract.test_every_parameter_has_a_gradient

    @pytest.fixture(scope="class")
    @classmethod
    def shared_model(cls, architecture):
        model = lively(architecture.causal_lm_class, architecture.tiny_config())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("predictor" not in name)  # its loss exists in training only
        return model


class TestLossFree(StatesContract):
    @pytest.fixture(scope="class")
    @classmethod
    def architecture(cls):
        return variant("moe", **LOSS_FREE)


class TestEveryMixerInAHybrid(StatesContract):
    """Few models in which each mixer stands beside, before and behind others; the first has every pair."""

    @pytest.fixture(
        scope="class",
        params=HYBRIDS,
        ids=lambda p: " ".join(p),
    )
    @classmethod
    def architecture(cls, request):
        return hybrid(*request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def shared_model(cls, architecture):
        return calm(architecture)


class TestAttentionAlone(MaskContract, CacheContract, PackingContract):
    """A window, and two mixers side by side, under masks of four dimensions."""

    @pytest.fixture(scope="class")
    @classmethod
    def architecture(cls):
        fields = {
            "mixers": {"attention": MIXERS["attention"], "window": {**MIXERS["sliding_attention"], "global_tokens": 0}}
        }
        pattern = {"layer_pattern": "attention window attention+window", "num_hidden_layers": 3}
        return variant("hybrid", **fields, **pattern)

    @pytest.fixture(scope="class")
    @classmethod
    def shared_model(cls, architecture):
        return calm(architecture)


PAIRS = [
    (f"{a}{joint}{b}", feed_forward)
    for (a, b), joint, feed_forward in itertools.product(
        itertools.combinations_with_replacement(MIXERS, 2), (" ", "+"), ("mlp", "moe")
    )
    if a != b
]


def test_every_registered_mixer_is_here():
    assert {*MIXERS, "parallel"} == {name for name in registry.mixers() if not name.startswith("toy")}


@pytest.mark.pairs
class TestPairs(ArchitectureContract):
    """Every pair of mixers, one after the other and side by side, with experts and without. An hour: -m pairs."""

    @pytest.fixture(scope="class", params=PAIRS, ids=lambda p: " ".join(p))
    @classmethod
    def architecture(cls, request):
        return hybrid(*request.param)

    @pytest.fixture(scope="class")
    @classmethod
    def shared_model(cls, architecture):
        return calm(architecture)
