"""The cache: any split of the input gives the logits of one pass; its size is constant; it can be saved."""

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from hf_archs.cache import ArchDynamicCache, ArchStaticCache, RecurrentCache, StateCache
from hf_archs.registry import Architecture
from hf_archs.testing.contract.models import Contract, assert_close, forward, logits, tokens


def growing(config: Any) -> bool:
    """Whether the cache of a model with this config grows with the sequence."""
    states = [spec for i in range(config.num_hidden_layers) for spec in config.layer_plan(i).states().values()]
    return not set(config.layer_types) <= {"linear_attention", "conv"} or any(spec.grows for spec in states)


def continued(model: Any, ids: torch.Tensor, sizes: list[int], cache: Any = None) -> torch.Tensor:
    """The logits of ``ids`` in pieces of these sizes, with one cache."""
    found = []
    for piece in ids.split(sizes, dim=1):
        out = forward(model, piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def caches(config: Any) -> dict[str, Any]:
    """An empty cache of every class that a model accepts."""
    return {
        "dynamic": ArchDynamicCache(config),
        "static": ArchStaticCache(config, max_cache_len=200),
        "transformers' dynamic": DynamicCache(config=config),
        "transformers' static": StaticCache(config, max_cache_len=200),
    }


class CacheContract(Contract):
    """Promises about the cache."""

    def test_every_split_in_two(self, model: Any) -> None:
        ids = tokens(2, 13)
        whole = logits(model, ids, use_cache=False)
        for cut in range(1, 13):
            assert_close(continued(model, ids, [cut, 13 - cut]), whole, f"cut at {cut}")

    def test_token_by_token(self, model: Any) -> None:
        ids = tokens(2, 40)
        assert_close(continued(model, ids, [1] * 40), logits(model, ids, use_cache=False), "token by token")

    @pytest.mark.parametrize("kind", [ArchDynamicCache, ArchStaticCache], ids=lambda kind: kind.__name__)
    @pytest.mark.parametrize("start", [4, 5])
    def test_documents_are_taken_back(self, model: Any, kind: Any, start: int) -> None:
        """The last of seven tokens is taken back, if its document begins before the recorded tokens or at the first."""
        ids = tokens(1, 9)
        cache = kind(model.config, 20) if kind is ArchStaticCache else kind(model.config)
        cache.activate_past_recording()
        documents = (torch.arange(7) >= start).int().unsqueeze(0)
        logits(model, ids[:, :7], seq_idx=documents, past_key_values=cache)
        cache.crop(-1)
        expected = logits(model, ids[:, start:])[:, 6 - start :]
        assert_close(logits(model, ids[:, 6:], past_key_values=cache), expected, f"document at {start}")

    def test_taken_back_to_nothing(self, model: Any) -> None:
        ids = tokens(1, 9)
        cache = ArchDynamicCache(model.config)
        cache.activate_past_recording()
        logits(model, ids[:, :1], past_key_values=cache)
        cache.crop(-1)
        assert_close(logits(model, ids, past_key_values=cache), logits(model, ids), "from the beginning")

    def test_pieces_longer_and_shorter_than_any_chunk(self, model: Any) -> None:
        """Chunked forms cut the input at 64 or 128. The pieces here end at 64 and 128, one token before and after, and
        at random places."""
        ids = tokens(2, 150)
        whole = logits(model, ids, use_cache=False)
        cuts = [[c, 150 - c] for c in (1, 63, 64, 65, 127, 128, 129, 149)]
        dice = random.Random(0)
        for _ in range(3):
            ends = [0, *sorted(dice.sample(range(1, 150), 6)), 150]
            cuts.append([b - a for a, b in itertools.pairwise(ends)])
        for sizes in cuts:
            assert_close(continued(model, ids, sizes), whole, f"pieces of {sizes}")

    def test_every_kind_of_cache(self, model: Any) -> None:
        ids = tokens(2, 20)
        whole = logits(model, ids, use_cache=False)
        for kind, cache in caches(model.config).items():
            assert_close(continued(model, ids, [7, 1, 9, 3], cache), whole, kind)
            assert int(cache.get_seq_length()) == 20, kind
            cache.reset()
            assert int(cache.get_seq_length()) == 0, kind
            assert_close(continued(model, ids, [4, 16], cache), whole, f"{kind}, after a reset")

    def test_static_states_stay_where_they_are(self, model: Any) -> None:
        """States keep their addresses, since compiled steps and CUDA graphs write to fixed ones."""
        cache = ArchStaticCache(model.config, max_cache_len=50)
        continued(model, tokens(2, 5), [5], cache)
        addresses = {name: tensor.data_ptr() for name, tensor in cache.held()}
        continued(model, tokens(2, 5), [1, 4], cache)
        assert {name: tensor.data_ptr() for name, tensor in cache.held()} == addresses

    def test_no_cache_unless_asked_for(self, model: Any) -> None:
        assert model(tokens(1, 4), use_cache=False).past_key_values is None
        assert isinstance(model(tokens(1, 4), use_cache=True).past_key_values, RecurrentCache)

    def test_same_bytes_after_64_and_1024_tokens(self, model: Any) -> None:
        ids = tokens(1, 1024)
        cache = forward(model.model, ids[:, :64], use_cache=True).past_key_values
        after_64 = cache.num_bytes()
        forward(model.model, ids[:, 64:], past_key_values=cache)
        assert after_64 > 0
        held = sum(tensor.untyped_storage().nbytes() for _, tensor in cache.tensors())
        assert held == cache.num_bytes(), "a state is a view that keeps something larger alive"
        if not growing(model.config):
            assert cache.num_bytes() == after_64

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_states_saved_and_loaded(self, model: Any, kind: str, tmp_path: Path) -> None:
        """States are saved to a file and loaded into a new cache of either kind, bit for bit; the saved copy does not
        change later."""
        ids = tokens(2, 20)
        whole = logits(model, ids, use_cache=False)
        cache = caches(model.config)[kind]
        continued(model, ids[:, :9], [9], cache)
        save_file(cache.state_dict(), tmp_path / "state.safetensors")
        kept = cache.state_dict()
        expected = continued(model, ids[:, 9:], [1, 10], cache)
        assert_close(expected, whole[:, 9:], "continued")
        loaded = load_file(tmp_path / "state.safetensors")
        assert all(torch.equal(loaded[name], kept[name]) for name in loaded), "state_dict changed with the cache"
        for target in ("dynamic", "static"):
            other = caches(model.config)[target]
            other.load_state_dict(loaded)
            assert int(other.get_seq_length()) == 9
            found = continued(model, ids[:, 9:], [1, 10], other)
            assert_close(found, expected, f"{kind} into {target}")
            # a buffer of another length may be summed in another order
            assert torch.equal(found, expected) or (growing(model.config) and target != kind), f"{kind} into {target}"

    def test_a_cache_as_a_file(self, architecture: Architecture, model: Any, tmp_path: Path) -> None:
        """The model and its copies in other precisions continue a saved cache; a model of other weights refuses it."""
        ids, path = tokens(2, 20), tmp_path / "state.safetensors"
        cache = forward(model, ids[:, :9], use_cache=True).past_key_values
        cache.save(path, model)
        saved = dict(cache.tensors())
        expected = continued(model, ids[:, 9:], [1, 10], cache)
        found = continued(model, ids[:, 9:], [1, 10], ArchDynamicCache.load(path, model))
        assert torch.equal(found, expected)
        found = continued(model, ids[:, 9:], [1, 10], ArchStaticCache.load(path, model, 50))
        assert_close(found, expected, "in a static cache")
        for dtype in (torch.bfloat16, torch.float64):
            other = copy.deepcopy(model).to(dtype)
            alone = forward(other, ids[:, :9], use_cache=True).past_key_values
            loaded = ArchDynamicCache.load(path, other)
            assert {n: t.dtype for n, t in loaded.tensors()} == {n: t.dtype for n, t in alone.tensors()}
            assert all(torch.equal(tensor, saved[name].to(tensor.dtype)) for name, tensor in loaded.tensors())
            found = continued(other, ids[:, 9:], [1, 10], loaded)
        assert_close(found.float(), expected, "in float64")  # in bf16 a router may choose other experts
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match=r"state\.safetensors is of a model with other weights"):
            ArchDynamicCache.load(path, adapted)

    def test_prefix_cache(self, model: Any) -> None:
        """Of a prompt that begins like an earlier one, only the rest is read, also from the place where two earlier
        prompts began to differ."""
        read: list[int] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
        states = StateCache(model, 2**24)
        first = tokens(1, 20)
        second, third = (torch.cat([first[:, :12], tokens(1, n, seed=n)], 1) for n in (9, 3))
        for ids, expected in ((first, 19), (first, 0), (second, 20), (third, 2)):
            read.clear()
            cache = states.read(ids)
            assert sum(read) == expected
            assert_close(
                logits(model, ids[:, -1:], past_key_values=cache), logits(model, ids)[:, -1:], "the last token"
            )

    def test_states_of_another_model_are_refused(self, model: Any, architecture: Architecture) -> None:
        wider = architecture.causal_lm_class(architecture.tiny_config(hidden_size=128))
        states = forward(wider, tokens(1, 3), use_cache=True).past_key_values.state_dict()
        with pytest.raises(ValueError, match=r"layers\.0\."):
            ArchDynamicCache(model.config).load_state_dict(states)

    def test_a_cache_made_for_another_model_is_refused(self, model: Any, architecture: Architecture) -> None:
        config = architecture.tiny_config(num_hidden_layers=model.config.num_hidden_layers + 1)
        with pytest.raises(ValueError, match="not made for this model"):
            model(tokens(1, 3), cache=DynamicCache(config=config))

    def test_a_cache_made_for_no_model_is_taken(self, model: Any) -> None:
        ids, cache = tokens(1, 9), DynamicCache()
        logits(model, ids[:, :4], cache=cache)
        assert_close(logits(model, ids[:, 4:], cache=cache), logits(model, ids)[:, 4:], "continued")
