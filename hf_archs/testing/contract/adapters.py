"""PEFT: adapters reach every linear layer, merge, stack and generate; the states' parameters train beside them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import nn

from hf_archs.kernels.backend import use_backend
from hf_archs.registry import Architecture, get_feed_forward
from hf_archs.testing.contract.generation import generate
from hf_archs.testing.contract.models import (
    STATE_MODULE,
    Contract,
    assert_close,
    forward,
    gradients,
    lively,
    logits,
    state_parameters,
    tokens,
)


def linear_names(model: nn.Module) -> set[str]:
    """The full names of every linear layer but the head."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}


def adapted(model: nn.Module) -> set[str]:
    """The full names of the layers with an adapter."""
    parts = {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    return {name.removeprefix("base_model.model.") for name in parts}


def lora(**options: Any) -> LoraConfig:
    """A LoRA whose second factor is not zero, so that it changes the model and both factors have gradients."""
    return LoraConfig(r=4, lora_alpha=16, task_type=TaskType.CAUSAL_LM, init_lora_weights=False, **options)


class AdapterContract(Contract):
    """Promises about PEFT."""

    @pytest.mark.parametrize("route", ["portable", "triton"])
    def test_lora_on_every_linear_layer(self, architecture: Architecture, route: str) -> None:
        """In training mode and on both backends, both factors of every adapter have a gradient that is not zero."""
        model = lively(architecture.causal_lm_class, architecture.tiny_config(hidden_size=32, num_hidden_layers=1))
        names = linear_names(model)
        wrapped = get_peft_model(model, lora(target_modules="all-linear")).train()
        assert adapted(wrapped) == names
        with use_backend(route):
            found = gradients(wrapped, wrapped(input_ids=tokens(1, 9), labels=tokens(1, 9)).loss)
        assert len(found) == 2 * len(names)
        for name, gradient in found.items():
            assert gradient.abs().max() > 1e-6, f"{name}: {gradient.abs().max():.1e} on the {route} route"

    def test_default_targets(self, model: Any, architecture: Architecture) -> None:
        """Without ``target_modules``, LoRA adapts the layers that the model's mixers and feed-forwards name."""
        plans = model.config.layer_plans()
        mixers = [entry for plan in plans for entry, _ in plan.mixers()]
        feed_forwards = [get_feed_forward(plan.feed_forward) for plan in plans if plan.feed_forward is not None]
        targets = {target for part in [*mixers, *feed_forwards] for target in part.lora_targets}
        assert targets <= set(architecture.lora_targets)
        names = {name for name in linear_names(model) if name.rpartition(".")[2] in targets}
        for entry in mixers:
            assert set(entry.lora_targets) <= {name.rpartition(".")[2] for name in names}, entry.name
        assert adapted(get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM))) == names

    def test_each_layer_alone_changes_the_answer(self, model: Any) -> None:
        ids = tokens(1, 19)
        plain = logits(model, ids)
        for name in sorted(linear_names(model)):
            wrapped = get_peft_model(copy.deepcopy(model), lora(target_modules=[name])).eval()
            assert adapted(wrapped) == {name}
            change = (logits(wrapped, ids) - plain).abs().max()
            assert change > 1e-3, f"{name}: {change:.1e}"

    def test_merged_equals_unmerged(self, model: Any, tmp_path: Path) -> None:
        """Merging keeps the logits; in float64, since large random weights and adapters amplify rounding errors."""
        model.double()
        ids = tokens(2, 19)
        plain = logits(model, ids)
        wrapped = get_peft_model(copy.deepcopy(model), lora(target_modules="all-linear")).eval()
        expected = logits(wrapped, ids)
        assert (expected - plain).abs().max() > 1e-1
        wrapped.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert torch.equal(logits(loaded, ids), expected), "saved and loaded"
        wrapped.merge_adapter()
        assert_close(logits(wrapped, ids), expected, "merged", 1e-10)
        wrapped.unmerge_adapter()
        assert_close(logits(wrapped, ids), expected, "unmerged", 1e-10)
        with wrapped.disable_adapter():
            assert_close(logits(wrapped, ids), plain, "disabled", 1e-10)
        merged = wrapped.merge_and_unload(safe_merge=True)
        assert type(merged) is type(model)
        assert linear_names(merged) == linear_names(model)
        assert_close(logits(merged, ids), expected, "merged for good", 1e-10)
        assert torch.equal(generate(merged, ids[:, :9]), generate(loaded, ids[:, :9]))

    def test_several_adapters(self, model: Any) -> None:
        ids = tokens(1, 19)
        plain = logits(model, ids)
        wrapped = get_peft_model(model, lora(target_modules="all-linear"), adapter_name="first").eval()
        wrapped.add_adapter("second", lora())
        found: dict[str, torch.Tensor] = {}
        for name in ("first", "second", "first"):
            wrapped.set_adapter(name)
            found.setdefault(name, logits(wrapped, ids))
            assert torch.equal(logits(wrapped, ids), found[name])
        assert (found["first"] - found["second"]).abs().max() > 1e-1
        wrapped.set_adapter("second")
        wrapped.delete_adapter("first")
        assert torch.equal(logits(wrapped, ids), found["second"])
        assert torch.equal(logits(wrapped.unload(), ids), plain)

    def test_state_parameters_beside_lora(self, model: Any, tmp_path: Path) -> None:
        """``modules_to_save`` with the name of the states' submodule trains and saves the states' parameters."""
        state = state_parameters(model)
        if not state:
            return  # the architecture's decays are fixed
        base = copy.deepcopy(model)
        wrapped = get_peft_model(model, lora(modules_to_save=[STATE_MODULE])).train()
        ids = tokens(2, 19)
        trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in n}
        assert {n.replace("base_model.model.", "").replace(".modules_to_save.default", "") for n in trained} == state
        before = {n: p.detach().clone() for n, p in trained.items()}
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for name, parameter in trained.items():
            moved = (parameter != before[name]).double().mean()
            assert moved > 0.9, f"{name}: {moved:.0%} of it moved"
        expected = logits(wrapped.eval(), ids)
        wrapped.save_pretrained(str(tmp_path))
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path).eval(), ids), expected)

    def test_prompt_tuning_with_generation(self, model: Any) -> None:
        """The virtual tokens train, and generation with them equals whole forwards with them."""
        base = copy.deepcopy(model)
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
        wrapped = get_peft_model(model, config).train()
        ids = tokens(2, 9)
        for name, gradient in gradients(wrapped, wrapped(input_ids=ids, labels=ids).loss).items():
            assert gradient.abs().max() > 0, name
        wrapped.eval()
        for parameter in wrapped.prompt_encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        with pytest.warns(UserWarning, match="Position ids are not supported"):  # generate passes them
            found = generate(wrapped, ids)
        virtual = wrapped.get_prompt(batch_size=2).detach()
        sequence = ids
        for _ in range(found.shape[1] - 9):
            embeddings = torch.cat([virtual, base.get_input_embeddings()(sequence)], 1)
            best = forward(base, inputs_embeds=embeddings).logits[:, -1:].argmax(-1)
            sequence = torch.cat([sequence, best], 1)
        assert torch.equal(found, sequence)
        change = (wrapped(input_ids=ids).logits[:, -9:] - logits(base, ids)).abs().max()
        assert change > 1e-3, "the virtual tokens do nothing"
