"""Mixtral, OLMoE, Qwen3-MoE and dense decoders of transformers: the same logits and gradients, files, and refusals."""

import pytest
import torch
from safetensors import safe_open
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import hf_archs
from hf_archs.cache.call import NAME
from hf_archs.testing.native import SIZES, check_files, check_native, native
from hf_archs_moe import ArchMoEForCausalLM

CASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama, biases, tied": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True, head_dim=8),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
    "mixtral, three of five experts": (
        MixtralForCausalLM,
        MixtralConfig(**{**SIZES, "num_key_value_heads": 4}, num_local_experts=5, num_experts_per_tok=3, head_dim=8),
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, clip_qkv=1.0)),
    "olmoe, renormalised, tied": (
        OlmoeForCausalLM,
        OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True),
    ),
    "olmoe, biases": (
        OlmoeForCausalLM,
        OlmoeConfig(
            **SIZES,
            num_experts=4,
            num_experts_per_tok=2,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000},
        ),
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **{**SIZES, "num_hidden_layers": 3},
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            mlp_only_layers=[1],
            head_dim=8,
            norm_topk_prob=True,
        ),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype):
    check_native(*CASES[case], "moe", dtype)


@pytest.mark.parametrize("case", CASES)
def test_files(case, tmp_path):
    check_files(*CASES[case], "moe", tmp_path)


def test_names_in_files(tmp_path):
    """Files have one tensor per expert, as other tools expect."""
    hf_archs.from_native(native(*CASES["mixtral"])).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = file.keys()
    names = {name for name in stored if name.startswith("model.layers.0.feed_forward.")}
    parts = {f"experts.{e}.{part}_proj.weight" for e in range(4) for part in ("gate", "up", "down")}
    assert names == {f"model.layers.0.feed_forward.{name}" for name in parts | {"gate.weight"}}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_other_implementations(implementation):
    ours = hf_archs.from_native(native(*CASES["mixtral"]))
    ids = torch.randint(3, 97, (2, 23))
    with torch.no_grad():
        expected = ours(ids).logits
        ours.set_experts_implementation(implementation)
        assert (ours(ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_attention_weights():
    """Attention weights of a padded batch, a continuation and a packed row equal those of transformers' models."""
    theirs = native(*CASES["mixtral"])
    ours = hf_archs.from_native(theirs)
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    ids, mask = torch.randint(3, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    more = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    places = (more.cumsum(1) - 1).clamp(min=0)
    documents = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    found = {}
    for name, model in {"theirs": theirs, "ours": ours}.items():
        with torch.no_grad():
            first = model(ids, attention_mask=mask, position_ids=places[:, :9], output_attentions=True, use_cache=True)
            cached = {NAME: first[NAME], "position_ids": places[:, 9:]}
            then = model(ids[:, :2], attention_mask=more, output_attentions=True, **cached)
            packed = model(ids[:1], position_ids=documents, output_attentions=True, use_cache=False)
        found[name] = (*first.attentions, *then.attentions, *packed.attentions)
    assert len(found["ours"]) == len(found["theirs"]) == 6
    real = mask[:, None, :, None].bool()
    for i, (weights, expected) in enumerate(zip(found["ours"], found["theirs"], strict=True)):
        assert weights.shape == expected.shape
        seen = real if i < 2 else torch.ones(1, dtype=torch.bool)  # theirs has values in the rows of pads
        torch.testing.assert_close(weights.where(seen, 0), expected.where(seen, 0), rtol=0, atol=1e-5)
    ours.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert ours(ids, output_attentions=True).attentions == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 8}, "sliding_window is 8 in this mixtral checkpoint, which ArchMoEConfig cannot represent"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1 in this mixtral checkpoint"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'linear'"),
    ],
)
def test_options_that_ours_lacks(fields, message):
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, **fields))
    with pytest.raises(ValueError, match=message):
        hf_archs.from_native(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "switch"}, "router is 'switch', which a mixtral model cannot represent; allowed: 'top_k'"),
        (
            {"mixer": {"type": "mamba2", "head_dim": 16}},
            "mixer.type is 'mamba2', which a mixtral model cannot represent",
        ),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8, which a mixtral model"),
    ],
)
def test_options_that_theirs_lacks(fields, message):
    same = {"expert_layer_period": 1, "shared_expert_intermediate_size": 0, "residual_in_fp32": False}
    config = hf_archs.get_architecture("moe").tiny_config(**{**same, "rescale_prenorm_residual": False, **fields})
    with pytest.raises(ValueError, match=message):
        hf_archs.to_native(ArchMoEForCausalLM(config), "mixtral")


def test_windows_and_experts_are_no_dense_decoder():
    with pytest.raises(ValueError, match="sliding_window is 4096 in this mistral checkpoint"):
        hf_archs.from_native(MistralForCausalLM(MistralConfig(**SIZES)))
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have experts, which a llama model cannot represent"):
        hf_archs.to_native(hf_archs.from_native(native(*CASES["mixtral"])), "llama")


def test_experts_of_another_size(tmp_path):
    """A checkpoint whose experts do not fit its config is refused in one sentence."""
    native(*CASES["mixtral"]).save_pretrained(tmp_path)
    config = MixtralConfig(**{**SIZES, "intermediate_size": 40}, num_local_experts=4)
    config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"experts.* has shape \(.*48.*\) in .*, and its config asks for \(.*40.*\)"):
        ArchMoEForCausalLM.from_pretrained(tmp_path)
