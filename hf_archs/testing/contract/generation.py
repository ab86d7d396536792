"""Generation: every decoding method of transformers gives the tokens of the model without a cache."""

import copy
import threading
from typing import Any

import pytest
import torch

from hf_archs.cache import ArchDynamicCache, ArchStaticCache
from hf_archs.registry import Architecture
from hf_archs.testing.contract.models import Contract, lively, logits, tokens
from hf_archs.testing.contract.padding import padded

NEW = 24


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """``model.generate`` for `NEW` tokens, greedily unless the options say otherwise."""
    defaults: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    defaults["attention_mask"] = torch.ones_like(ids)  # else a generated token 0 counts as a pad
    return model.generate(input_ids=ids, **{**defaults, **options})


def greedy(model: Any, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """The expected tokens of `generate`: greedy decoding by whole forwards, without a cache."""
    for _ in range(new):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids


def generate_in_threads(model: Any, prompts: list[torch.Tensor], times: int) -> list[list[torch.Tensor]]:
    """The tokens of ``times`` calls of `generate` for each prompt, with a thread for each prompt."""
    found: dict[int, list[torch.Tensor]] = {}

    def run(i: int) -> None:
        found[i] = [generate(model, prompts[i]) for _ in range(times)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(prompts))]


class Passes:
    """Counts the forwards of a model."""

    def __init__(self, model: Any):
        self.count = 0
        model.register_forward_hook(self._one_more)

    def _one_more(self, *_: Any) -> None:
        self.count += 1


