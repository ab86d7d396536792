"""Plans and units of distributed models, in one process; tests/test_distributed.py uses two."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import hf_archs
from hf_archs.model import sharding
from hf_archs.testing.contract.models import TOLERANCE, enliven, lively, logits, tokens


@pytest.fixture(params=hf_archs.architectures())
def architecture(request):
    return hf_archs.get_architecture(request.param)


@pytest.mark.parametrize("kind", ["model_class", "causal_lm_class", "masked_lm_class"])
def test_the_plan_of_a_pipeline_is_true(architecture, kind):
    model_class = getattr(architecture, kind)
    model = model_class(architecture.tiny_config(bidirectional=kind == "masked_lm_class"))
    assert model.supports_pp_plan
    names = ["embed_tokens", "layers", "norm"]
    if kind != "model_class":
        names = [*(f"model.{name}" for name in names), "lm_head"]
    assert [name for name, _ in model.named_modules() if name in model.pp_plan] == names
    assert len(model.pp_plan) == len(names)
    layer = model.base_model.layers[0]
    taken, given = model.pp_plan[names[1]]
    assert [*inspect.signature(layer.forward).parameters][: len(taken)] == taken
    assert given == taken[:1]


def test_embedding_adapters_are_scaled_as_the_embedding(architecture):
    config = architecture.tiny_config(embedding_multiplier=8.0, tie_word_embeddings=False)
    model = get_peft_model(
        lively(architecture.causal_lm_class, config),
        LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM", r=4),
    )
    before = logits(model, tokens(1, 9))
    enliven(model)
    adapted = logits(model, tokens(1, 9))
    assert (adapted - before).abs().max() > 0.1
    merged = logits(model.merge_and_unload(), tokens(1, 9))
    assert (merged - adapted).abs().max() < TOLERANCE * adapted.abs().max()


def test_units_of_another_model_are_refused():
    with pytest.raises(ValueError, match="model is a Linear; allowed is a model of hf_archs"):
        hf_archs.fully_shard(nn.Linear(2, 2))


def test_states_where_a_unit_has_one_group():
    """As in older versions of torch, whose units have one group."""
    holder, other = nn.Linear(1, 1), nn.Linear(1, 1)

    def state(*dtypes):
        pairs = zip((holder, other), dtypes)
        parameters = [
            SimpleNamespace(_module_info=SimpleNamespace(module=m), sharded_param=torch.zeros(1, dtype=dtype))
            for m, dtype in pairs
        ]
        return SimpleNamespace(
            _fsdp_param_group=SimpleNamespace(fsdp_params=parameters, mp_policy=MixedPrecisionPolicy()),
        )

    sharding._part(state(torch.float32, torch.float32), {holder})
    alone = state(torch.float32)
    sharding._part(alone, {holder})
    assert not alone._mp_policy.cast_forward_inputs
    with pytest.raises(ValueError, match=r"stay in float32.*hf_archs.fully_shard\(model\)"):
        sharding._part(state(torch.float32, torch.bfloat16), {holder})
