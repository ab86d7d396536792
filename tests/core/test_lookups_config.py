"""Attributes of configs and models that other libraries look up, and their tables by model type."""

import copy
from dataclasses import fields

import pytest
import torch
from accelerate import big_modeling
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from peft.utils import constants
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import TransformersKwargs

import hf_archs
from hf_archs import registry
from hf_archs.testing.contract.models import assert_close, lively, logits, state_parameters, tokens

ARCHITECTURES = hf_archs.architectures()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return hf_archs.get_architecture(request.param)


@pytest.fixture
def model(architecture):
    return lively(architecture.causal_lm_class, architecture.tiny_config())


def test_every_table_knows_our_layer_types(architecture):
    """The tables of caches, of masks, and of types that a config may have."""
    config = architecture.tiny_config()
    assert len(config.layer_types) == config.num_hidden_layers
    for table in (
        ALLOWED_ATTN_LAYER_TYPES,
        DYNAMIC_LAYER_TYPE_MAPPING,
        STATIC_LAYER_TYPE_MAPPING,
        LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    ):
        assert set(config.layer_types) <= set(table)


def test_sequences_that_are_cut_between_processes_are_refused(model):
    """A recurrent state would restart on each process: accelerate checks the layer types, transformers a switch."""
    assert not model.supports_context_parallel
    if "linear_attention" in model.config.layer_types:
        for prepare in (
            big_modeling._refuse_recurrent_layers_under_sequence_parallelism,
            big_modeling._attach_context_parallel_hooks,
        ):
            with pytest.raises(ValueError, match="linear_attention"):
                prepare(model)


def test_forwards_take_every_argument_of_transformers(model):
    """`TransformersKwargs` names the arguments that transformers may pass to any base model or model with a head."""
    nothing = dict.fromkeys(TransformersKwargs.__optional_keys__)
    ids = tokens(1, 5)
    assert torch.equal(logits(model, ids, **nothing), logits(model, ids))
    with torch.no_grad():
        assert torch.equal(model.model(ids, **nothing).last_hidden_state, model.model(ids).last_hidden_state)


def test_predictions_are_the_logits(model, tmp_path):
    """`keys_to_ignore_at_inference` keeps caches and router logits out of the Trainer's predictions."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(3, 8)]
    found = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[])).predict(rows)
    assert found.predictions.shape == (3, 8, 128)


def test_quantisers_leave_the_states_alone(model):
    """They compare module names with `_keep_in_fp32_modules`."""
    left_out = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    inside = {name.rpartition(".")[0] for name in state_parameters(model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert should_convert_module(name, left_out) == (name not in inside), name


def test_every_tuner_has_default_targets(architecture):
    """Each tuner has a table by model type, a copy of LoRA's that PEFT makes on import."""
    with torch.device("meta"):
        model = architecture.causal_lm_class(architecture.tiny_config())
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()} | {"feed_forward_norm"}
    names |= {target for part in architecture.parts() for target in part.lora_targets}  # see the next test
    tables = [name for name in vars(constants) if name.endswith("_TARGET_MODULES_MAPPING")]
    assert len(tables) > 30
    for table in tables:
        found = getattr(constants, table)[architecture.model_type]
        assert found, table
        assert set(found) <= names, table


PARTS = [*map(registry.get_mixer, registry.mixers()), *map(registry.get_feed_forward, registry.feed_forwards())]


