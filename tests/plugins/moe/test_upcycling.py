"""Sparse upcycling: before training the mixture computes the same as the dense model."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

import hf_archs
from hf_archs.testing.contract.models import assert_close, lively, logits, tokens
from hf_archs.testing.native import SIZES
from hf_archs.testing.parity import enliven
from hf_archs_moe import ArchMoEConfig, ArchMoEForCausalLM
from hf_archs_moe.upcycling import upcycle


def dense(gated=True):
    tiny = hf_archs.get_architecture("moe").tiny_config(
        dense_layers=[0, 1], shared_expert_intermediate_size=0, gated=gated, hidden_act="silu" if gated else "relu2"
    )
    return lively(ArchMoEForCausalLM, tiny)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fields", [{}, {"router": "loss_free"}, {"num_experts_per_tok": 1}], ids=str)
def test_equals_the_dense_model(gated, fields):
    model = dense(gated)
    ids = tokens(2, 19)
    sparse = upcycle(model, num_experts=4, **fields)
    assert type(sparse) is type(model)
    assert all(layer.feed_forward.config.num_experts == 4 for layer in sparse.model.layers)
    assert_close(logits(sparse, ids), logits(model, ids), "upcycled")
    assert torch.equal(model.lm_head.weight, sparse.lm_head.weight)


def test_a_hybrid():
    """Dense feed-forwards become mixtures; the rest of a hybrid is unchanged."""
    hybrid = hf_archs.get_architecture("hybrid")
    model = lively(hybrid.causal_lm_class, hybrid.tiny_config())
    sparse = upcycle(model, num_experts=4)
    assert sparse.config.feed_forward["mlp"]["type"] == "moe"
    assert sparse.config.feed_forward["moe"] == model.config.feed_forward["moe"]
    ids = tokens(2, 19)
    assert_close(logits(sparse, ids), logits(model, ids), "upcycled")


def test_a_dense_model_of_transformers_becomes_a_mixtral():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-5)).eval()
    enliven(llama)
    ids = torch.randint(3, 97, (2, 19))
    with torch.no_grad():
        expected = llama(ids).logits
        sparse = upcycle(llama, num_experts=4)
        assert_close(sparse(ids).logits, expected, "upcycled")
        mixtral = hf_archs.to_native(sparse)
        assert type(mixtral) is MixtralForCausalLM
        assert mixtral.config.num_local_experts == 4
        assert_close(mixtral(ids).logits, expected, "as a Mixtral")


def test_noise_sets_the_copies_apart():
    model = dense()
    same, other = upcycle(model, 4, noise=0.1), upcycle(model, 4, noise=0.1)
    for one, two in zip(same.parameters(), other.parameters()):
        assert torch.equal(one, two), "the seed is fixed"
    up = same.model.layers[0].feed_forward.experts.gate_up_proj
    weights = torch.cat(
        [model.model.layers[0].feed_forward.gate_proj.weight, model.model.layers[0].feed_forward.up_proj.weight]
    )
    spread = (up - weights).std() / weights.std()
    assert 0.08 < spread < 0.12
    assert not torch.equal(up[0], up[1])
    assert not torch.equal(logits(same, tokens(1, 9)), logits(model, tokens(1, 9)))


def test_saved_and_loaded(tmp_path):
    sparse = upcycle(dense(), 4)
    sparse.save_pretrained(tmp_path)
    again = ArchMoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens(1, 9)), logits(sparse, tokens(1, 9)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise": -1.0}, "noise is -1.0; allowed are 0.0 to 1.0"),
        ({"norm_topk_prob": False}, "norm_topk_prob False .* whose weights add up to one"),
        ({"router": "switch", "num_experts_per_tok": 1}, "router is 'switch'.*; allowed are top_k and loss_free"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; allowed are 1 to num_experts = 8"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        upcycle(dense(), **fields)


def test_models_that_cannot_be_upcycled():
    with pytest.raises(ValueError, match="every layer of this model has experts already"):
        upcycle(ArchMoEForCausalLM(ArchMoEConfig(vocab_size=32, hidden_size=64, num_hidden_layers=1)))
    mamba = hf_archs.get_architecture("mamba")
    with pytest.raises(ValueError, match="with no feed-forward of type 'mlp' cannot be upcycled"):
        upcycle(mamba.causal_lm_class(mamba.tiny_config()))