class GenerationContract(Contract):
    """Promises about `generate`."""

    @pytest.fixture(scope="class")
    @classmethod
    def prompt(cls, shared_model: Any) -> torch.Tensor:
        """A prompt whose greedy tokens vary, so that mistakes show, and include no 0, since drafters stop at it."""
        for seed in range(80):
            found = greedy(shared_model, tokens(2, 11, seed))[:, 11:]
            if all(len(set(row.tolist())) >= NEW // 8 and 0 not in row for row in found):
                return tokens(2, 11, seed)
        raise AssertionError(f"the model repeats itself after every prompt, the last time as {found}")

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, shared_model: Any, prompt: torch.Tensor) -> torch.Tensor:
        """The greedy tokens."""
        return greedy(shared_model, prompt)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"cache_implementation": "dynamic"},
            {"prefill_chunk_size": 4},
            {"prefill_chunk_size": 4, "cache_implementation": "static"},
        ],
        ids=str,
    )
    def test_greedy(self, model: Any, prompt: torch.Tensor, expected: torch.Tensor, options: dict[str, Any]) -> None:
        assert torch.equal(generate(model, prompt, **options), expected)

    def test_one_pass_a_token(self, model: Any, prompt: torch.Tensor) -> None:
        """With a cache, each pass after the first has one token."""
        lengths: list[int] = []
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
        generate(model, prompt)
        assert lengths == [11] + [1] * (NEW - 1)

    @pytest.mark.parametrize("kind", [ArchDynamicCache, ArchStaticCache])
    def test_a_cache_handed_in(self, model: Any, prompt: torch.Tensor, expected: torch.Tensor, kind: type) -> None:
        cache = ArchDynamicCache(model.config) if kind is ArchDynamicCache else ArchStaticCache(model.config, 64)
        assert torch.equal(generate(model, prompt, past_key_values=cache), expected)

    def test_continued_from_a_returned_cache(self, model: Any, prompt: torch.Tensor) -> None:
        """A chat: a returned cache is continued with the next user's turn of several tokens."""
        first = generate(model, prompt, max_new_tokens=8, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, tokens(2, 5, seed=3)], 1)
        second = generate(model, turn, max_new_tokens=8, past_key_values=first.past_key_values)
        assert torch.equal(second, greedy(model, turn, 8))

    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
    def test_left_padded_batch(self, model: Any, options: dict[str, Any]) -> None:
        rows = [tokens(1, n, seed=n)[0] for n in (12, 5, 1)]
        ids, mask = padded(rows, "left", 12)
        found = generate(model, ids, attention_mask=mask, **options)
        for i, row in enumerate(rows):
            assert torch.equal(found[i, 12:], greedy(model, row[None])[0, row.numel() :]), f"row {i}"

    def test_from_embeddings(self, model: Any, prompt: torch.Tensor, expected: torch.Tensor) -> None:
        embeddings = model.get_input_embeddings()(prompt)
        found = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert torch.equal(found, expected[:, 11:])

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "top_k": 20, "temperature": 0.8},
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
            {"do_sample": True, "num_beams": 2},
            {"do_sample": True, "num_return_sequences": 3},
        ],
        ids=str,
    )
    def test_sampling_and_beams(self, model: Any, prompt: torch.Tensor, options: dict[str, Any]) -> None:
        found = []
        for cached in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
            torch.manual_seed(1)
            found.append(generate(model, prompt, **options, **cached))
        assert torch.equal(found[0], found[1]), "with and without a cache"
        assert torch.equal(found[0], found[2]), "with a static cache"

    def test_assisted_by_itself(self, model: Any, prompt: torch.Tensor, expected: torch.Tensor) -> None:
        """Assisted decoding gives exactly the greedy tokens, in at most half as many passes of the target."""
        passes = Passes(model)
        drafter = copy.deepcopy(model)
        drafter._forward_hooks.clear()
        assert torch.equal(generate(model, prompt[:1], assistant_model=drafter), expected[:1])
        assert passes.count <= NEW // 2
        # a drafter without a confidence threshold drafts many tokens, all of them right
        passes.count, drafter.generation_config.assistant_confidence_threshold = 0, 0.0
        assert torch.equal(generate(model, prompt[:1], assistant_model=drafter), expected[:1])
        assert passes.count <= NEW // 4

    def test_assisted_by_a_poor_drafter(
        self, model: Any, architecture: Architecture, prompt: torch.Tensor, expected: torch.Tensor
    ) -> None:
        """The greedy tokens come out, though most drafts are wrong and so almost every pass rolls the cache back, by
        varying numbers of tokens."""
        stranger = lively(architecture.causal_lm_class, architecture.tiny_config(num_hidden_layers=1), seed=7)
        relative = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in relative.parameters():
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
        for drafter in (stranger, relative):
            for threshold in (0.0, 0.4):
                drafter.generation_config.assistant_confidence_threshold = threshold
                assert torch.equal(generate(model, prompt[:1], assistant_model=drafter), expected[:1])
                assert torch.equal(generate(model, prompt[1:], assistant_model=drafter), expected[1:])

    def test_assisted_with_left_pads(self, model: Any, architecture: Architecture, prompt: torch.Tensor) -> None:
        ids, mask = padded([prompt[0]], "left", 15)
        drafter = lively(architecture.causal_lm_class, architecture.tiny_config(), seed=7)
        drafter.generation_config.assistant_confidence_threshold = 0.0
        found = generate(model, ids, attention_mask=mask, assistant_model=drafter)
        assert torch.equal(found[:, 15:], greedy(model, prompt[:1])[:, 11:])

    def test_assisted_sampling(self, model: Any, prompt: torch.Tensor) -> None:
        """Assisted sampling runs and keeps the prompt. Its tokens depend on the drafter's random numbers too."""
        found = generate(model, prompt[:1], assistant_model=copy.deepcopy(model), do_sample=True)
        assert found.shape == (1, 11 + NEW)
        assert torch.equal(found[:, :11], prompt[:1])

    def test_prompt_lookup(self, model: Any, prompt: torch.Tensor, expected: torch.Tensor) -> None:
        """The prompt repeats itself, so that lookups find candidates, most of them wrong."""
        assert torch.equal(generate(model, prompt[:1], prompt_lookup_num_tokens=4), expected[:1])
        repeated = torch.cat([expected[:1], expected[:1, :20]], 1)
        wanted = greedy(model, repeated)
        passes = Passes(model)
        assert torch.equal(generate(model, repeated, prompt_lookup_num_tokens=4), wanted)
        assert passes.count <= NEW

    def test_continued_after_assisted(self, model: Any, prompt: torch.Tensor) -> None:
        """The cache that assisted decoding returns can be continued at the next token."""
        first = generate(model, prompt[:1], prompt_lookup_num_tokens=3, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, tokens(1, 4, seed=3)], 1)
        found = generate(model, turn, past_key_values=first.past_key_values, max_new_tokens=8)
        assert torch.equal(found, greedy(model, turn, 8))
