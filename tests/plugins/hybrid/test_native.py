"""Jamba, Bamba and Nemotron-H of transformers: the same logits and gradients, files, caches and refusals."""

import pytest
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

import hf_archs
from hf_archs.call import NAME
from hf_archs.testing.contract.models import assert_close
from hf_archs.testing.native import SIZES, check_files, check_native, native
from hf_archs_hybrid import ArchHybridForCausalLM, preset

NEMOTRON = {
    **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"},
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 40,
    "head_dim": 16,
}
CASES = {
    "jamba": (
        JambaForCausalLM,
        JambaConfig(
            **{**SIZES, "num_hidden_layers": 4},
            num_experts=4,
            attn_layer_period=4,
            attn_layer_offset=2,
            mamba_d_state=8,
            mamba_dt_rank=5,
        ),
    ),
    "jamba, dense": (
        JambaForCausalLM,
        JambaConfig(**SIZES, num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1),
    ),
    "bamba": (
        BambaForCausalLM,
        BambaConfig(**{**SIZES, "num_hidden_layers": 3}, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_state=16),
    ),
    "nemotron_h": (
        NemotronHForCausalLM,
        NemotronHConfig(**NEMOTRON, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"]),
    ),
    "nemotron_h, scaled": (
        NemotronHForCausalLM,
        NemotronHConfig(
            **NEMOTRON, layers_block_type=["moe", "linear_attention"], norm_topk_prob=False, routed_scaling_factor=2.5
        ),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    check_native(*CASES[case], "hybrid", dtype)


@pytest.mark.parametrize("case", CASES)
def test_files(case, tmp_path):
    check_files(*CASES[case], "hybrid", tmp_path)


@pytest.mark.parametrize("case", ["jamba", "bamba", "nemotron_h"])
def test_a_cache_continued_by_chunks(case):
    """transformers' own Jamba forgets the recurrence's state where more than one token continues a cache."""
    theirs = native(*CASES[case])
    ours = hf_archs.from_native(theirs)
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))

    def continued(model):
        cache, found = None, []
        for piece in ids.split([17, 5, 1, 17], 1):
            out = model(piece, use_cache=True, **{NAME: cache})
            cache = out[NAME]
            found.append(out.logits)
        return torch.cat(found, 1)

    with torch.no_grad():
        whole = ours(ids).logits
        assert_close(theirs(ids).logits, whole, "theirs at once")
        assert_close(continued(ours), whole, "ours by chunks")
        if case == "jamba":
            off = (continued(theirs) - whole).abs().max() / whole.abs().max()
            assert off > 1e-4, "transformers' Jamba is right now: say so in the model card"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_group": 2, "topk_group": 1}, "n_group is 2 in this nemotron_h checkpoint"),
        ({"moe_latent_size": 16}, "moe_latent_size is 16 in this nemotron_h checkpoint"),
        ({"mamba_num_heads": 6}, "mamba_num_heads is 6 in this nemotron_h checkpoint; allowed is .* = 8"),
    ],
)
def test_options_that_ours_lacks(fields, message):
    config = NemotronHConfig(**{**NEMOTRON, **fields}, layers_block_type=["moe", "linear_attention"])
    with pytest.raises(ValueError, match=message):
        hf_archs.from_native(NemotronHForCausalLM(config))


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("samba", "jamba", "a jamba model cannot represent"),
        ("falcon-h1", "bamba", "layer 0 is 'mamba2\\+attention\\+mlp', which a bamba model cannot represent"),
        ("griffin-like", "nemotron_h", "which a nemotron_h model cannot"),
    ],
)
def test_patterns_that_theirs_lacks(name, format, message):
    config = preset(name, hidden_size=64, num_hidden_layers=3, vocab_size=97, residual_in_fp32=False)
    config.rescale_prenorm_residual = False
    with pytest.raises(ValueError, match=message):
        hf_archs.to_native(ArchHybridForCausalLM(config), format)


def test_a_norm_of_its_own_is_not_lost_silently():
    """An instance with another eps than the model's: Jamba's config has one for all."""
    config = preset("jamba", hidden_size=64, vocab_size=97, residual_in_fp32=False, rescale_prenorm_residual=False)
    config.mixers["attention"]["norm_eps"] = 1e-3
    with pytest.raises(ValueError, match=r"mixers.attention.norm_eps is 0.001, which a jamba model .*; allowed: 1e-05"):
        hf_archs.to_native(ArchHybridForCausalLM(config), "jamba")


def test_the_preset_is_what_transformers_has():
    """The published pattern of Jamba, written and read again."""
    ours = ArchHybridForCausalLM(
        preset("jamba", hidden_size=64, vocab_size=97, residual_in_fp32=False, rescale_prenorm_residual=False)
    )
    theirs = hf_archs.to_native(ours, "jamba")
    assert (theirs.config.attn_layer_period, theirs.config.expert_layer_period) == (8, 2)
    assert (theirs.config.attn_layer_offset, theirs.config.expert_layer_offset) == (4, 1)
