"""Calls: the arguments and outputs of a forward, by name; a call leaves no trace in the model."""

import contextlib
import copy
import types
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import DynamicCache

from hf_archs.cache import ArchDynamicCache, ArchStaticCache
from hf_archs.registry import Architecture
from hf_archs.testing.contract.generation import generate, generate_in_threads, greedy
from hf_archs.testing.contract.models import Contract, assert_close, forward, gradients, lively, logits, tokens
from hf_archs.testing.contract.padding import padded


def attributes(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, with copies of tensors."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            tables = value if isinstance(value, dict) else {"": value}
            for entry, item in tables.items():
                found[f"{name}.{key}.{entry}"] = item.clone() if isinstance(item, torch.Tensor) else item
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two attributes are the same object, or equal tensors or values of one type."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a is b or (isinstance(a, types.MethodType) and a == b) or (type(a) is type(b) and a == b)


class CallContract(Contract):
    """Promises about the arguments, outputs and traces of a call."""

    def test_an_argument_that_nobody_knows(self, architecture: Architecture, model: Any) -> None:
        """A misspelt argument is refused, since it would silently have no effect."""
        ids = tokens(2, 5)
        heads = [cls(architecture.tiny_config()) for _, cls in architecture.auto_classes().values()]
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM"))
        for each in (model, model.model, adapted, *heads):
            with pytest.raises(TypeError, match=r"has no argument 'attention_maks'"):
                each(input_ids=ids, attention_maks=torch.ones_like(ids))

    def test_what_hosts_hand_to_every_model(self, model: Any) -> None:
        """Arguments of the Trainer, collators and tokenizers are accepted."""
        ids = tokens(1, 6)
        bounds = torch.tensor([0, 6], dtype=torch.int32)
        handed = {
            "num_items_in_batch": torch.tensor(5),
            "return_dict": True,
            "output_hidden_states": True,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": 6,
            "max_length_k": 6,
            "is_causal": True,
            "token_type_ids": torch.zeros_like(ids),
        }
        assert_close(model(ids, labels=ids, **handed).logits, logits(model, ids), "logits")
        found = generate(model, ids, tokenizer=object())  # an argument of `stop_strings`
        assert torch.equal(found, greedy(model, ids))
        with pytest.raises(ValueError, match=r"is_causal is False, .*; allowed is a model that was made for that"):
            model(ids, is_causal=False)

    def test_a_cache_has_two_names(self, model: Any) -> None:
        """The cache is named ``past_key_values`` up to transformers 5.23, and ``cache`` since; both names work."""
        ids = tokens(1, 9)
        with torch.no_grad():
            for part in (model, model.model):
                out = part(ids[:, :5], use_cache=True)
                assert out.cache is out.past_key_values is out["cache"] is out["past_key_values"]
                assert "cache" in out
                assert "past_key_values" in out
                assert out.get("cache") is out.get("past_key_values") is out.cache
                with pytest.raises(ValueError, match="are names of the same; allowed is one"):
                    part(ids, cache=out.cache, past_key_values=ArchDynamicCache(model.config))
        expected = logits(model, ids)[:, 5:]
        for name in ("cache", "past_key_values"):
            cache = model(ids[:, :5], use_cache=True).cache
            assert_close(logits(model, ids[:, 5:], **{name: cache}), expected, name)
            cache = model(ids[:, :5], use_cache=True).cache
            assert torch.equal(generate(model, ids, **{name: cache}), greedy(model, ids))

    def test_generate_says_nothing(self, model: Any, recwarn: pytest.WarningsRecorder) -> None:
        """`generate` gives no warnings, which would appear within streamed text."""
        warnings.simplefilter("always")
        generate(model, tokens(1, 5), max_new_tokens=3)
        assert not [str(warning.message) for warning in recwarn]

    def test_training_makes_no_cache(self, model: Any) -> None:
        """Training makes no cache: a layer that the backward recomputes would continue from its own states."""
        ids = tokens(2, 9)
        assert model.train()(ids).cache is None
        assert model(ids, use_cache=True).cache is not None
        assert forward(model, ids).cache is not None  # an evaluation in training mode

    @pytest.mark.parametrize("kind", [*CheckpointImpl])
    def test_activation_checkpointing_by_others(self, model: Any, kind: CheckpointImpl) -> None:
        """Blocks in torch's checkpoint wrappers, which users of FSDP take, give the same gradients."""
        model.train()
        model.enable_input_require_grads()
        ids, block = tokens(2, 24), type(model.model.layers[0])
        plain = gradients(model, model(ids, labels=ids).loss)
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
            check_fn=lambda module: isinstance(module, block),
        )
        again = gradients(model, model(ids, labels=ids).loss)
        for name, gradient in again.items():
            assert_close(gradient, plain[name.replace("_checkpoint_wrapped_module.", "")], name)

    def test_a_cache_under_gradient_checkpointing(self, model: Any) -> None:
        cache = model(tokens(1, 5), use_cache=True).cache
        model.train().activation_checkpointing_enable()
        with pytest.warns(UserWarning, match="in training no cache is read or made"):
            model(tokens(1, 4), cache=cache)

    def test_the_weights_may_change_under_a_cache(self, model: Any) -> None:
        """After an optimizer's step or a change of adapters, a cache keeps its old states, but nothing else of the old
        weights."""
        with torch.no_grad():
            out = model.generate(tokens(1, 9), max_new_tokens=2, return_dict_in_generate=True)
            cache = getattr(out, "cache", None) or out.past_key_values
            model(tokens(1, 1, 3), cache=cache)
            fresh = ArchDynamicCache(model.config)
            fresh.load_state_dict(cache.state_dict())
            for parameter in model.parameters():
                parameter.data.mul_(1.1)
            assert_close(
                logits(model, tokens(1, 1, 4), cache=cache), logits(model, tokens(1, 1, 4), cache=fresh), "next"
            )

    def test_a_snapshot_is_nobodys(self, model: Any) -> None:
        """Caches loaded from one state dict share nothing, and do not change it."""
        snapshot = forward(model, tokens(1, 9), use_cache=True).cache.state_dict()
        kept = {name: tensor.clone() for name, tensor in snapshot.items()}
        one, two, three = (ArchDynamicCache(model.config) for _ in range(3))
        for cache in (one, two, three):
            cache.load_state_dict(snapshot)
        expected = logits(model, tokens(1, 3, 4), cache=three)
        one.reset()
        assert torch.equal(logits(model, tokens(1, 3, 4), cache=two), expected)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in snapshot.items())

    def test_recording_ends_with_assisted_decoding(self, model: Any) -> None:
        """The returned cache records no more inputs, since it would keep those of all later calls."""
        ids = tokens(1, 9)
        mine = ArchDynamicCache(model.config)
        generate(model, ids, prompt_lookup_num_tokens=3, cache=mine)
        out = generate(model, ids, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
        for cache in (mine, getattr(out, "cache", None) or out.past_key_values):
            model(tokens(1, 2), cache=cache)
            assert not cache.segments

    def test_a_draft_by_the_first_layers(self, architecture: Architecture) -> None:
        """``assistant_early_exit`` works: during a draft, transformers lowers the config's number of layers."""
        model = lively(architecture.causal_lm_class, architecture.tiny_config(num_hidden_layers=4))
        ids, before = tokens(1, 9), model.config.to_dict()
        assert torch.equal(generate(model, ids, assistant_early_exit=1), greedy(model, ids))
        assert model.config.to_dict() == before
        hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, ids, assistant_early_exit=1)
        hook.remove()
        assert model.config.to_dict() == before
        assert torch.equal(generate(model, ids), greedy(model, ids))

    @pytest.mark.parametrize("kind", [ArchDynamicCache, ArchStaticCache, DynamicCache], ids=lambda kind: kind.__name__)
    def test_no_rows(self, architecture: Architecture, model: Any, kind: Any) -> None:
        """No rows give empty logits, with a mask, embeddings or a cache, and gradients of 0 for all parameters."""
        none, more = tokens(2, 5)[:0], tokens(2, 1)[:0]
        cache = kind(model.config, 20) if kind is ArchStaticCache else kind(config=model.config)
        out = model(none, cache=cache, attention_mask=none, output_hidden_states=True, output_router_logits=None)
        assert out.logits.shape == (0, 5, 128)
        assert {hidden.shape for hidden in out.hidden_states} == {(0, 5, 64)}
        assert model(more, cache=out.cache, use_cache=True).logits.shape == (0, 1, 128)
        assert out.cache.get_seq_length() == 6
        assert out.cache.batch_size == 0
        with pytest.raises(ValueError, match=r"the input has no rows, and the cache holds 2; allowed is as many"):
            model(more, cache=model(tokens(2, 5), use_cache=True).cache)
        assert model(inputs_embeds=model.get_input_embeddings()(none), return_dict=False)[0].shape == (0, 5, 128)
        for model_class in (architecture.causal_lm_class, architecture.masked_lm_class):
            trained = model_class(architecture.tiny_config()).train()
            loss = trained(none, labels=none, num_items_in_batch=torch.tensor(7)).loss
            assert loss == 0
            assert not any(gradient.any() for gradient in gradients(trained, loss).values())
        with pytest.raises(ValueError, match=r"the input has shape \(2, 0\); allowed are rows of one token or more"):
            model(tokens(2, 0))

    def test_threads(self, model: Any) -> None:
        """Four threads at once generate the tokens that each generates alone."""
        prompts = [tokens(1, 5 + i, seed=i) for i in range(4)]
        expected = [generate(model, prompt) for prompt in prompts]
        for i, found in enumerate(generate_in_threads(model, prompts, 3)):
            assert all(torch.equal(one, expected[i]) for one in found), f"thread {i}"

    def test_a_forward_that_fails_leaves_nothing(self, model: Any) -> None:
        """A module must not keep a value of a failed call, which the next call would find."""
        ids = tokens(2, 7)
        model.set_attn_implementation("eager")
        asked = {"output_hidden_states": True, "output_attentions": True}
        expected = model(ids, **asked).logits
        before = attributes(model)
        other, mask = padded([tokens(1, n, seed=n)[0] for n in (9, 4, 1)], "left", 9)  # of other sizes
        for place in (model.model.layers[-1], *model.model.layers[-1].children()):
            for fail in (place.register_forward_pre_hook, place.register_forward_hook):
                hook = fail(lambda *_: 1 / 0)
                for options in ({}, asked, {"labels": other}):
                    with contextlib.suppress(ZeroDivisionError):
                        model(other, attention_mask=mask, **options)
                hook.remove()
        after = attributes(model)
        assert torch.equal(model(ids, **asked).logits, expected)
        assert before.keys() == after.keys()
        assert not [name for name, value in before.items() if not same(value, after[name])]
