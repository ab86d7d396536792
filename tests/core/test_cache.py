"""The recurrent cache: rollback by replay, batch operations, saved states, and caches made by others."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache, MambaConfig, StaticCache

import hf_archs
from hf_archs.cache import ArchDynamicCache, ArchStaticCache, adopt
from hf_archs.cache.call import NAME
from hf_archs.parts import StateSpec
from hf_archs.testing.contract.models import assert_close, lively, logits, tokens
from hf_archs.testing.contract.padding import padded

KINDS = ("dynamic", "static")


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def model(request):
    architecture = hf_archs.get_architecture(request.param)
    return lively(architecture.causal_lm_class, architecture.tiny_config())


def empty(kind, config):
    return ArchDynamicCache(config) if kind == "dynamic" else ArchStaticCache(config, max_cache_len=300)


def feed(model, cache, ids, **arguments):
    return logits(model, ids, past_key_values=cache, **arguments)


def states_of(cache):
    return {name: tensor.clone() for name, tensor in cache.tensors()}


@pytest.mark.parametrize("kind", KINDS)
class TestCrop:
    @pytest.mark.parametrize(
        ("prefill", "more", "removed"), [(20, 5, 1), (20, 5, 3), (20, 5, 5), (1, 4, 2), (150, 9, 9)]
    )
    def test_takes_back_the_last_tokens(self, model, kind, prefill, more, removed):
        """After a crop the cache continues with other tokens as if the cropped ones had not been read."""
        cache = empty(kind, model.config)
        ids = tokens(1, prefill + more)
        feed(model, cache, ids[:, :prefill])
        cache.activate_past_recording()
        feed(model, cache, ids[:, prefill:], logits_to_keep=more)
        cache.crop(-removed)
        left = prefill + more - removed
        assert int(cache.get_seq_length()) == left
        other = tokens(1, 6, seed=1)
        found = feed(model, cache, other)
        assert_close(found, logits(model, torch.cat([ids[:, :left], other], 1))[:, left:], "after the crop")

    def test_over_several_forwards(self, model, kind):
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        ids = tokens(2, 12)
        for piece in ids.split([4, 1, 1, 6], 1):
            feed(model, cache, piece, logits_to_keep=12)
        cache.crop(-7)  # into the third forward
        other = tokens(2, 5, seed=1)
        assert_close(feed(model, cache, other), logits(model, torch.cat([ids[:, :5], other], 1))[:, 5:], "after")

    def test_back_to_nothing(self, model, kind):
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 3), logits_to_keep=3)
        cache.crop(-3)
        assert int(cache.get_seq_length()) == 0
        other = tokens(1, 6, seed=1)
        assert_close(feed(model, cache, other), logits(model, other), "from the beginning")

    def test_a_reset_after_it(self, model, kind):
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 3), logits_to_keep=3)
        cache.crop(-3)
        cache.reset()
        ids = tokens(1, 6, seed=1)
        assert_close(feed(model, cache, ids), logits(model, ids), "after the reset")

    def test_again_and_again(self, model, kind):
        """As in assisted decoding: drafts and crops in turn, also of no tokens."""
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        kept = tokens(1, 9)
        feed(model, cache, kept, logits_to_keep=1)
        cache.crop(0)
        for i, (drafted, removed) in enumerate([(5, 2), (4, 0), (3, 3), (1, 0), (6, 5)]):
            draft = tokens(1, drafted, seed=i + 1)
            found = feed(model, cache, draft, logits_to_keep=drafted)
            whole = logits(model, torch.cat([kept, draft], 1))
            assert_close(found, whole[:, kept.shape[1] :], f"round {i}")
            cache.crop(-removed)
            kept = torch.cat([kept, draft[:, : drafted - removed]], 1)
            assert int(cache.get_seq_length()) == kept.shape[1]

    def test_with_pads_and_documents(self, model, kind):
        """A cropped position may be a pad; each row loses the tokens in the last columns."""
        rows = [tokens(1, n, seed=n)[0] for n in (8, 5)]
        ids, mask = padded(rows, "right", 8)
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        feed(model, cache, ids, attention_mask=mask, logits_to_keep=8)
        cache.crop(-4)
        other = tokens(2, 5, seed=1)
        found = feed(model, cache, other, attention_mask=torch.cat([mask[:, :4], torch.ones(2, 5).long()], 1))
        for i, row in enumerate(rows):
            assert_close(found[i], logits(model, torch.cat([row[:4], other[i]])[None])[0, 4:], f"row {i}")
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
        feed(model, cache, ids[:1], seq_idx=seq_idx, logits_to_keep=8)
        cache.crop(-3)
        found = feed(model, cache, other[:1])
        assert_close(found, logits(model, torch.cat([ids[:1, 3:5], other[:1]], 1))[:, 2:], "in a document")

    def test_more_than_was_recorded(self, model, kind):
        """Only the last positions of a long prefill are recorded; cropping more is an error and changes nothing."""
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        ids = tokens(1, 150)
        feed(model, cache, ids, logits_to_keep=1)
        before = states_of(cache)
        with pytest.raises(ValueError, match="100 tokens cannot be taken back, only the last 2 are recorded"):
            cache.crop(-100)
        assert all(torch.equal(tensor, before[name]) for name, tensor in cache.tensors())
        assert int(cache.get_seq_length()) == 150
        cache.crop(-2)  # the recorded tokens still can be cropped
        other = tokens(1, 4, seed=1)
        assert_close(feed(model, cache, other), logits(model, torch.cat([ids[:, :148], other], 1))[:, 148:], "after")

    def test_what_is_recorded_is_small(self, model, kind):
        """It holds no state per token, and of a long forward only the window."""
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 500), logits_to_keep=1)
        inputs = [t for _, record in cache._records() for forward in record.inputs for t in forward.values()]
        held = sum(t.untyped_storage().nbytes() for t in inputs)
        assert 0 < held < 60_000
        cache.crop(0)
        assert not cache.segments
        assert not cache._records()

    def test_wrong_numbers(self, model, kind):
        cache = empty(kind, model.config)
        with pytest.raises(RuntimeError, match="nothing is recorded"):
            cache.crop(-1)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 4), logits_to_keep=4)
        with pytest.raises(ValueError, match="negative number, got 3"):
            cache.crop(3)
        with pytest.raises(ValueError, match="5 tokens cannot be taken back"):
            cache.crop(-5)
        assert int(cache.get_seq_length()) == 4

    def test_stop_recording(self, model, kind):
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 4))
        cache.stop_recording()
        feed(model, cache, tokens(1, 4))
        with pytest.raises(RuntimeError, match="nothing is recorded"):
            cache.crop(-1)

    def test_rows_change_while_recording(self, model, kind):
        """Rows are reordered between the forward and the crop, as by beam search."""
        cache = empty(kind, model.config)
        cache.activate_past_recording()
        ids = tokens(3, 9)
        feed(model, cache, ids, logits_to_keep=9)
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        cache.crop(-4)
        other = tokens(3, 4, seed=1)
        assert_close(feed(model, cache, other), logits(model, torch.cat([ids[order, :5], other], 1))[:, 5:], "after")


@pytest.mark.parametrize("kind", KINDS)
class TestRows:
    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        ],
        ids=["reorder", "repeat", "select", "select by mask"],
    )
    def test_rows_follow(self, model, kind, change, rows):
        cache = empty(kind, model.config)
        ids = tokens(3, 7)
        feed(model, cache, ids)
        assert cache.batch_size == 3
        change(cache)
        assert cache.batch_size == len(rows)
        other = tokens(len(rows), 4, seed=1)
        expected = logits(model, torch.cat([ids[rows], other], 1))[:, 7:]
        assert_close(feed(model, cache, other[:, :1]), expected[:, :1], "one token")
        assert_close(feed(model, cache, other[:, 1:]), expected[:, 1:], "more tokens")

    def test_an_empty_cache(self, model, kind):
        cache = empty(kind, model.config)
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == -1
        assert cache.num_bytes() == 0
        assert int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("kind", KINDS)
class TestSlots:
    def test_are_made_once(self, model, kind):
        cache = empty(kind, model.config)
        slots = [cache.slot(i) for i in range(2)]
        cache.activate_past_recording()
        feed(model, cache, tokens(2, 5), logits_to_keep=5)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(slots[1].get("conv"), dict(cache.tensors())["layers.1.conv"])
        cache.reset()
        assert slots[1].get("conv") is None
        assert [cache.slot(i) for i in range(2)] == slots

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_go_with_a_copy(self, model, kind, copied):
        """A copy of a cache and the cache itself are continued independently."""
        cache, ids = empty(kind, model.config), tokens(1, 9)
        feed(model, cache, ids[:, :4])
        other = copied(cache)
        expected = logits(model, ids)[:, 4:]
        for each in (other, cache):
            assert_close(feed(model, each, ids[:, 4:5]), expected[:, :1], "one token")
            assert_close(feed(model, each, ids[:, 5:]), expected[:, 1:], "more tokens")

    def test_do_not_keep_a_cache_alive(self, model, kind):
        """A cache's memory is freed with its last reference, without Python's cycle collector."""
        cache = empty(kind, model.config)
        feed(model, cache, tokens(1, 4))
        state, gone = weakref.ref(cache.slot(0).get("conv")), weakref.ref(cache)
        gc.disable()
        try:
            del cache
            assert gone() is None
            assert state() is None
        finally:
            gc.enable()


def test_parts_of_a_layer_have_slots_of_their_own():
    config = hf_archs.get_architecture("hybrid").tiny_config()
    cache = ArchDynamicCache(config)
    layer = next(i for i in range(config.num_hidden_layers) if config.layer_plan(i).mixer == "parallel")
    slot = cache.slot(layer)
    for name in config.layer_plan(layer).mixer_config.parts:
        part = slot.part(name)
        assert slot.part(name) is part
        assert {f"{name}.{state}" for state in part.places} <= set(slot.places)


class TestStatic:
    def test_addresses_stay(self, model):
        """Decoding, a crop, a reset and reordering write to the same buffers, as CUDA graphs require."""
        cache = ArchStaticCache(model.config, max_cache_len=50)
        ids = tokens(2, 7)
        feed(model, cache, ids)
        where = {name: tensor.data_ptr() for name, tensor in cache.held()}
        feed(model, cache, ids[:, :1])
        cache.activate_past_recording()
        feed(model, cache, ids, logits_to_keep=7)
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.reset()
        feed(model, cache, ids)
        assert {name: tensor.data_ptr() for name, tensor in cache.held()} == where

    def test_early_initialization(self, model):
        """Buffers allocated before the first token hold the empty state."""
        cache = ArchStaticCache(model.config, max_cache_len=50)
        cache.early_initialization(2, 1, 1, torch.float32, torch.device("cpu"))
        ids = tokens(2, 7)
        assert_close(feed(model, cache, ids), logits(model, ids), "from early buffers")

    def test_dynamic_states_are_not_written_over(self, model):
        """A dynamic cache does not write to its earlier state tensors."""
        cache = ArchDynamicCache(model.config)
        feed(model, cache, tokens(1, 5))
        kept = dict(cache.tensors())
        copies = {name: tensor.clone() for name, tensor in kept.items()}
        feed(model, cache, tokens(1, 5))
        feed(model, cache, tokens(1, 1))
        assert all(torch.equal(kept[name], copies[name]) for name in kept)


class TestSavedStates:
    def states(self, model):
        cache = ArchDynamicCache(model.config)
        feed(model, cache, tokens(2, 5))
        return cache.state_dict()

    def test_names_that_do_not_fit(self, model):
        states = self.states(model)
        name = next(iter(states))
        cache = ArchDynamicCache(model.config)
        feed(model, cache, tokens(1, 3))
        before = states_of(cache)
        for wrong, said in (
            ({k: v for k, v in states.items() if k != name}, name),
            (states | {"layers.9.ssm": states[name]}, r"layers\.9\.ssm"),
            ({k: v for k, v in states.items() if k != "length"}, "length"),
            (states | {name: states[name][..., :-1]}, rf"{name} has shape .*; "),
        ):
            with pytest.raises(ValueError, match=said):
                cache.load_state_dict(wrong)
        assert all(torch.equal(tensor, before[key]) for key, tensor in cache.tensors())
        assert cache.get_seq_length() == 3

    def test_an_empty_cache_is_saved_and_loaded(self, model):
        cache = ArchDynamicCache(model.config)
        feed(model, cache, tokens(1, 3))
        cache.load_state_dict(ArchDynamicCache(model.config).state_dict())
        assert cache.get_seq_length() == 0
        assert_close(feed(model, cache, tokens(1, 4)), logits(model, tokens(1, 4)), "from the beginning")

    def test_loading_forgets_what_was_recorded(self, model):
        cache = ArchDynamicCache(model.config)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 5), logits_to_keep=5)
        cache.load_state_dict(self.states(model))
        with pytest.raises(RuntimeError, match="nothing is recorded"):
            cache.crop(-1)


class TestCachesOfOthers:
    def test_stock_caches_become_ours(self, model):
        for cache, ours in (
            (DynamicCache(config=model.config), ArchDynamicCache),
            (DynamicCache(), ArchDynamicCache),
            (StaticCache(model.config, max_cache_len=40), ArchStaticCache),
        ):
            same = adopt(cache, model.config)
            assert same is cache
            assert type(same) is ours
            ids = tokens(1, 9)
            feed(model, same, ids[:, :4])
            assert_close(feed(model, same, ids[:, 4:]), logits(model, ids)[:, 4:], "continued")
            assert adopt(same, model.config) is same

    def test_foreign_caches_are_refused(self, model):
        class Mine(DynamicCache):
            pass

        short = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1)
        for cache in (DynamicCache(config=short), Mine(config=model.config)):
            with pytest.raises(ValueError, match=f"{NAME} is a {type(cache).__name__} that was not made for"):
                adopt(cache, model.config)

    def test_generate_refuses_what_it_cannot_use(self, model):
        ids = tokens(1, 4)
        options = {"max_new_tokens": 2, "do_sample": False}
        cache = ArchDynamicCache(model.config)
        with pytest.raises(ValueError, match="were both passed"):
            model.generate(ids, past_key_values=cache, cache_implementation="static", **options)
        with pytest.raises(ValueError, match="quantized"):
            model.generate(ids, cache_implementation="quantized", **options)
        with pytest.raises(ValueError, match=f"{NAME} is a tuple; allowed is a Cache"):
            model.generate(ids, past_key_values=(), **options)

    def test_a_batch_of_another_size_is_refused(self, model):
        cache = ArchDynamicCache(model.config)
        feed(model, cache, tokens(2, 4))
        with pytest.raises((ValueError, RuntimeError)):
            feed(model, cache, tokens(3, 4))


class TestGrowingStates:
    """A state with an entry per token: it grows with each forward, or is right-aligned in a buffer of fixed size."""

    @pytest.fixture
    def config(self, monkeypatch):
        specs = {
            "past": StateSpec("recurrent", (3, None)),
            "position": StateSpec("recurrent", (1,), torch.int64),
        }
        monkeypatch.setattr("hf_archs.config.model.LayerPlan.states", lambda plan: specs)
        config = hf_archs.get_architecture("mamba").tiny_config()
        return config

    @staticmethod
    def read(cache, inputs):
        cache.begin(inputs.shape[-1], None, inputs.device)
        slot = cache.slot(1)
        past, position = slot.get("past"), slot.get("position")
        past = inputs if past is None else torch.cat([past, inputs], -1)
        position = torch.zeros(inputs.shape[0], 1, dtype=torch.int64) if position is None else position
        slot.update({"past": past, "position": position + inputs.shape[-1]}, {}, lambda *_: {})

    @pytest.mark.parametrize("kind", KINDS)
    def test_holds_every_token(self, config, kind):
        cache = empty(kind, config)
        inputs = torch.randn(2, 3, 9)
        for piece in inputs.split([4, 1, 4], -1):
            self.read(cache, piece)
        past = dict(cache.tensors())["layers.1.past"]
        assert past.shape == (2, 3, 9 if kind == "dynamic" else 300)
        assert torch.equal(past[..., -9:], inputs)
        assert not past[..., :-9].any()
        assert cache.slot(1).get("position").tolist() == [[9], [9]]
        for other in KINDS:
            loaded = empty(other, config)
            loaded.load_state_dict({**cache.state_dict(), **self.of_layer_0(cache)})
            assert torch.equal(dict(loaded.tensors())["layers.1.past"][..., -9:], inputs)

    @staticmethod
    def of_layer_0(cache):
        states = cache.state_dict()
        return {name.replace("layers.1", "layers.0"): tensor for name, tensor in states.items() if "layers.1" in name}

    def test_more_than_a_static_cache_holds_is_an_error(self, config):
        cache = empty("static", config)
        self.read(cache, torch.randn(1, 3, 298))
        with pytest.raises(ValueError, match="max_cache_len = 300 positions; 298 are there and 3 more do not fit"):
            self.read(cache, torch.randn(1, 3, 3))

    def test_a_wrong_shape_is_refused(self, config):
        cache = empty("dynamic", config)
        self.read(cache, torch.randn(1, 3, 4))
        states = {**cache.state_dict(), **self.of_layer_0(cache)}
        states["layers.0.past"] = torch.randn(1, 2, 4)
        with pytest.raises(
            ValueError, match=r"layers\.0\.past has shape \(1, 2, 4\); allowed is \('batch', 3, 'length'\)"
        ):
            empty("dynamic", config).load_state_dict(states)
