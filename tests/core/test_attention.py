"""Attention, sliding attention and memory against loops and transformers' own, for any split of a text."""

import copy
import itertools
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize
from transformers import MistralConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from hf_archs.cache import ArchDynamicCache, ArchStaticCache
from hf_archs.config.model import ArchConfig, LayerPlan
from hf_archs.kernels.numerics import _kept
from hf_archs.layers import eager, rotary
from hf_archs.registry import get_mixer
from hf_archs.testing.contract.compiling import counted
from hf_archs.testing.contract.models import assert_close, enliven

WIDTH = 16
EXACT = 1e-10  # for results in float64

FULL = {
    "plain": ("attention", {}),
    "groups": ("attention", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "head norm": ("attention", {"qk_norm": "head", "rope_theta": None, "head_dim": 6, "output_bias": True}),
    "full norm": ("attention", {"qk_norm": "full", "num_key_value_heads": 1, "clip_qkv": 0.7, "attention_scale": 0.9}),
}
BOUNDED = {
    "window": ("sliding_attention", {"window": 4, "num_key_value_heads": 2}),
    "itself": ("sliding_attention", {"window": 1}),
    "global": ("sliding_attention", {"window": 4, "global_tokens": 2}),
    "many global": ("sliding_attention", {"window": 2, "global_tokens": 7, "num_key_value_heads": 1}),
    "compressive": ("memory", {"window": 3, "memory_slots": 2, "compression_rate": 3, "num_key_value_heads": 2}),
    "compressive, global": ("memory", {"window": 4, "memory_slots": 3, "compression_rate": 2, "global_tokens": 3}),
    "compressive, no rotation": ("memory", {"window": 1, "memory_slots": 1, "compression_rate": 1, "rope_theta": None}),
    "retrieval": (
        "memory",
        {"window": 3, "memory_type": "retrieval", "memory_slots": 5, "retrieved_keys": 2, "num_key_value_heads": 2},
    ),
    "retrieval, global": (
        "memory",
        {"window": 2, "memory_type": "retrieval", "memory_slots": 4, "retrieved_keys": 4, "global_tokens": 1},
    ),
}
ALL = FULL | BOUNDED


def mixer_of(name, dtype=torch.float64, **changes):
    kind, fields = ALL[name]
    entry = get_mixer(kind)
    config = entry.config_class(hidden_size=WIDTH, **{"num_heads": 4, **fields, **changes})
    mixer = entry.module_class(config)
    for module in mixer.modules():
        if hasattr(module, "init_weights"):
            module.init_weights()
    return enliven(mixer).to(dtype)


def cache_of(mixer, kind="dynamic"):
    name = next(name for name in ("attention", "sliding_attention", "memory") if is_a(mixer, name))

    class Config(ArchConfig):
        model_type = "attention_test"
        mixer_type = name

        def layer_plan(self, layer_idx):
            return LayerPlan(name, mixer.config)

    config = Config(vocab_size=8, hidden_size=WIDTH, num_hidden_layers=1)
    return ArchDynamicCache(config) if kind == "dynamic" else ArchStaticCache(config, max_cache_len=60)


def is_a(mixer, name):
    return type(mixer) is get_mixer(name).module_class


def inputs(batch, length, seed=0, dtype=torch.float64):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def read(mixer, cache, x, lengths=None, seq_idx=None, keep=1):
    mask = None if lengths is None else torch.arange(x.shape[1]) < lengths[:, None]
    cache.begin(x.shape[1], mask, x.device, keep)
    return mixer(x, state=cache.slot(0), lengths=lengths, seq_idx=seq_idx)


def assert_holds(mixer, cache, row, text):
    """Check that a cache's row equals the states after ``text`` alone; growing states have zeros in other columns."""
    alone = cache_of(mixer)
    read(mixer, alone, text)
    for key, expected in alone.tensors():
        held = dict(cache.tensors())[key][row]
        assert not held[..., : held.shape[-1] - expected.shape[-1]].any(), key
        held = held[..., held.shape[-1] - expected.shape[-1] :]
        assert torch.allclose(held, expected[0], rtol=0, atol=EXACT), key


# -- the definition --------------------------------------------------------------------------------------------------


def turned(x, position, config):
    """The channels of one head, rotated as complex numbers."""
    if config.rope_theta is None:
        return x
    size = config.rotary_size
    pair = torch.complex(x[: size // 2], x[size // 2 : size])
    angle = position * config.rope_theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    pair = pair * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pair.real, pair.imag, x[size:]])


def normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def attended(query, keys, values, scale):
    scores = torch.stack([(query * key).sum() for key in keys]) * scale
    return scores, (scores.softmax(0)[:, None] * torch.stack(values)).sum(0)


def reference(mixer, x):
    """The output for one document (l, d), by a loop over heads and queries."""
    config = mixer.config
    size, heads, groups = config.head_size, config.num_heads, config.key_value_heads
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    if config.qk_norm == "full":
        q, k = normed(q, mixer.q_norm), normed(k, mixer.k_norm)
    q, k, v = q.view(-1, heads, size), k.view(-1, groups, size), v.view(-1, groups, size)
    if config.qk_norm == "head":
        q, k = normed(q, mixer.q_norm), normed(k, mixer.k_norm)
    if config.clip_qkv is not None:
        q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
    scale = size**-0.5 if config.attention_scale is None else config.attention_scale
    out = []
    for t, head in itertools.product(range(x.shape[0]), range(heads)):
        group = head // (heads // groups)
        query = turned(q[t, head], t, config)
        keys = [turned(k[j, group], j, config) for j in range(t + 1)]
        own = v[: t + 1, group]
        window = getattr(config, "window", t + 1)
        first, memory = max(t - window + 1, 0), getattr(config, "memory_type", None)
        more_keys, more_values = [], []
        if memory == "compressive":
            rate = config.compression_rate
            blocks = first // rate  # blocks without a token in the window
            first = blocks * rate
            for block in range(max(blocks - config.memory_slots, 0), blocks):
                tokens = range(block * rate, (block + 1) * rate)
                key = sum(mixer.memory.key_taps[group, u] * k[j, group] for u, j in enumerate(tokens))
                more_keys.append(turned(key, tokens[-1], config))
                more_values.append(sum(mixer.memory.value_taps[group, u] * own[j] for u, j in enumerate(tokens)))
        seen = [j for j in range(t + 1) if j >= first or j < getattr(config, "global_tokens", 0)]
        y = attended(query, [keys[j] for j in seen] + more_keys, [own[j] for j in seen] + more_values, scale)[1]
        left = range(max(first - getattr(config, "memory_slots", 0), 0), first)
        if memory == "retrieval" and left:
            scores = attended(query, [keys[j] for j in left], [own[j] for j in left], scale)[0]
            nearest = [left[int(i)] for i in scores.topk(min(config.retrieved_keys, len(left))).indices]
            found = attended(query, [keys[j] for j in nearest], [own[j] for j in nearest], scale)[1]
            gate = mixer.memory.gate[head].sigmoid()
            y = gate * found + (1 - gate) * y
        out.append(y)
    return mixer.out_proj(torch.stack(out).view(x.shape[0], -1))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_loop_says_the_same(name, implementation):
    mixer = mixer_of(name)
    mixer.config._attn_implementation = implementation
    with torch.no_grad():
        for length in (1, 2, 5, 23):
            x = inputs(2, length, seed=length)
            found = mixer(x)
            assert found.dtype == torch.float64
            for i in range(2):
                assert_close(found[i], reference(mixer, x[i]), f"length {length}, row {i}", EXACT)


# -- transformers' own -----------------------------------------------------------------------------------------------


def native(config_class, module_class, **fields):
    config = config_class(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.0, **fields
    )
    config._attn_implementation = "eager"
    return config, enliven(module_class(config, layer_idx=0), seed=3)


@pytest.mark.parametrize(
    ("kind", "config_class", "module_class", "theirs", "ours"),
    [
        ("attention", MixtralConfig, MixtralAttention, {"head_dim": 8}, {"head_dim": 8}),
        (
            "attention",
            Qwen3MoeConfig,
            Qwen3MoeAttention,
            {"head_dim": 6, "attention_bias": True},
            {"head_dim": 6, "qk_norm": "head", "attention_bias": True, "output_bias": True, "norm_eps": 1e-6},
        ),
        ("attention", OlmoeConfig, OlmoeAttention, {"clip_qkv": 0.8}, {"qk_norm": "full", "clip_qkv": 0.8}),
        ("sliding_attention", MistralConfig, MistralAttention, {"sliding_window": 5, "head_dim": 4}, {"window": 5}),
    ],
    ids=["mixtral", "qwen3_moe", "olmoe", "mistral"],
)
def test_transformers_says_the_same(kind, config_class, module_class, theirs, ours):
    config, module = native(config_class, module_class, **theirs)
    entry = get_mixer(kind)
    fields = {"num_heads": 4, "num_key_value_heads": 2, "rope_theta": config.rope_parameters["rope_theta"], **ours}
    mixer = entry.module_class(entry.config_class(hidden_size=WIDTH, **fields))
    mixer.load_state_dict({name.replace("o_proj", "out_proj"): t for name, t in module.state_dict().items()})
    x, length = inputs(2, 21, dtype=torch.float32), 21
    position = torch.arange(length)
    behind = position[:, None] - position
    seen = (behind >= 0) & (behind < theirs.get("sliding_window", length))
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    embeddings = MistralRotaryEmbedding(config)(x, position[None])
    with torch.no_grad():
        assert_close(mixer(x), module(x, position_embeddings=embeddings, attention_mask=mask)[0], "the mixer")


# -- pieces, pads, documents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_every_split(name, kind):
    mixer = mixer_of(name)
    x = inputs(2, 19)
    whole = mixer(x)
    splits = [[cut, 19 - cut] for cut in range(1, 19)] + [[1] * 19, [3, 1, 1, 9, 5], [10, 1, 8], [1, 16, 2]]
    for sizes in splits:
        cache = cache_of(mixer, kind)
        found = torch.cat([read(mixer, cache, piece) for piece in x.split(sizes, 1)], 1)
        assert_close(found, whole, f"pieces of {sizes}", EXACT)
        assert cache.slot(0).get("position").tolist() == [[19], [19]]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_pads_and_a_cache_that_goes_on(name, early):
    """Rows end at different tokens in every piece, and one has none in the second. Pads are not-a-number."""
    mixer = mixer_of(name)
    lengths = torch.tensor([[11, 4, 7], [3, 9, 0], [1, 0, 1], [2, 12, 5]])
    cache = cache_of(mixer, "static" if early else "dynamic")
    if early:
        cache.early_initialization(3, 1, 1, torch.float64, torch.device("cpu"))
    rows = [inputs(1, 50, seed=i)[0] for i in range(3)]
    whole = [mixer(row[None])[0] for row in rows]
    place = [0, 0, 0]
    for piece in lengths:
        x = torch.full((3, int(piece.max()), WIDTH), 1e3, dtype=torch.float64)
        for i, count in enumerate(piece.tolist()):
            x[i, :count] = rows[i][place[i] : place[i] + count]
        found = read(mixer, cache, x, lengths=piece)
        for i, count in enumerate(piece.tolist()):
            if count:
                assert_close(found[i, :count], whole[i][place[i] : place[i] + count], f"row {i}", EXACT)
            place[i] += count
        assert cache.slot(0).get("position").flatten().tolist() == place
    for i, row in enumerate(rows):
        assert_holds(mixer, cache, i, row[None, : place[i]])


@pytest.mark.parametrize("name", ALL)
def test_documents(name):
    """Forward and gradients of each document equal those alone, after a cache and with pads; the last is continued."""
    mixer = mixer_of(name)
    cuts = (5, 1, 14, 2, 9)
    history, texts = inputs(1, 8, seed=9), [inputs(1, n, seed=n) for n in cuts]
    seq_idx = torch.repeat_interleave(torch.arange(5), torch.tensor(cuts))[None]
    packed = torch.cat(texts, 1)
    found = mixer(packed, seq_idx=seq_idx)
    for part, text in zip(found.split(cuts, 1), texts):
        assert_close(part, mixer(text), f"{text.shape[1]} tokens", EXACT)
    weights = inputs(1, sum(cuts), seed=3)
    parameters = [*mixer.parameters()]
    together = torch.autograd.grad((found * weights).sum(), parameters)
    alone = [(mixer(t) * w).sum() for t, w in zip(texts, weights.split(cuts, 1))]
    for a, b in zip(together, torch.autograd.grad(torch.stack(alone).sum(), parameters)):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        cache = cache_of(mixer)
        read(mixer, cache, history)
        padded = torch.cat([packed, torch.full((1, 3, WIDTH), 1e3, dtype=torch.float64)], 1)
        padded_idx = torch.cat([seq_idx, torch.tensor([[0, 7, 7]])], 1)
        found = read(mixer, cache, padded, lengths=torch.tensor([sum(cuts)]), seq_idx=padded_idx)
        firsts = [mixer(torch.cat([history, texts[0]], 1))[:, 8:], *(mixer(t) for t in texts[1:])]
        for part, expected in zip(found[:, :-3].split(cuts, 1), firsts):
            assert_close(part, expected, "after a cache", EXACT)
        assert_holds(mixer, cache, 0, texts[-1])
        more = inputs(1, 8, seed=4)
        expected = mixer(torch.cat([texts[-1], more], 1))[:, cuts[-1] :]
        for piece, part in zip(more.split([1, 6, 1], 1), expected.split([1, 6, 1], 1)):
            assert_close(read(mixer, cache, piece), part, "the last document goes on", EXACT)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_rollback(name, kind):
    """Cropped tokens have no effect, and no columns in a growing state."""
    mixer = mixer_of(name)
    x, other = inputs(1, 20), inputs(1, 6, seed=1)
    for prefill, drafted, removed in ((7, 6, 4), (12, 1, 1), (0, 5, 3), (3, 9, 9), (0, 4, 4)):
        cache = cache_of(mixer, kind)
        if prefill:
            read(mixer, cache, x[:, :prefill])
        cache.activate_past_recording()
        read(mixer, cache, x[:, prefill : prefill + drafted], keep=9)
        cache.crop(-removed)
        left = prefill + drafted - removed
        if kind == "dynamic" and left and mixer.reach is None:
            assert cache.slot(0).get("key").shape[-1] == left
        expected = mixer(torch.cat([x[:, :left], other], 1))[:, left:]
        found = torch.cat([read(mixer, cache, piece) for piece in other.split([1, 4, 1], 1)], 1)
        assert_close(found, expected, f"{prefill} + {drafted} - {removed}", EXACT)


@torch.no_grad()
def test_rollback_of_a_padded_batch_and_of_a_long_forward():
    for name in ALL:
        mixer = mixer_of(name)
        rows, other = inputs(2, 9), inputs(2, 3, seed=1)
        cache = cache_of(mixer)
        cache.activate_past_recording()
        read(mixer, cache, rows, lengths=torch.tensor([9, 2]))
        cache.crop(-4)  # the second row has pads only there
        found = read(mixer, cache, other)
        for i, left in enumerate((5, 2)):
            whole = mixer(torch.cat([rows[i : i + 1, :left], other[i : i + 1]], 1))
            assert_close(found[i], whole[0, left:], f"{name}, row {i}", EXACT)
        cache = cache_of(mixer)
        cache.activate_past_recording()
        x = inputs(1, 40)
        read(mixer, cache, x)
        cache.crop(-2)
        found = read(mixer, cache, other[:1])
        assert_close(found, mixer(torch.cat([x[:, :38], other[:1]], 1))[:, 38:], f"{name}, long", EXACT)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_rollback_into_a_document(name):
    mixer = mixer_of(name)
    cache = cache_of(mixer)
    x, seq_idx = inputs(1, 16), torch.tensor([[0] * 5 + [1] * 8 + [2] * 3])
    read(mixer, cache, inputs(1, 9, seed=1))
    cache.activate_past_recording()
    read(mixer, cache, x, seq_idx=seq_idx, keep=15)
    cache.crop(-5)
    assert_holds(mixer, cache, 0, x[:, 5:11])


@torch.no_grad()
def test_bytes():
    """A bounded state has the same size after 64 and 1,024 tokens, and the size in its docstring."""
    for name in BOUNDED:
        mixer = mixer_of(name, torch.float32)
        cache = cache_of(mixer)
        read(mixer, cache, inputs(1, 64, dtype=torch.float32))
        after_64 = cache.num_bytes()
        for piece in inputs(1, 960, dtype=torch.float32).split([1, 958, 1], 1):
            read(mixer, cache, piece)
        assert cache.num_bytes() == after_64, name
        assert sum(t.untyped_storage().nbytes() for _, t in cache.tensors()) == after_64, name
        config = mixer.config
        columns = config.reach - 1 + config.global_tokens
        if getattr(config, "memory_type", None) == "compressive":
            columns += config.memory_slots
        assert after_64 == 2 * 4 * columns * config.key_value_heads * config.head_size + 8, name
    mixer = mixer_of("groups", torch.float32)
    cache = cache_of(mixer)
    read(mixer, cache, inputs(1, 64, dtype=torch.float32))
    read(mixer, cache, inputs(1, 1, dtype=torch.float32))
    assert cache.num_bytes() == 2 * 4 * 65 * 2 * 4 + 8


def test_long_texts_take_memory_as_they_are_long():
    """With a window of 16, no tensor has an entry for every pair of 4,096 tokens."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.untyped_storage().nbytes() for t in tensors)])
            return out

    length = 4096
    for name in ("global", "compressive", "retrieval"):
        mixer = mixer_of(name, torch.float32, window=16, num_heads=1, num_key_value_heads=None)
        x = inputs(1, length, dtype=torch.float32).requires_grad_()
        seq_idx = (torch.arange(length) // 1500)[None]
        with Watch():
            mixer(x, seq_idx=seq_idx).sum().backward()
    assert largest < length * length / 8


# -- gradients, precision, implementations ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["groups", "full norm", "global", "compressive", "compressive, global", "retrieval"])
def test_gradients(name):
    """Gradients of inputs, parameters and given states, over documents and pads."""
    mixer = mixer_of(name, num_heads=2, num_key_value_heads=1)
    cache = cache_of(mixer)
    with torch.no_grad():
        read(mixer, cache, inputs(2, 9, seed=1))
    states = {n: cache.slot(0).get(n) for n in mixer.states}
    learned = {n: p.detach().clone().requires_grad_() for n, p in mixer.named_parameters()}
    given = [n for n, t in states.items() if t.is_floating_point() and t.numel()]
    seq_idx, lengths = torch.tensor([[0] * 7, [0] * 4 + [1] * 3]), torch.tensor([7, 6])

    class Given:
        def __init__(self, held):
            self.held, self.after = held, None

        def get(self, name):
            return self.held[name]

        def update(self, states, inputs, replay):
            self.after = states

    def run(x, *tensors):
        slot = Given({**states, **dict(zip(given, tensors))})
        parameters = dict(zip(learned, tensors[len(given) :]))
        y = torch.func.functional_call(mixer, parameters, (x, slot, lengths, seq_idx))
        real = torch.arange(7)[:, None] < lengths[:, None, None]
        return y * real, *(slot.after[n] for n in given)

    tensors = [states[n].detach().clone().requires_grad_() for n in given]
    x = inputs(2, 7).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *tensors, *learned.values()), fast_mode=True)


def test_every_parameter_gets_a_gradient():
    """Also if the text is shorter than the window."""
    for name in ALL:
        mixer = mixer_of(name)
        for length in (1, 2, 20):
            mixer.zero_grad(set_to_none=True)
            (mixer(inputs(1, length)) * inputs(1, length, seed=1)).sum().backward()
            for parameter, t in mixer.named_parameters():
                assert t.grad is not None, f"{name}, {parameter}"
                assert t.grad.isfinite().all(), f"{name}, {parameter}"
        for parameter, t in mixer.named_parameters():
            assert t.grad.any() or name == "itself", f"{name}, {parameter}"


# of retrieval memories only the one that retrieves all keys, since rounding changes the nearest ones
@pytest.mark.parametrize("name", ["groups", "full norm", "global", "compressive", "retrieval, global"])
@torch.no_grad()
def test_half_precision(name):
    """bfloat16 and autocast, with and without a cache, are near the float32 result and have the right dtypes."""
    exact = mixer_of(name, torch.float32)
    x = inputs(2, 17, dtype=torch.float32)
    expected = exact(x)
    for mode in ("weights", "autocast"):
        mixer = copy.deepcopy(exact).to(torch.bfloat16) if mode == "weights" else exact
        given = x.to(torch.bfloat16) if mode == "weights" else x
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            cache = cache_of(mixer)
            pieces = [read(mixer, cache, piece) for piece in given.split([6, 1, 10], 1)]
            for found in (mixer(given), torch.cat(pieces, 1)):
                assert found.dtype == torch.bfloat16
                assert (found - expected).norm() < 0.05 * expected.norm()
        assert {t.dtype for key, t in cache.tensors() if "position" not in key} == {torch.bfloat16}


@torch.no_grad()
def test_a_cache_of_another_precision_goes_on():
    """The states have the dtype of the latest tokens."""
    for name in ALL:
        mixer = mixer_of(name, torch.float32)
        cache = cache_of(mixer)
        x = inputs(1, 9, dtype=torch.float32)
        for piece, dtype in zip(x.split([7, 1, 1], 1), (torch.float32, torch.bfloat16, torch.float32)):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                read(mixer, cache, piece)
            assert {t.dtype for key, t in cache.tensors() if "position" not in key} == {dtype}, name


def test_users_can_bring_their_own(monkeypatch):
    """A function registered with transformers is called, with the mask of what a query sees."""
    calls = []

    def mine(module, query, key, value, attention_mask, **kwargs):
        calls.append((tuple(query.shape), tuple(key.shape), attention_mask, kwargs))
        return eager.eager_attention(module, query, key, value, attention_mask, kwargs["scaling"])

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", mine)
    mixer = mixer_of("groups")
    x = inputs(2, 5)
    expected = mixer(x)
    mixer.config._attn_implementation = "mine"
    assert_close(mixer(x), expected, "mine", EXACT)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
    mixer(x, seq_idx=seq_idx)
    (q, k, mask, options), (_, _, documents, _) = calls
    assert (q, k, mask) == ((2, 4, 5, 4), (2, 2, 5, 4), None)
    assert options == {"dropout": 0.0, "scaling": 0.5, "is_causal": True}
    same = seq_idx[:, :, None] == seq_idx[:, None]
    assert torch.equal(documents[:, 0], same & torch.ones(5, 5).tril().bool())
    mixer.config._attn_implementation = "yours"
    with pytest.raises(KeyError, match="yours"):
        mixer(x)


def test_positions_far_from_the_start():
    """In float32, angles are right to 1e-6 at token 200,000, also in a mixer built on `meta`."""
    position = torch.tensor([[0, 1, 200_000]])
    cos, sin = rotary.rotary(position, 8, 1e4, torch.float32)
    for c, t in itertools.product(range(4), range(3)):
        angle = int(position[0, t]) * 1e4 ** (-c / 4)
        assert abs(cos[0, 0, t, c].item() - math.cos(angle)) < 1e-6
        assert abs(sin[0, 0, t, 4 + c].item() - math.sin(angle)) < 1e-6
    expected = mixer_of("plain")
    with torch.device("meta"):
        mixer = type(expected)(expected.config)
    mixer = mixer.to_empty(device="cpu").double()
    mixer.load_state_dict(expected.state_dict())
    assert torch.equal(mixer(inputs(1, 9)), expected(inputs(1, 9)))


def test_constants_are_kept_of_plain_tensors_alone():
    """Forwards before, after and under tracing do not share tensors."""
    mixer = mixer_of("compressive", torch.float32)
    names = dict(mixer.named_parameters())
    x = inputs(1, 9, dtype=torch.float32)
    _kept.clear()
    functionalize(lambda p: functional_call(mixer, p, (x,)))({n: p.detach() for n, p in names.items()})
    expected = mixer(x)
    assert expected.tolist()
    expected.sum().backward()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert mixer(torch.empty(1, 9, WIDTH)).shape == expected.shape
    with torch.inference_mode():
        mixer(x)
    assert torch.equal(mixer(x), expected)


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["groups", "compressive, global", "retrieval"])
class TestCompile:
    @pytest.fixture(autouse=True)
    def _no_graphs_from_before(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_training(self, name):
        """One graph for all lengths, also for a multiple of the block."""
        mixer = mixer_of(name)
        graphs, backend = counted("aot_eager")
        compiled = torch.compile(mixer, backend=backend, fullgraph=True, dynamic=True)
        compiled_after = []
        for length in (24, 70, 37, 32):
            x, lengths = inputs(2, length), torch.tensor([length, length - 5])
            found, expected = compiled(x, lengths=lengths), mixer(x, lengths=lengths)
            assert_close(found, expected, f"length {length}", EXACT)
            parameters = [*mixer.parameters()]
            both = [torch.autograd.grad((y * inputs(2, length, seed=1)).sum(), parameters) for y in (found, expected)]
            for a, b in zip(*both):
                assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
            compiled_after.append(len(graphs))  # dynamo may trace one graph twice, so the first is 1 or 2
        assert 0 < compiled_after[0] == compiled_after[-1] <= 2, compiled_after

    @torch.no_grad()
    def test_a_static_cache(self, name):
        """One graph for pieces of any length, and one for single tokens."""
        mixer = mixer_of(name)
        graphs, backend = counted("eager")

        def step(x, cache):
            return read(mixer, cache, x)

        compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
        x = inputs(2, 55)
        whole = mixer(x)
        cache = cache_of(mixer, "static")
        cache.early_initialization(2, 1, 1, torch.float64, torch.device("cpu"))
        found = []
        for piece in x.split([20, 1, 1, 15, 1, 16, 1], 1):
            found.append(compiled(piece, cache))
        assert_close(torch.cat(found, 1), whole, "compiled", EXACT)
        assert len(graphs) == 2


# -- configs ---------------------------------------------------------------------------------------------------------


def test_biases():
    assert {n for n, _ in mixer_of("groups").named_parameters() if "bias" in n} == {f"{x}_proj.bias" for x in "qkv"}
    assert {n for n, _ in mixer_of("head norm").named_parameters() if "bias" in n} == {"out_proj.bias"}


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("attention", {"num_heads": 3}, "num_heads is 3; allowed are divisors of hidden_size = 16 where head_dim"),
        ("attention", {"num_heads": 0}, "num_heads is 0; allowed are 1 to 1024"),
        ("attention", {"num_key_value_heads": 3}, "num_key_value_heads is 3; allowed are divisors of num_heads = 4"),
        ("attention", {"num_key_value_heads": 8}, "num_key_value_heads is 8; allowed are 1 to 4"),
        ("attention", {"head_dim": 5}, "partial_rotary_factor is 1.0; allowed is what gives an even number of the 5"),
        ("attention", {"partial_rotary_factor": 0.3}, "partial_rotary_factor is 0.3; allowed is what gives an even"),
        ("attention", {"rope_theta": -1.0}, "rope_theta is -1.0; allowed are 1.0 to"),
        ("attention", {"qk_norm": "both"}, "qk_norm"),
        ("attention", {"clip_qkv": 0.0}, "clip_qkv is 0.0; allowed are 1e-06 to"),
        ("attention", {"attention_scale": math.nan}, "attention_scale is nan; allowed are 1e-06 to"),
        ("sliding_attention", {"window": 0}, "window is 0; allowed are 1 to"),
        ("sliding_attention", {"global_tokens": -1}, "global_tokens is -1; allowed are 0 to"),
        ("memory", {"memory_type": "long"}, "memory_type"),
        ("memory", {"memory_slots": 0}, "memory_slots is 0; allowed are 1 to"),
        ("memory", {"compression_rate": 0}, "compression_rate is 0; allowed are 1 to"),
        ("memory", {"memory_type": "retrieval", "memory_slots": 4}, "retrieved_keys is 32; allowed are 1 to 4"),
    ],
)
def test_bad_values(kind, fields, said):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        get_mixer(kind).config_class(hidden_size=WIDTH, **{"num_heads": 4, **fields})
    assert said in f"{error.value} {error.value.__cause__}"
