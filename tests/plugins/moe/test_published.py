"""Published mixtures of experts and dense decoders at small widths, and every field of transformers' config classes."""

import json
from pathlib import Path

import pytest
import torch

from hf_archs.testing.native import SIZES
from hf_archs.testing.published import check_fields, check_published, reduced
from hf_archs_moe import ArchMoEConfig
from hf_archs_moe.conversion import LLAMA, MISTRAL, MIXTRAL, OLMOE, QWEN3, QWEN3_MOE

CONFIGS = Path(__file__).parents[2] / "data/configs"


def published(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "Qwen__Qwen3-30B-A3B",
        "allenai__OLMoE-1B-7B-0924",
        "mistralai__Mixtral-8x7B-v0.1",
        "mistralai__Mixtral-8x22B-v0.1",
        "meta-llama__Llama-3.1-8B-Instruct",  # without its rope_scaling
    ],
)
def test_published(name, dtype, tmp_path):
    width = 48 if "8x22B" in name else 32  # 8x22B has 48 heads for 8 groups
    check_published(reduced(published(name), width), "moe", dtype, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen__Qwen3-30B-A3B-FP8", "quantization_config is 'fp8' in this qwen3_moe checkpoint"),
        ("mistralai__Mistral-7B-v0.1", "sliding_window is 4096 in this mistral checkpoint"),
        ("meta-llama__Llama-3.2-1B-Instruct", "rope_parameters.rope_type is 'llama3' in this llama checkpoint"),
        ("meta-llama__Llama-3.2-3B-Instruct", "rope_parameters.rope_type is 'llama3' in this llama checkpoint"),
        ("meta-llama__Meta-Llama-3.1-405B", "rope_parameters.rope_type is 'llama3' in this llama checkpoint"),
        ("meta-llama__Meta-Llama-3.1-70B", "rope_parameters.rope_type is 'llama3' in this llama checkpoint"),
        ("meta-llama__Meta-Llama-3.1-8B", "rope_parameters.rope_type is 'llama3' in this llama checkpoint"),
    ],
)
def test_published_that_ours_lacks(name, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published(name)))
    with pytest.raises(ValueError, match=message):
        ArchMoEConfig.from_pretrained(tmp_path)


EXPERTS = {**SIZES, "num_experts_per_tok": 2}
ROPE = {"rope_parameters": [{"rope_type": "default", "rope_theta": 100.0}]}
WINDOW = ["sliding_attention", "full_attention"]
# small configs of theirs, values that the rules do not find, and the refused fields
CASES = {
    "mixtral": (
        MIXTRAL,
        {**EXPERTS, "num_local_experts": 4},
        {**ROPE, "head_dim": [8]},
        {"attention_dropout", "sliding_window"},
    ),
    "olmoe": (OLMOE, {**EXPERTS, "num_experts": 4}, ROPE, {"attention_dropout"}),
    "qwen3_moe": (
        QWEN3_MOE,
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
        {**ROPE, "mlp_only_layers": [[1]]},
        {"attention_dropout", "use_sliding_window", "decoder_sparse_step"},
    ),
    "llama": (LLAMA, SIZES, ROPE, {"attention_dropout", "mlp_bias"}),
    "mistral": (MISTRAL, {**SIZES, "sliding_window": None}, ROPE, {"attention_dropout", "sliding_window"}),
    "qwen3": (
        QWEN3,
        {**SIZES, "head_dim": 16},
        {**ROPE, "layer_types": [{"layer_types": WINDOW, "use_sliding_window": True, "sliding_window": 4}]},
        {"attention_dropout", "use_sliding_window", "layer_types"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_their_config(case):
    form, fields, others, refused = CASES[case]
    found = check_fields(form, fields, others)
    assert {name for name, what in found.items() if what == "refused"} == refused
