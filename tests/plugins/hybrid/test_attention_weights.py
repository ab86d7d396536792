"""`output_attentions` of a hybrid: one tensor for each attention of a layer, in the order of the user's tokens."""

import pytest
import torch

from hf_archs.cache import ArchDynamicCache, ArchStaticCache
from hf_archs.testing.contract.models import lively, tokens
from hf_archs_hybrid import ArchHybridConfig, ArchHybridForCausalLM

WINDOW = 4


@pytest.fixture
def model():
    config = ArchHybridConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=4,
        mixers={
            "local": {"type": "sliding_attention", "num_heads": 4, "window": WINDOW},
            "all": {"type": "attention", "num_heads": 4, "num_key_value_heads": 2},
            "ssm": {"type": "mamba2", "state_size": 16, "head_dim": 16},
        },
        layer_pattern="local all ssm local+all",
    )
    model = lively(ArchHybridForCausalLM, config)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def test_rows_and_columns(model):
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, [0, 1, 5]] = 0  # on the left, and one inside
    plain = model(ids, attention_mask=mask).logits
    out = model(ids, attention_mask=mask, output_attentions=True)
    assert torch.allclose(out.logits, plain, rtol=0, atol=1e-5), "looking changes nothing"
    assert [w.shape for w in out.attentions] == [(2, 4, 11, 11)] * 4
    real = mask[:, None, :, None].bool()
    place = mask.cumsum(1)
    ahead = place[:, None, :, None] - place[:, None, None, :]  # real tokens from a column to a row
    for weights, window in zip(out.attentions, (WINDOW, 11, WINDOW, 11), strict=True):
        assert torch.allclose(weights.sum(-1, keepdim=True), real.float().expand(-1, 4, -1, -1), atol=1e-5)
        seen = real & real.mT & (ahead >= 0) & (ahead < window)
        assert ((weights > 0) == seen).all()


@torch.no_grad()
def test_a_continuation_sees_the_same(model):
    ids = tokens(1, 11)
    whole = model(ids, output_attentions=True).attentions
    cache = model(ids[:, :6], use_cache=True).past_key_values
    for start, end in ((6, 9), (9, 10), (10, 11)):
        piece = model(ids[:, start:end], past_key_values=cache, output_attentions=True).attentions
        for weights, expected in zip(piece, whole, strict=True):
            assert weights.shape == (1, 4, end - start, end)
            assert torch.allclose(weights, expected[:, :, start:end, :end], rtol=0, atol=1e-5)


@torch.no_grad()
def test_fewer_tokens_than_a_window(model):
    """Empty places of a window's state or of a static cache are not columns."""
    ids = tokens(1, 5)
    whole = model(ids, output_attentions=True).attentions
    static = ArchStaticCache(model.config, max_cache_len=40)
    model(ids[:, :2], past_key_values=static)
    loaded = ArchDynamicCache(model.config)
    loaded.load_state_dict(static.state_dict())
    for cache in (model(ids[:, :2], use_cache=True).past_key_values, loaded):
        out = model(ids[:, 2:], past_key_values=cache, output_attentions=True)
        for weights, expected in zip(out.attentions, whole, strict=True):
            assert weights.shape == (1, 4, 3, 5)
            assert torch.allclose(weights, expected[:, :, 2:], rtol=0, atol=1e-5)


def test_only_where_they_are_asked_for(model):
    """Later calls run windows in blocks again."""
    model(tokens(1, 5), output_attentions=True)
    shown = []
    for layer in model.model.layers:
        for attention in layer.mixer.modules():
            attention.register_forward_pre_hook(lambda module, _: shown.append(getattr(module, "show", None)))
    model(tokens(1, 20))
    assert shown
    assert not any(shown)


def test_gradients_pass(model):
    out = model(tokens(1, 7), output_attentions=True)
    out.attentions[1].retain_grad()
    out.logits.sum().backward()
    assert out.attentions[1].grad.abs().max() > 0


def test_other_implementations_say_so(model, monkeypatch):
    model.set_attn_implementation("sdpa")
    said = []
    monkeypatch.setattr("hf_archs.model.backbone.logger.warning_once", said.append)
    assert model(tokens(1, 7), output_attentions=True).attentions == ()
    assert said == [
        "output_attentions: attention is computed by 'sdpa', which has no weights to show; call "
        "set_attn_implementation('eager') for them"
    ]
