"""Every option of the three packages' configs, changed alone.

Each changes our model, is refused by its name, or is in the format's list of options without effect.
"""

import pytest

from hf_archs.native.formats import IDLE
from hf_archs_retnet import ArchRetNetConfig
from hf_archs_retnet.conversion import FLA, SYNCDOTH, TORCHSCALE, TORCHSCALE_2023

# Every field with another value than the checkpoints of the tests have.
# fla-org/flash-linear-attention a1a6bb1 (18 August 2026), fla/models/retnet/configuration_retnet.py: RetNetConfig
FLA_FIELDS = {
    "attn_mode": "parallel",
    "hidden_size": 48,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "hidden_ratio": 4,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 1,
    "feature_map": "relu",
    "hidden_act": "powlu",
    "use_short_conv": True,
    "conv_size": 3,
    "use_output_gate": False,
    "max_position_embeddings": 512,
    "elementwise_affine": False,
    "norm_eps": 1e-3,
    "attn": {"layers": [1], "num_heads": 3},
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "tie_word_embeddings": True,
    "initializer_range": 0.006,
    "fuse_norm": False,
    "fuse_swiglu": False,
    "fuse_cross_entropy": False,
    "fuse_linear_cross_entropy": True,
    "use_l2warp": True,
    "vocab_size": 50,
    "attnres_block_size": 1,
}
# the same at 6d0aa56^ (28 April 2024) and at 36743f3 (4 May 2024)
FLA_OLDER_FIELDS = {"rms_norm_eps": 1e-3, "share_conv_kernel": False}

# microsoft/torchscale 4d1e0e8 (11 April 2024), torchscale/architecture/config.py: RetNetConfig
TORCHSCALE_FIELDS = {
    "decoder_embed_dim": 48,
    "decoder_value_embed_dim": 36,
    "decoder_retention_heads": 6,
    "decoder_ffn_embed_dim": 28,
    "decoder_layers": 3,
    "decoder_normalize_before": False,
    "activation_fn": "relu",
    "dropout": 0.5,
    "drop_path_rate": 0.5,
    "activation_dropout": 0.5,
    "no_scale_embedding": False,
    "layernorm_embedding": True,
    "moe_freq": 2,
    "moe_top1_expert": True,
    "moe_expert_count": 8,
    "moe_gating_use_fp32": False,
    "moe_eval_capacity_token_fraction": 0.5,
    "moe_second_expert_policy": "sampling",
    "moe_normalize_gate_prob_before_dropping": True,
    "use_xmoe": True,
    "rel_pos_buckets": 32,
    "max_rel_pos": 128,
    "deepnorm": True,
    "subln": False,
    "multiway": True,
    "share_decoder_input_output_embed": True,
    "max_target_positions": 2048,
    "no_output_layer": True,
    "layernorm_eps": 1e-3,
    "chunkwise_recurrent": False,
    "recurrent_chunk_size": 64,
    "vocab_size": 50,
    "checkpoint_activations": True,
    "fsdp": True,
    "ddp_rank": 1,
    "xpos_rel_pos": True,
    "xpos_scale_base": 1024,
}
# syncdoth/RetNet 2634bbf (3 January 2024), torchscale/config.py, adds these, and `use_lm_decay` is read
TORCHSCALE_OTHER_FIELDS = {"pad_token_id": 3, "use_lm_decay": True, "use_glu": False, "use_ffn_rms_norm": True}
TORCHSCALE_OTHER_FIELDS |= {"z_loss_coeff": 1e-4}

# microsoft/torchscale d1fefe9 (27 September 2023), the same file; head_norm_eps is ours
TORCHSCALE_2023_FIELDS = {
    **{name: value for name, value in TORCHSCALE_FIELDS.items() if name != "decoder_value_embed_dim"},
    "head_norm_eps": 1e-3,
}

