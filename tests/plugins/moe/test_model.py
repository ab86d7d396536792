"""The whole model: adapters on experts, routers in the Trainer, refused generation."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

import hf_archs
from hf_archs.testing.contract.models import assert_close, gradients, lively, logits, tokens
from hf_archs.training import ArchTrainer
from hf_archs_moe import ArchMoEForCausalLM

TINY = hf_archs.get_architecture("moe").tiny_config
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def model():
    return lively(ArchMoEForCausalLM, TINY(expert_layer_period=1))


def adapted(model):
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_lora_on_experts(model, tmp_path):
    """Each factor has a gradient and is saved, and merged equals unmerged."""
    ids = tokens(2, 19)
    wrapped = adapted(model)
    factors = [n for n, p in wrapped.named_parameters() if p.requires_grad and "experts" in n]
    assert len(factors) == 2 * 2 * 2
    for name, gradient in gradients(wrapped, wrapped(input_ids=ids, labels=ids).loss).items():
        assert gradient.abs().max() > 0, name
    expected = logits(wrapped, ids)
    assert (expected - logits(model, ids)).abs().max() > 1e-1
    wrapped.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close(logits(loaded, ids), expected, "loaded")
    merged = wrapped.merge_and_unload(safe_merge=True)
    assert_close(logits(merged, ids), expected, "merged")


def rows(count, length=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **options):
    common = {
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**common, **options})


def test_the_trainer_logs_every_router(tmp_path):
    model = ArchMoEForCausalLM(TINY(router="loss_free", expert_layer_period=1))
    trainer = ArchTrainer(
        model, arguments(tmp_path, max_steps=3, per_device_train_batch_size=4), train_dataset=rows(12)
    )
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        for layer in (0, 1):
            figures = {name: entry[f"router/layer_{layer}/{name}"] for name in ("max_load", "entropy", "drop_rate")}
            assert figures["max_load"] >= 1
            assert 0 < figures["entropy"] < 1.4
            assert figures["drop_rate"] == 0
    assert trainer.state.log_history[2]["router/layer_0/bias_range"] > 0
    assert all(layer.feed_forward.gate.e_score_correction_bias.abs().max() > 0 for layer in model.model.layers)


@pytest.mark.parametrize("router", [{"router_aux_loss_coef": 0.5}, {"router_z_loss_coef": 0.1}], ids=str)
def test_router_losses_under_accumulation(router, tmp_path):
    """Two equal batches accumulated in a step count as one, although the Trainer adds up their losses."""
    start = lively(ArchMoEForCausalLM, TINY(expert_layer_period=1, **router))
    once, twice = rows(2), rows(2) * 2
    found = []
    for data, steps in ((once, 1), (twice, 2)):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer = ArchTrainer(
            copy.deepcopy(start),
            arguments(tmp_path, max_steps=1, max_grad_norm=0.0, train_sampling_strategy="sequential", **options),
            train_dataset=data,
        )
        trainer.train()
        found.append((trainer.model.state_dict(), trainer.state.log_history[0]["loss"]))
    assert abs(found[0][1] - found[1][1]) < 1e-4 * found[0][1]
    gate = "model.layers.0.feed_forward.gate.weight"
    moved = found[0][0][gate] - start.state_dict()[gate]
    assert moved.abs().max() > 0
    assert_close(found[1][0][gate] - start.state_dict()[gate], moved, "step of the router", 1e-3)


@pytest.mark.parametrize("fields", [{}, {"router_z_loss_coef": 0.2}, {"router": "switch"}], ids=str)
def test_the_routers_loss_is_a_part_of_the_loss_by_its_coefficient(fields):
    """In training and evaluation, as in Mixtral; ``aux_loss`` itself is without the coefficient."""
    model = lively(ArchMoEForCausalLM, TINY(router_aux_loss_coef=0.3, **fields))
    ids = tokens(2, 19)
    for training in (True, False):
        out = model.train(training)(ids, labels=ids)
        plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert_close(out.loss, plain + 0.3 * out.aux_loss, "loss")
        assert len(out.router_logits) == sum(model.config.has_experts(i) for i in range(2))
        out = model(ids, labels=ids, output_router_logits=False)
        assert "aux_loss" not in out
        assert "router_logits" not in out
        assert_close(out.loss, plain, "the loss of the predictions alone")


def test_generate_leaves_the_routers_logits_alone(model):
    out = model.generate(tokens(1, 5), max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append("router_logits" in output))
    model.generate(tokens(1, 5), max_new_tokens=3)
    model.generate(tokens(1, 5), max_new_tokens=3, output_router_logits=True)
    assert len(out.logits) == 3
    assert seen == [False] * 3 + [True] * 3


@pytest.mark.parametrize("fields", [{"router": "loss_free"}, {"router": "expert_choice"}], ids=str)
def test_what_other_libraries_compute_with_are_numbers(fields):
    """TRL adds Mixtral's loss with the config's coefficient and number of experts per token."""
    config = TINY(**fields)
    assert config.router_aux_loss_coef == 0.0
    assert config.num_experts_per_tok == {"loss_free": 2, "expert_choice": 4}[config.router]
    with pytest.raises(StrictDataclassError, match=r"router_aux_loss_coef is 0.1; allowed is 0.0 with router"):
        TINY(router_aux_loss_coef=0.1, **fields)


def test_experts_that_choose_cannot_generate():
    model = ArchMoEForCausalLM(TINY(router="expert_choice"))
    ids = tokens(1, 9)
    assert model(ids, labels=ids).loss.isfinite()  # training and scoring are allowed
    with pytest.raises(
        ValueError, match=r"whose experts choose among all tokens .* so it cannot generate; allowed are"
    ):
        model.generate(ids, max_new_tokens=2)


def test_decoding_reads_the_experts_it_hits(model):
    """A token's result does not depend on the weights of experts that it did not choose."""
    ids = tokens(1, 9)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        hit = []
        for layer in model.model.layers:
            layer.feed_forward.gate.register_forward_hook(lambda _, __, out: hit.append(set(out[0].flatten().tolist())))
        step = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        for layer, used in zip(model.model.layers, hit):
            for expert in set(range(4)) - used:
                layer.feed_forward.experts.gate_up_proj[expert] = torch.nan
                layer.feed_forward.experts.down_proj[expert] = torch.nan
        assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, step)