@pytest.mark.parametrize("part", [part for part in PARTS if part.name != "parallel"], ids=lambda part: part.name)
def test_targets_of_parts(part):
    """LoRA adapts every linear layer of every mixer and feed-forward, except those that make parameters of a recurrence
    or a gate of one number.
    """
    with torch.device("meta"):
        module = part.module_class(part.config_class(hidden_size=64, **part.tiny))
    linear = [name.split(".") for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    assert {path[-1] for path in linear if "ssm" not in path} == set(part.lora_targets)
    assert set(part.even_targets) <= set(part.lora_targets)


def test_default_lora_of_a_hybrid_reaches_every_layer_of_its_mixers():
    """The layers that the mixers' own architectures adapt, for any mixers."""
    mixers = {name: {"type": name, **registry.get_mixer(name).tiny} for name in ("mamba", "retnet", "hyena")}
    config = registry.get_architecture("hybrid").tiny_config(
        mixers=mixers, layer_pattern=[*mixers], num_hidden_layers=3, feed_forward=None, feed_forward_pattern=None
    )
    model = registry.get_architecture("hybrid").causal_lm_class(config)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    for layer, name in enumerate(mixers):
        module = wrapped.base_model.model.model.layers[layer].mixer
        adapted = {n.rpartition(".")[2] for n, child in module.named_modules() if hasattr(child, "lora_A")}
        assert adapted == set(registry.get_mixer(name).lora_targets), name
        assert adapted <= set(registry.get_architecture(name).lora_targets)


# PEFT says so of Llama's norms and sizes too
quiet = pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Invalid `oft_block_size`")
TUNERS = ["ADALORA", "BOFT", "FOURIERFT", "IA3", "LN_TUNING", "LOHA", "LOKR", "OFT", "VBLORA", "VERA"]


def check_tuner(model, tuner, **options):
    """Check that with a tuner's defaults all its parameters have gradients, and that merged equals unmerged."""
    ids = tokens(2, 9)
    plain = logits(model, ids)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[tuner](task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(copy.deepcopy(model), config).train()
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained
    with torch.no_grad():  # the gradient of a factor is zero if the other factor is
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    expected = logits(wrapped.eval(), ids)
    assert (expected - plain).abs().max() > 1e-3
    assert_close(logits(wrapped.merge_and_unload(), ids), expected, "merged", 1e-4)


@quiet
@pytest.mark.parametrize("tuner", TUNERS)
def test_tuners_train_and_merge_their_default_targets(tuner, model, monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)  # it compiles an extension
    options = {"total_step": 4, "n_frequency": 8, "vector_length": 4, "num_vectors": 16, "boft_block_size": 4}
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[tuner])}
    check_tuner(model, tuner, **{name: value for name, value in options.items() if name in known})


@quiet
@pytest.mark.parametrize("tuner", ["C3A", "MISS", "ROAD", "VBLORA"])
def test_tuners_that_cut_matrices_have_default_targets_that_fit(tuner, architecture):
    """With default sizes, as for a Llama of this width: no target has 80 or 3,352 features."""
    check_tuner(lively(architecture.causal_lm_class, architecture.tiny_config(hidden_size=512)), tuner)


def test_what_ia3_scales(architecture):
    """It scales the inputs of states, keys and values, and the hidden layer of feed-forwards."""
    scaled = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[architecture.model_type]
    inside = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[architecture.model_type]
    assert set(scaled) <= {"in_proj", "x_proj", "k_proj", "v_proj", "down_proj"}
    assert set(inside) == {"down_proj"} & set(scaled)


def prefixed(model, tuner):
    """The model with a learned cache of keys and values from PEFT."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[tuner](task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(copy.deepcopy(model), config)


@pytest.mark.parametrize("tuner", ["PREFIX_TUNING", "CARTRIDGE"])
def test_prefixes_are_refused_by_recurrent_layers(tuner, model):
    if set(model.config.layer_types) == {"full_attention"}:
        return
    with pytest.raises((ValueError, AttributeError), match="keys and values"):
        prefixed(model, tuner)(input_ids=tokens(2, 9))


@pytest.mark.parametrize("tuner", ["PREFIX_TUNING", "CARTRIDGE"])
def test_prefixes_of_attention(tuner):
    architecture = hf_archs.get_architecture("moe")  # 4 heads over 2 of keys and values
    model = lively(architecture.causal_lm_class, architecture.tiny_config())
    ids = tokens(2, 9)
    wrapped = prefixed(model, tuner)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in wrapped.prompt_encoder.parameters() if p.requires_grad)
    assert (logits(wrapped.eval(), ids) - logits(model, ids)).abs().max() > 1e-3


def test_shadow_networks(model):
    """PEFT copies the config with fewer layers and sets its `layer_types`."""
    wrapped = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING["SHADOW"](task_type="CAUSAL_LM"))
    ids = tokens(2, 9)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in wrapped.parameters())
    with pytest.raises(ValueError, match=r"layer_types is \['conv'\]; allowed is"):
        model.config.layer_types = ["conv"]


def test_continuous_batching_is_refused(model):
    """Its paged cache has keys and values only; `generate_batch` makes it first."""
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching()


def test_layers_that_peft_repeats(architecture):
    """`layer_replication` finds the layers by attribute names, and sets the config's number of layers."""
    if len({architecture.tiny_config().layer_plan(i).mixer for i in range(2)}) > 1:
        return  # a pattern does not know which of its layers was repeated
    model = lively(architecture.causal_lm_class, architecture.tiny_config())
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", layer_replication=[[0, 2], [1, 2]])).eval()
    assert len(wrapped.config.layer_types) == 3
    ids = tokens(2, 9)
    with torch.no_grad():
        first = wrapped(input_ids=ids[:, :5], use_cache=True)
        second = wrapped(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    assert_close(second.logits, logits(wrapped, ids, use_cache=False)[:, 5:], "continued")
