"""Published Jamba and Nemotron-H at small widths, and every field of transformers' config classes."""

import json
from pathlib import Path

import pytest
import torch

from hf_archs.testing.native import SIZES
from hf_archs.testing.published import check_fields, check_published, reduced
from hf_archs_hybrid import ArchHybridConfig
from hf_archs_hybrid.conversion import BAMBA, JAMBA, NEMOTRON_H

CONFIGS = Path(__file__).parents[2] / "data/configs"

# widths at which a head of the recurrence has whole channels; transformers takes attention_head_dim for no field
WIDTHS = {
    "ai21labs__AI21-Jamba-1.5-Mini": 32,
    "ai21labs__Jamba-v0.1": 32,
    "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 21,
    "nvidia__NVIDIA-Nemotron-Nano-9B-v2": 35,
    "nvidia__Nemotron-H-56B-Base-8K": 32,
    "nvidia__Nemotron-H-8B-Base-8K": 32,
    "nvidia__Nemotron-H-8B-Reasoning-128K": 32,
}


def published(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WIDTHS)
def test_published(name, dtype, tmp_path):
    small = reduced(published(name), WIDTHS[name])
    told = {"head_dim": small["attention_head_dim"]} if "attention_head_dim" in small else {}
    check_published(small, "hybrid", dtype, tmp_path, **told)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nvidia__NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "moe_latent_size is 1024 in this nemotron_h checkpoint"),
        ("nvidia__NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", "moe_latent_size is 1024 in this nemotron_h checkpoint"),
        ("nvidia__NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", "moe_latent_size is 2048 in this nemotron_h checkpoint"),
        ("nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4", "num_nextn_predict_layers is 1 in this nemotron_h"),
    ],
)
def test_published_that_ours_lacks(name, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published(name)))
    with pytest.raises(ValueError, match=message):
        ArchHybridConfig.from_pretrained(tmp_path)


NEMOTRON = {
    **{name: value for name, value in SIZES.items() if name != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 40,
    "head_dim": 16,
}
# small configs of theirs, values that the rules do not find, and the refused fields
CASES = {
    "jamba": (
        JAMBA,
        {**SIZES, "num_hidden_layers": 4, "num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
        {"attn_layer_period": [3]},
        {"hidden_act", "attention_dropout"},
    ),
    "bamba": (
        BAMBA,
        {**SIZES, "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16},
        {
            "attn_layer_indices": [[0, 1]],
            "mamba_d_head": [{"mamba_d_head": 8, "mamba_n_heads": 16}],
            "time_step_limit": [(0.15, 0.6)],
            "rope_parameters": [{"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}],
        },
        {"hidden_act", "attention_dropout", "z_loss_coefficient"},
    ),
    "nemotron_h": (
        NEMOTRON_H,
        NEMOTRON,
        {
            "layers_block_type": [["moe", "linear_attention"]],
            "time_step_min": [0.09],
            "time_step_limit": [(0.15, 0.6)],
            "mtp_layers_block_type": [["moe"]],
        },
        {
            *("attention_bias", "attention_dropout", "hidden_dropout", "sliding_window", "mamba_hidden_act"),
            *("mlp_bias", "time_step_limit", "n_shared_experts", "n_group", "topk_group"),
            *("moe_latent_size", "num_nextn_predict_layers"),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_their_config(case):
    form, fields, others, refused = CASES[case]
    found = check_fields(form, fields, others)
    assert {name for name, what in found.items() if what == "refused"} == refused
