"""Hyena as a model: filters independent of the text's length, long generation, and the cost of a step."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_archs
from hf_archs.cache.call import during
from hf_archs.testing.contract.caching import continued
from hf_archs.testing.contract.configs import REFUSED
from hf_archs.testing.contract.generation import generate, greedy
from hf_archs.testing.contract.models import assert_all_close, assert_close, gradients, lively, logits, tokens, weighed
from hf_archs.testing.ops import operators
from hf_archs_hyena import filters

KINDS = ("implicit", "modal", "medium", "short")


def model_of(*kinds, **fields):
    architecture = hf_archs.get_architecture("hyena")
    return lively(architecture.causal_lm_class, architecture.tiny_config(filter_types=kinds, **fields))


class TestFilters:
    @pytest.mark.parametrize("kind", KINDS)
    def test_longer_filters_begin_with_shorter_ones(self, kind):
        """Taps depend on the lag only: a prefix of a text has the logits of the prefix alone."""
        model = model_of(kind)
        ssm = model.model.layers[0].mixer.ssm
        long = ssm.taps(700)
        for length in (1, 2, 129, 300):
            assert_close(ssm.taps(length), long[:, :length], f"{length} taps")
        ids = tokens(1, 300)
        assert_close(logits(model, ids)[:, :90], logits(model, ids[:, :90]), "a prefix")

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_filter_is_what_the_mixer_does(self, kind):
        """The mixer's long convolution of an impulse equals `taps` plus the skip connection."""
        ssm = model_of(kind, num_hidden_layers=1).model.layers[0].mixer.ssm
        v = torch.zeros(1, 20, 64)
        v[:, 0] = 1
        y, _ = ssm(v, [torch.ones_like(v)] * 2)
        expected = ssm.taps(20).detach().clone()
        if kind in ("implicit", "modal"):
            expected[:, 0] += ssm.bias
        assert_close(y[0].t(), expected, "impulse response")

    def test_long_filters_forget_their_activations(self, monkeypatch):
        """Taps are recomputed in the backward, with the same gradients."""
        model, ids = model_of("implicit"), tokens(1, 40)
        expected = gradients(model, weighed(model(ids).logits))
        calls = []
        model.model.layers[0].mixer.ssm.layers[0].register_forward_hook(lambda *_: calls.append(0))
        monkeypatch.setattr(filters, "LONG", 40)
        found = gradients(model, weighed(model(ids).logits))
        assert len(calls) == 2
        assert_all_close(found, expected, "gradient", 1e-6)

    def test_nothing_beyond_max_positions(self):
        """Texts may be longer than the filters, which end at the same lag in one pass and in pieces."""
        model = model_of("implicit", max_positions=20)
        ids = tokens(2, 60)
        whole = logits(model, ids, use_cache=False)
        for sizes in ([60], [1] * 60, [25, 1, 34], [19, 1, 1, 39]):
            assert_close(continued(model, ids, sizes), whole, f"pieces of {sizes}")
        with torch.no_grad():
            states = dict(model(ids, use_cache=True).past_key_values.tensors())
        assert states["layers.0.past"].shape[-1] == 20
        # one layer sees its filter's window plus that of one short convolution
        model = model_of("implicit", max_positions=20, num_hidden_layers=1)
        other = ids.clone()
        other[:, 0] = (ids[:, 0] - 3 + 1) % 125 + 3
        change = (logits(model, ids) - logits(model, other)).abs().amax((0, 2))
        assert change[:20].max() > 1e-2
        assert change[23:].max() < 1e-4

    def test_layers_take_turns(self):
        model = model_of(*KINDS, num_hidden_layers=4)
        kinds = [layer.mixer.ssm.config.filter_type for layer in model.model.layers]
        assert kinds == list(KINDS)
        ids = tokens(2, 40)
        assert_close(continued(model, ids, [13, 1, 26]), logits(model, ids, use_cache=False), "pieces")

    def test_medium_filters_decay(self):
        ssm = model_of("medium", num_hidden_layers=1).model.layers[0].mixer.ssm
        with torch.no_grad():
            ssm.coefficients.fill_(1.0)
            taps = ssm.taps(128)
        assert (taps.diff(dim=1) < 0).all()
        assert taps[-1, -1] < taps[0, -1] < 0.1


