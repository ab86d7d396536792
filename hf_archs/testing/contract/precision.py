"""Precision: mixed precision trains, errors of half-precision weights do not grow with length, states stay float32."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_archs.registry import Architecture
from hf_archs.testing.contract.models import Contract, forward, logits, state_parameters, tokens

HALF = (torch.bfloat16, torch.float16)


def specified(config: Any, activations: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that mixers declare for every state, by its name in the cache."""
    return {
        f"layers.{i}.{name}": spec.dtype or activations
        for i in range(config.num_hidden_layers)
        for name, spec in config.layer_plan(i).states().items()
    }


def follow(leader: Any, follower: Any) -> None:
    """Make every router of ``follower`` return the last output of the same router of ``leader``."""
    for first, second in zip(leader.model.routers().values(), follower.model.routers().values(), strict=True):
        given: list[Any] = []
        first.gate.register_forward_hook(lambda *call, given=given: given.append(call[-1]))
        second.gate.register_forward_hook(lambda *call, given=given: given.pop())


class PrecisionContract(Contract):
    """Promises about precision."""

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_trains_under_autocast(self, model: Any, dtype: torch.dtype) -> None:
        """Every gradient is finite, and the loss falls; in fp16 with loss scaling, no step is skipped."""
        model.train()
        ids = tokens(2, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**10)
        values = []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = model(ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                assert parameter.grad is not None, name
                assert parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().max() > 0, name
            scaler.step(optimizer)
            scaler.update()
            values.append(loss.item())
        assert values[-1] < 0.6 * values[0], values
        if dtype == torch.float16:
            assert scaler.get_scale() == 2.0**10, "steps were skipped"

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_dtypes_of_the_states(self, model: Any, dtype: torch.dtype) -> None:
        """States have the dtypes that the mixers declare, with half-precision weights and under autocast; those of
        recurrences are float32."""
        ids = tokens(1, 9)
        for name, tensor in model(ids, use_cache=True).past_key_values.tensors():
            assert tensor.dtype == specified(model.config, torch.float32)[name], name
        with torch.autocast("cpu", dtype=dtype):
            cache = forward(model, ids, use_cache=True).past_key_values
            forward(model, ids[:, :1], past_key_values=cache)
        wide = [name for name, wanted in specified(model.config, dtype).items() if wanted == torch.float32]
        states = dict(cache.tensors())
        assert all(states[name].dtype == torch.float32 for name in wide), "under autocast"
        cache = forward(model.to(dtype), ids, use_cache=True).past_key_values
        forward(model, ids[:, :1], past_key_values=cache)
        for name, tensor in cache.tensors():
            assert tensor.dtype == specified(model.config, dtype)[name], name

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_states_of_a_model_made_in_half(self, architecture: Architecture, dtype: torch.dtype) -> None:
        """The states' parameters are float32, as in a loaded model."""
        model = AutoModelForCausalLM.from_config(architecture.tiny_config(), dtype=dtype)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if name in state_parameters(model) else dtype), name

    def test_bf16_weights_at_length_2048(self, model: Any, tmp_path: Any) -> None:
        """The error of bf16 arithmetic does not grow with the length, since states do not accumulate it.

        The reference is the float32 model with the same rounded weights, whose routers get the same outputs, since a
        token may otherwise go to other experts, which is no error of arithmetic.
        """
        ids = tokens(1, 2048)
        model.save_pretrained(tmp_path)
        half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
        exact = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).float()
        follow(half, exact)
        found, truth = logits(half, ids).float(), logits(exact, ids)
        error = (found - truth).square().mean(-1).sqrt()[0] / truth.square().mean().sqrt()
        early, late = error[:64].mean(), error[-512:].mean()
        assert late < 1.5 * early, f"relative error {early:.2%} on the first 64 tokens, {late:.2%} on the last 512"
        assert late < 16 * torch.finfo(torch.bfloat16).eps