# syncdoth/RetNet 2634bbf (3 January 2024), retnet/configuration_retnet.py: RetNetConfig
SYNCDOTH_FIELDS = {
    "vocab_size": 50,
    "initializer_range": 0.01,
    "is_decoder": False,
    "pad_token_id": 3,
    "eos_token_id": 5,
    "output_retentions": True,
    "use_cache": False,
    "forward_impl": "recurrent",
    "activation_fn": "relu",
    "dropout": 0.5,
    "activation_dropout": 0.5,
    "drop_path_rate": 0.5,
    "decoder_embed_dim": 48,
    "decoder_value_embed_dim": 36,
    "decoder_ffn_embed_dim": 28,
    "decoder_layers": 3,
    "decoder_retention_heads": 6,
    "decoder_normalize_before": False,
    "layernorm_embedding": True,
    "no_scale_embedding": False,
    "recurrent_chunk_size": 64,
    "use_glu": False,
    "z_loss_coeff": 1e-4,
    "use_lm_decay": True,
    "deepnorm": True,
    "subln": False,
    "use_ffn_rms_norm": True,
    "layernorm_eps": 1e-3,
    "tie_word_embeddings": True,
}
# of transformers' own configs, and in its files: configs/retnet-300m/config.json
SYNCDOTH_OTHER_FIELDS = {"bos_token_id": 4, "unk_token_id": 3}

FLA_BASE = {"model_type": "retnet", "hidden_size": 24, "num_heads": 3, "intermediate_size": 20, "vocab_size": 40}
DECODER_BASE = {
    "decoder_embed_dim": 24,
    "decoder_value_embed_dim": 48,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 20,
    "vocab_size": 40,
}
PACKAGES = {
    "fla": (FLA, FLA_BASE, FLA_FIELDS | FLA_OLDER_FIELDS),
    "torchscale": (TORCHSCALE, DECODER_BASE, TORCHSCALE_FIELDS | TORCHSCALE_OTHER_FIELDS),
    "torchscale-2023": (
        TORCHSCALE_2023,
        {name: value for name, value in DECODER_BASE.items() if "value" not in name} | {"head_norm_eps": 1e-6},
        TORCHSCALE_2023_FIELDS | {"pad_token_id": 3, "use_lm_decay": True, "use_glu": True, "z_loss_coeff": 1e-4},
    ),
    "syncdoth": (SYNCDOTH, DECODER_BASE | {"model_type": "retnet"}, SYNCDOTH_FIELDS | SYNCDOTH_OTHER_FIELDS),
}


@pytest.mark.parametrize(
    ("package", "field"), [(package, field) for package, (_, _, fields) in PACKAGES.items() for field in fields]
)
def test_a_field_changes_the_model_or_is_refused_by_name(package, field):
    form, raw, fields = PACKAGES[package]
    value = fields[field]
    assert raw.get(field, form.defaults.get(field)) != value
    before = ArchRetNetConfig(**form.read_config(raw, ArchRetNetConfig)).to_dict()
    refusal, after = "", before
    try:
        after = ArchRetNetConfig(**form.read_config({**raw, field: value}, ArchRetNetConfig)).to_dict()
    except ValueError as error:
        refusal = str(error)
    if field in {*form.ignored, *IDLE} - {*form.fields.values()}:
        assert not refusal
        assert after == before
    elif refusal:
        assert refusal.startswith(f"{field} is {value!r} in this {form.name} checkpoint, which ArchRetNetConfig cannot")
    else:
        assert after != before


@pytest.mark.parametrize("package", PACKAGES)
def test_a_format_knows_no_other_field(package):
    form, _, fields = PACKAGES[package]
    own = {"expand_v", "multiplier"} if package != "fla" else set()  # of no file: what two fields say in other units
    known = {*form.defaults, *form.fields.values(), *form.ignored, *form.allowed} - {"model_type", "architectures"}
    assert known - own == fields.keys() - {"rms_norm_eps", "is_decoder"}
    assert form.detect(PACKAGES[package][1])
    assert [other for other, (_, raw, _) in PACKAGES.items() if form.detect(raw)] == [package]