class TestGeneration:
    @pytest.mark.parametrize("kind", ["implicit", "modal"])
    def test_512_new_tokens(self, kind):
        """Greedy tokens with and without a cache are equal; the taps are computed again in between."""
        model, prompt = model_of(kind, num_hidden_layers=1, hidden_size=32), tokens(1, 5)
        found = generate(model, prompt, max_new_tokens=512)
        assert len(set(found[0].tolist())) > 5
        # every token is the likeliest after those before it, from one pass over all of them
        assert torch.equal(logits(model, found, use_cache=False)[:, 4:-1].argmax(-1), found[:, 5:])
        assert torch.equal(generate(model, prompt, max_new_tokens=512, cache_implementation="static"), found)

    def test_beams_and_assisted_decoding_far_into_a_text(self):
        model, prompt = model_of("implicit", num_hidden_layers=1), tokens(1, 300)
        options = {"max_new_tokens": 20}
        beams = generate(model, prompt, num_beams=3, use_cache=False, **options)
        assert torch.equal(generate(model, prompt, num_beams=3, **options), beams)
        expected = greedy(model, prompt, 20)
        assert torch.equal(generate(model, prompt, assistant_model=copy.deepcopy(model), **options), expected)
        assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3, **options), expected)

    def test_a_modal_step_costs_the_same_at_any_length(self):
        """A step runs the same operators on states of the same size after 10 and after 1,000 tokens."""
        model = model_of("modal")
        found = []
        for length in (10, 1000):
            with torch.no_grad():
                cache = model(tokens(1, length), use_cache=True).past_key_values
            calls = operators(lambda cache=cache: model(tokens(1, 1), past_key_values=cache))
            found.append((calls, {name: tensor.shape for name, tensor in cache.tensors()}))
        assert found[0] == found[1]

    def test_taps_are_not_computed_for_every_token(self):
        """In `generate` a step runs the filters' network only if taps are missing, and no Fourier transform."""
        model = model_of("implicit")
        calls = []
        model.model.layers[0].mixer.ssm.layers[0].register_forward_hook(lambda *_: calls.append(0))
        with torch.no_grad(), during(generating=True):
            cache = model(tokens(1, 200), use_cache=True).past_key_values
            calls.clear()
            for _ in range(40):
                model(tokens(1, 1), past_key_values=cache)
            assert len(calls) == 1
            names = operators(lambda: model(tokens(1, 1), past_key_values=cache))
        assert not [name for name in names if "fft" in name or "sin" in name]

    def test_a_changed_filter_is_used_at_once(self):
        """New taps are used after a training step, an edit through ``.data``, another adapter, a merge or a copy."""
        model, ids = model_of("implicit"), tokens(1, 20)

        def same(what):
            assert_close(continued(model, ids, [12] + [1] * 8), logits(model, ids, use_cache=False), what)

        same("as it was")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        same("after a step")
        for parameter in model.model.layers[0].mixer.ssm.parameters():
            parameter.data.mul_(1.2)
        same("after an edit")
        whole = model
        options = {"target_modules": "all-linear", "init_lora_weights": False}
        wrapped = get_peft_model(model, LoraConfig(r=2, **options), adapter_name="first")
        wrapped.add_adapter("second", LoraConfig(r=2, **options))
        model = wrapped
        same("the first adapter")
        wrapped.set_adapter("second")
        same("the second adapter")
        wrapped.merge_adapter()
        same("merged")
        model = wrapped.unload()
        assert model is whole or isinstance(model, type(whole))
        same("unloaded")
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        same("copied")


class TestConfigs:
    def test_an_empty_pattern_is_refused(self):
        architecture = hf_archs.get_architecture("hyena")
        with pytest.raises(ValueError, match=r"filter_types is \[\]; allowed are one or more"):
            architecture.tiny_config(filter_types=[])

    def test_sharding_names_what_is_there(self):
        architecture = hf_archs.get_architecture("hyena")
        for gated in (True, False):
            config = architecture.tiny_config(gated=gated)
            names = {name.removesuffix(".weight") for name, _ in architecture.model_class(config).named_parameters()}
            for pattern in config.base_model_tp_plan:
                assert pattern.replace("*", "0") in names
            assert "base_model_tp_plan" not in config.to_dict()

    def test_a_group_must_divide_the_width(self):
        architecture = hf_archs.get_architecture("hyena")
        with pytest.raises(REFUSED, match="filter_group_size is 3; allowed are divisors"):
            architecture.tiny_config(filter_group_size=3)

    def test_published_sizes(self):
        """The number of parameters of HyenaDNA's models, without the positions in their files."""
        architecture = hf_archs.get_architecture("hyena")
        layers = {"tiny-1k-d256": 2, "small-32k": 4, "medium-160k": 8, "medium-450k": 8, "large-1m": 8}
        for name, count in layers.items():
            config = architecture.config_class(**architecture.sizes[name])
            assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (count, 256, 1024)
            with torch.device("meta"):
                model = architecture.causal_lm_class(config)
            assert sum(p.numel() for p in model.parameters()) == 4096 + 512 + count * 818496
        tiny = architecture.config_class(**architecture.sizes["tiny-1k"])
        assert (tiny.num_hidden_layers, tiny.hidden_size, tiny.intermediate_size) == (2, 128, 512)
