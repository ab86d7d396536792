"""TRL's trainers ask a config for `output_router_logits` and `router_aux_loss_coef`, and a model for `aux_loss`."""

import copy
import importlib

import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

import hf_archs
from hf_archs.testing.contract.models import enliven

# TRL still uses old names of transformers
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

COEFFICIENT = 0.5
PREFERENCES = {"prompt": ["1 2 3", "4 5"], "chosen": [" 6 7 8 9", " 10 11"], "rejected": [" 12", " 13 14 15"]}
# the trainer: its module, its data, and its own options
TRAINERS = {
    "SFT": ("trl", {"text": ["1 2 3 4 5 6 7", "8 9 10 11"]}, {}),
    "SFT dft": ("trl", {"text": ["1 2 3 4 5 6 7", "8 9 10 11"]}, {"loss_type": "dft"}),
    "DPO": ("trl", PREFERENCES, {}),
    "KTO": ("trl", {"prompt": ["1 2 3", "4 5"], "completion": [" 6 7 8 9", " 10 11"], "label": [True, False]}, {}),
    "GRPO": ("trl", {"prompt": ["1 2 3", "4 5"]}, {"num_generations": 2, "max_completion_length": 4}),
    "RLOO": ("trl", {"prompt": ["1 2 3", "4 5"]}, {"num_generations": 2, "max_completion_length": 4, "beta": 0.0}),
    "ORPO": ("trl.experimental.orpo", PREFERENCES, {"max_length": 16}),
    "CPO": ("trl.experimental.cpo", PREFERENCES, {"max_length": 16}),
}


def mixtral(**fields):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=COEFFICIENT,
        **fields,
    )
    return enliven(MixtralForCausalLM(config))


def first_step(name, model, tokenizer, folder, **options):
    """The figures that a trainer logs for a model's first step, at a learning rate of 0."""
    module, data, own = TRAINERS[name]
    kind = name.partition(" ")[0]
    trainer_class = getattr(importlib.import_module(module), f"{kind}Trainer")
    config_class = getattr(importlib.import_module(module), f"{kind}Config")
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    few = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 2, "logging_steps": 1}
    arguments = config_class(folder, gradient_checkpointing=False, **quiet, **few, **own, **options)
    more = {}
    if kind in ("DPO", "KTO"):
        more["ref_model"] = copy.deepcopy(model)
    if kind in ("GRPO", "RLOO"):
        more["reward_funcs"] = lambda completions, **kwargs: [float(len(c)) for c in completions]
    torch.manual_seed(0)
    trainer = trainer_class(
        model, args=arguments, train_dataset=Dataset.from_dict(data), processing_class=tokenizer, **more
    )
    trainer.train()
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_converted_mixtral_trains_as_the_native_one(name, word_tokenizer, tmp_path):
    native = mixtral(output_router_logits=True)
    ours = hf_archs.from_native(native)
    expected = first_step(name, native, word_tokenizer, tmp_path)
    found = first_step(name, ours, word_tokenizer, tmp_path)
    assert abs(found["loss"] - expected["loss"]) < 1e-4
    if "aux_loss" in expected:  # ORPO and CPO do not log it
        assert expected["aux_loss"] > 1
        assert abs(found["aux_loss"] - expected["aux_loss"]) < 1e-4


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_a_model_without_experts_has_no_such_loss(name, word_tokenizer, tmp_path):
    """It trains, and TRL refuses a coefficient."""
    architecture = hf_archs.get_architecture(name)
    fields = {} if name == "mamba" else {"feed_forward": None, "feed_forward_pattern": None}
    model = architecture.causal_lm_class(architecture.tiny_config(**fields))
    assert "aux_loss" not in first_step("SFT", model, word_tokenizer, tmp_path)
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        first_step("SFT", model, word_tokenizer, tmp_path, router_aux_loss_coef=COEFFICIENT)


@pytest.mark.parametrize("name", ["moe", "hybrid"])
def test_a_coefficient_of_the_trainer_is_taken(name, word_tokenizer, tmp_path):
    """A coefficient of 0 omits the loss, and any other multiplies it."""
    architecture = hf_archs.get_architecture(name)
    model = enliven(architecture.causal_lm_class(architecture.tiny_config()))
    losses = {c: first_step("SFT", model, word_tokenizer, tmp_path, router_aux_loss_coef=c) for c in (0.0, 1.0, 2.0)}
    assert "aux_loss" not in losses[0.0]
    auxiliary = losses[1.0]["aux_loss"]
    assert auxiliary > 0.5
    assert abs(losses[1.0]["loss"] - losses[0.0]["loss"] - auxiliary) < 1e-3
    assert abs(losses[2.0]["loss"] - losses[0.0]["loss"] - 2 * auxiliary) < 1e-3
