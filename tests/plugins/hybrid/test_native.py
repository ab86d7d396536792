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
from hf_archs.cache.call import NAME
from hf_archs.testing.contract.models import assert_close
from hf_archs.testing.native import SIZES, check_files, check_native, native
from hf_archs.testing.ops import relative_distance
from hf_archs_hybrid import ArchHybridConfig, ArchHybridForCausalLM, preset
from hf_archs_hybrid.conversion import BAMBA, NEMOTRON_H

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
    "bamba, groups": (
        BambaForCausalLM,
        BambaConfig(
            **SIZES, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_state=16, mamba_n_groups=4, rms_norm_eps=1e-2
        ),
    ),
    "nemotron_h": (
        NemotronHForCausalLM,
        NemotronHConfig(**NEMOTRON, layers_block_type=["linear_attention", "moe", "full_attention", "mlp"]),
    ),
    # heads times head size is not expand times width, as in Nano 9B v2 and 3 Nano; and a floor that steps touch
    "nemotron_h, narrow": (
        NemotronHForCausalLM,
        NemotronHConfig(
            **{**NEMOTRON, "mamba_num_heads": 6, "time_step_min": 0.05},
            layers_block_type=["linear_attention", "full_attention", "mlp"],
            use_bias=True,
            mlp_bias=True,
        ),
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


@pytest.mark.parametrize("case", ["jamba", "bamba", "nemotron_h", "nemotron_h, narrow"])
def test_a_cache_continued_by_chunks(case):
    """transformers' own Jamba loses the recurrence's state if several tokens continue a cache."""
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
        ({"mlp_bias": True}, "mlp_bias is True in this nemotron_h checkpoint; allowed beside experts is False"),
        ({"time_step_limit": (0.01, 0.5)}, r"time_step_limit is \(0.01, 0.5\) in this nemotron_h checkpoint"),
    ],
)
def test_options_that_ours_lacks(fields, message):
    config = NemotronHConfig(**{**NEMOTRON, **fields}, layers_block_type=["moe", "linear_attention"])
    with pytest.raises(ValueError, match=message):
        hf_archs.from_native(NemotronHForCausalLM(config))


def nemotron_file(**changes):
    config = {"model_type": "nemotron_h", **NEMOTRON, "hybrid_override_pattern": "M*", "num_hidden_layers": 2}
    return {name: value for name, value in {**config, **changes}.items() if value is not ...}


def test_other_names_in_files_of_nemotron_h():
    """Names in NVIDIA's first files, and a large number for infinity, which JSON lacks."""
    eps = {"layer_norm_epsilon": 1e-3, "norm_eps": 1e-3, "rms_norm_eps": 1e-3}
    changes = {"head_dim": ..., "attention_head_dim": 8, "num_hidden_layers": ..., "time_step_limit": [0.0, 1e308]}
    config = ArchHybridConfig(**NEMOTRON_H.read_config(nemotron_file(**eps, **changes), ArchHybridConfig))
    assert (config.num_hidden_layers, config.norm_eps) == (2, 1e-3)
    assert config.instances()["mixers.attention"][1].head_size == 8
    listed = nemotron_file(hybrid_override_pattern=..., layers_block_type=["mamba", "attention"])
    assert NEMOTRON_H.read_config(listed, ArchHybridConfig)["layer_pattern"] == ["mamba2", "attention"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-3}, "norm_eps is 0.001 in this nemotron_h checkpoint; allowed is 1e-05, as layer_norm_eps"),
        ({"rms_norm_eps": 1e-3, "layer_norm_epsilon": 1e-2}, "rms_norm_eps is 0.001 .*; allowed is 0.01"),
        ({"attention_head_dim": 8}, "attention_head_dim is 8 in .*; allowed is 16, as head_dim is"),
        ({"hybrid_override_pattern": "MX"}, r"hybrid_override_pattern has 'X' in .*; allowed are M, E, \* and -"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3 in .*; allowed is 2, as the length of the pattern is"),
    ],
)
def test_files_of_nemotron_h_that_say_two_things(changes, message):
    with pytest.raises(ValueError, match=message):
        NEMOTRON_H.read_config(nemotron_file(**changes), ArchHybridConfig)


def test_the_rotary_width_of_bamba():
    config = {**CASES["bamba"][1].to_dict(), "attn_rotary_emb": 8}
    assert BAMBA.read_config(config, ArchHybridConfig)["mixers"]["attention"]["partial_rotary_factor"] == 0.5
    with pytest.raises(ValueError, match="attn_rotary_emb is 16 in this bamba checkpoint; allowed is half a head"):
        BAMBA.read_config({**config, "attn_rotary_emb": 16}, ArchHybridConfig)


def test_either_floor_of_steps():
    """transformers' Nemotron-H raises small steps to ``time_step_min``; NVIDIA's code does not."""
    fields = {**NEMOTRON, "layers_block_type": ["linear_attention", "full_attention"]}
    clamped = native(NemotronHForCausalLM, NemotronHConfig(**fields, time_step_min=0.05))
    free = native(NemotronHForCausalLM, NemotronHConfig(**fields, time_step_min=1e-9))
    for model in (clamped, free):
        model.model.layers[0].mixer.dt_bias.data -= 3.0
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    ours = hf_archs.from_native(clamped)
    config = ArchHybridConfig(**NEMOTRON_H.read_config(clamped.config.to_dict(), ArchHybridConfig))
    config.mixers["mamba2"]["time_step_limit"] = (0.0, float("inf"))
    published = ArchHybridForCausalLM(config).eval()
    published.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert_close(ours(ids).logits, clamped(ids).logits, "transformers'")
        assert_close(published(ids).logits, free(ids).logits, "NVIDIA's")
        assert relative_distance(free(ids).logits, clamped(ids).logits) > 1e-3
    with pytest.raises(ValueError, match=r"mixers.mamba2.time_step_limit is \(0.0, inf\), .*; allowed: \(0.05, inf\)"):
        hf_archs.to_native(published, "nemotron_h")


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
    """An instance's eps must be the model's: Jamba's config has one for all."""
    config = preset("jamba", hidden_size=64, vocab_size=97, residual_in_fp32=False, rescale_prenorm_residual=False)
    config.mixers["attention"]["norm_eps"] = 1e-3
    with pytest.raises(ValueError, match=r"mixers.attention.norm_eps is 0.001, which a jamba model .*; allowed: 1e-05"):
        hf_archs.to_native(ArchHybridForCausalLM(config), "jamba")


def test_the_preset_is_what_transformers_has():
    """Jamba's published pattern is written and read again."""
    ours = ArchHybridForCausalLM(
        preset("jamba", hidden_size=64, vocab_size=97, residual_in_fp32=False, rescale_prenorm_residual=False)
    )
    theirs = hf_archs.to_native(ours, "jamba")
    assert (theirs.config.attn_layer_period, theirs.config.expert_layer_period) == (8, 2)
    assert (theirs.config.attn_layer_offset, theirs.config.expert_layer_offset) == (4, 1)
