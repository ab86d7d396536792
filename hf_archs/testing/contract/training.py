"""Gradients and the Trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from transformers import Trainer, TrainingArguments

from hf_archs.kernels.backend import BACKENDS, use_backend
from hf_archs.registry import Architecture
from hf_archs.testing.contract.models import (
    Contract,
    assert_all_close,
    assert_close,
    forward,
    gradients,
    lively,
    logits,
    tokens,
    total,
    weighed,
)
from hf_archs.testing.contract.padding import padded


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments for a short, quiet, deterministic run on the CPU."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            **options,
        }
    )


def examples(lengths: list[int]) -> list[dict[str, Any]]:
    """A row of 12 tokens for each of ``lengths``, padded on the right; its first ``length`` tokens have labels."""
    rows = []
    for i, n in enumerate(lengths):
        ids = tokens(1, 12, seed=i % 4)[0]
        mask = (torch.arange(12) < n).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def trained(trainer: Trainer) -> nn.Module:
    """The trainer's model."""
    assert trainer.model is not None
    return trainer.model


def losses(trainer: Trainer) -> list[float]:
    """The losses that a trainer logged, in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TrainingContract(Contract):
    """Promises about training."""

    def test_gradients_are_the_slopes(self, model: Any) -> None:
        """In float64, autograd equals a finite difference along a random direction of each parameter."""
        model.double().train()
        ids, mask = padded([tokens(1, 9)[0], tokens(1, 5)[0]], "interior", 10)

        def loss() -> torch.Tensor:
            return weighed(model(ids, attention_mask=mask).logits[mask.bool()])

        found = gradients(model, loss())
        for name, parameter in model.named_parameters():
            direction, step = torch.randn_like(parameter), 2e-6
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                above = loss()
                parameter.add_(direction, alpha=-2 * step)
                slope = (above - loss()) / (2 * step)
                parameter.add_(direction, alpha=step)
            expected = (found[name] * direction).sum()
            scale = found[name].norm() * direction.norm() / direction.numel() ** 0.5
            assert scale > 0, f"{name} has no gradient"
            assert (slope - expected).abs() < 1e-5 * scale, f"{name}: autograd {expected}, difference {slope}"

    def test_every_parameter_has_a_gradient(self, architecture: Architecture) -> None:
        """Every parameter has a gradient, for every head and any tokens, and also without the model's own loss, since
        data-parallel processes wait for every gradient.
        """
        batches: dict[str, Any] = {"tokens": (tokens(2, 9), None), "one token": (tokens(2, 1), None)}
        batches |= {"pads": (tokens(2, 9), torch.zeros(2, 9)), "no rows": (tokens(2, 9)[:0], None)}
        for name, (_, model_class) in architecture.auto_classes().items():
            model = lively(model_class, architecture.tiny_config(num_labels=2)).train()
            for kind, (ids, mask) in batches.items():
                outputs = model(ids, attention_mask=mask)
                values = [value for value in outputs.to_tuple() if isinstance(value, torch.Tensor)]
                gradients(model, total(value.sum() for value in values[:1]))
                if kind == "tokens" and name == "AutoModelForCausalLM" and model.model.has_routers:
                    gradients(model, model(ids, labels=ids, output_router_logits=False).loss)

    def test_per_sample_gradients(self, model: Any) -> None:
        """`vmap` of `grad`, with pads in some rows, gives the gradients of each row, and routers count all rows.

        The loss is computed in float32.
        """
        model.double().train()
        ids, mask = padded([tokens(1, n, seed=n)[0] for n in (9, 5, 4)], "left", 9)
        labels = ids.masked_fill(mask == 0, -100)
        fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
        counts = [router.gate.training_statistics for router in model.model.routers().values()]

        def loss(parameters: Any, *row: torch.Tensor) -> torch.Tensor:
            ids, mask, labels = (part[None] for part in row)
            return functional_call(model, parameters, (ids,), {"attention_mask": mask, "labels": labels}).loss

        found = vmap(grad(loss), (None, 0, 0, 0))(fixed, ids, mask, labels)
        counted = [count.clone() for count in counts]
        for count in counts:
            count.zero_()
        for i, row in enumerate(zip(ids, mask, labels)):
            alone = gradients(model, loss(dict(model.named_parameters()), *row))
            assert_all_close({name: gradient[i] for name, gradient in found.items()}, alone, f"row {i}", 1e-6)
        for again, count in zip(counted, counts):
            assert_close(again, count, "what the routers counted")

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on first use of jvp
    def test_second_derivatives(self, model: Any) -> None:
        """`torch.func` gives the slopes of the loss and of its gradient along a direction of all parameters; the ops
        themselves can be differentiated once, and their error says so.
        """
        model.double()
        ids = tokens(1, 9)
        fixed = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        along = {name: torch.randn_like(parameter) for name, parameter in fixed.items()}

        def loss(parameters: Any) -> torch.Tensor:
            return weighed(functional_call(model, parameters, (ids,)).logits)

        forwards: Any = jvp  # its type does not allow dicts
        gradient, curvature = forwards(grad(loss), (fixed,), (along,))
        plain = gradients(model, weighed(model(ids).logits))
        assert_all_close(gradient, plain, "gradient", 1e-9)
        slope = total((plain[name] * along[name]).sum() for name in plain)
        assert_close(forwards(loss, (fixed,), (along,))[1], slope, "slope", 1e-9)
        step, beside = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(fixed[name]).add_(along[name], alpha=sign * step)
            beside.append(gradients(model, weighed(model(ids).logits)))
        differences = {name: (beside[0][name] - beside[1][name]) / (2 * step) for name in plain}
        scale = torch.stack([difference.abs().max() for difference in differences.values()]).max()
        worst = max((differences[name] - curvature[name]).abs().max() for name in plain)
        assert worst < 1e-5 * scale, f"{worst:.1e} of {scale:.1e}"
        model.set_attn_implementation("eager")
        first = torch.autograd.grad(weighed(model(ids).logits), [*model.parameters()], create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"hf_archs::\w+_backward: the op can be differentiated once; allowed for"
        ):
            total(part.square().sum() for part in first).backward()

    def test_routes_agree(self, architecture: Architecture) -> None:
        """Reference, portable and Triton give the same logits, states and gradients of a padded and packed batch."""
        model = lively(architecture.causal_lm_class, architecture.tiny_config(hidden_size=32, num_hidden_layers=1))
        ids, mask = padded([tokens(1, 9)[0], tokens(1, 5)[0]], "left", 10)
        seq_idx = (torch.arange(10) >= 7).int().expand(2, -1)
        found = {}
        for route in BACKENDS:
            with use_backend(route):
                out = model(ids, attention_mask=mask, seq_idx=seq_idx, use_cache=True)
                kept = {name: tensor.detach() for name, tensor in out.past_key_values.tensors()}
                step = logits(model, tokens(2, 1), past_key_values=out.past_key_values)
                real = out.logits[mask.bool()]
                found[route] = (real.detach(), step, kept, gradients(model, weighed(real)))
        for route in BACKENDS[1:]:
            assert_close(found[route][0], found["reference"][0], route)
            assert_close(found[route][1], found["reference"][1], f"{route}, one step")
            assert_all_close(found[route][2], found["reference"][2], f"{route}, states")
            assert_all_close(found[route][3], found["reference"][3], f"{route}, gradients", 3e-5)

    def test_every_module_is_called(self, model: Any) -> None:
        """A parameter that is read outside its module's forward escapes adapters, offloading, sharding, quantisers."""
        called: set[nn.Module] = set()
        owners = {m: name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
        for module in owners:
            module.register_forward_hook(lambda m, args, out: called.add(m))
        model.train()(tokens(1, 9)).logits.sum().backward()
        assert not [name for module, name in owners.items() if module not in called]
        cache = None
        for _ in ("first token", "one more"):
            called.clear()
            cache = forward(model.eval(), tokens(1, 1), use_cache=True, past_key_values=cache).past_key_values
            assert not [name for module, name in owners.items() if module not in called]

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, model: Any, reentrant: bool) -> None:
        ids, mask = padded([tokens(1, 19)[0], tokens(1, 9)[0]], "left", 20)
        model.train()
        blocks = model.model.layers

        def run() -> tuple[dict[str, torch.Tensor], int]:
            calls = 0

            def count(*_: Any) -> None:
                nonlocal calls
                calls += 1

            hooks = [block.mixer.register_forward_hook(count) for block in blocks]
            found = gradients(model, model(ids, attention_mask=mask, labels=ids).loss)
            for hook in hooks:
                hook.remove()
            return found, calls

        plain, once = run()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again, twice = run()
        assert twice == 2 * once, "nothing was computed a second time"
        assert_all_close(again, plain, "gradient")

    def test_it_learns(self, model: Any, tmp_path: Path) -> None:
        """The Trainer trains, evaluates and saves the model."""
        rows = examples([12] * 8)
        trainer = Trainer(
            model,
            arguments(tmp_path, max_steps=15, per_device_train_batch_size=4, save_strategy="steps", save_steps=15),
            train_dataset=rows,
            eval_dataset=rows,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        assert after < 0.5 * before
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        assert abs(forward(model.eval(), **batch).loss.item() - after) < 1e-4 * after
        saved = type(model).from_pretrained(tmp_path / "checkpoint-15").state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())

    def test_a_resumed_run_equals_the_uninterrupted_one(self, model: Any, tmp_path: Path) -> None:
        rows = examples([12, 7, 9, 12, 4, 11, 12, 6])
        options = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "per_device_train_batch_size": 3}
        options |= {"lr_scheduler_type": "linear", "warmup_steps": 2}
        whole = Trainer(copy.deepcopy(model), arguments(tmp_path / "whole", **options), train_dataset=rows)
        whole.train()
        resumed = Trainer(model, arguments(tmp_path / "resumed", **options), train_dataset=rows)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert resumed.state.global_step == 6
        assert losses(resumed) == losses(whole)
        ours = trained(whole).state_dict()
        for name, tensor in trained(resumed).state_dict().items():
            assert torch.equal(tensor, ours[name]), name

    def test_gradient_accumulation(self, model: Any, tmp_path: Path) -> None:
        """Four rows, at once or accumulated one by one, make the same step, though they have 11, 1, 4 and 7 labels."""
        rows = examples([12, 2, 5, 8])
        for router in model.model.routers().values():
            router.config.router_aux_loss_coef = 0.0  # this loss is no mean over rows
        found = []
        for batch in (4, 1):
            trainer = Trainer(
                copy.deepcopy(model),
                arguments(
                    tmp_path,
                    max_steps=1,
                    per_device_train_batch_size=batch,
                    gradient_accumulation_steps=4 // batch,
                    optim="sgd",
                    max_grad_norm=0.0,
                ),
                train_dataset=rows,
            )
            trainer.train()
            start = dict(model.named_parameters())
            found.append(({n: p - start[n] for n, p in trained(trainer).named_parameters()}, losses(trainer)[0]))
        assert abs(found[0][1] - found[1][1]) < 1e-4 * found[0][1]
        # a step is a small difference of large numbers, in which their rounding errors show
        assert_all_close(found[1][0], found[0][0], "step", 1e-3)

    @pytest.mark.parametrize("head", ["AutoModelForCausalLM", "AutoModelForMaskedLM"])
    def test_accumulated_losses_of_routers(self, architecture: Architecture, head: str, tmp_path: Path) -> None:
        """The routers' losses count once per step, however many batches a step accumulates. The rows are equal, so that
        each batch has the same losses."""
        _, model_class = architecture.auto_classes()[head]
        rows, found = examples([9]) * 4, []
        for batch in (4, 1):
            model = lively(model_class, architecture.tiny_config())
            balanced = [router for router in model.model.routers().values() if router.config.router_aux_loss_coef]
            if not balanced:
                return
            for router in balanced:
                router.config.router_aux_loss_coef = 1.0
            options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch, "max_steps": 1}
            trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=rows)
            trainer.train()
            found.append(losses(trainer)[0])
            example = {name: tensor[None] for name, tensor in rows[0].items()}
            out = forward(lively(model_class, model.config).train(), **example)
            assert out.aux_loss > 0.1, "nothing to see"
            assert abs(found[-1] - out.loss) < 1e-4 * out.loss
        assert abs(found[0] - found[1]) < 1e-4 * found[0]

    def test_num_items_in_batch(self, model: Any) -> None:
        ids = tokens(2, 9)
        mean = forward(model, ids, labels=ids).loss
        found = forward(model, ids, labels=ids, num_items_in_batch=torch.tensor(48)).loss
        assert_close(found, mean * 16 / 48, "loss")
