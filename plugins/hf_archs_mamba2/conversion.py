"""Mamba-2 checkpoints of transformers and of the package mamba_ssm, by rename tables."""

from __future__ import annotations

from hf_archs.formats import StateSpacesFormat, TransformersFormat

LAYER_RENAMES = {
    "mixer.ssm.A_log": "mixer.A_log",
    "mixer.ssm.D": "mixer.D",
    "mixer.ssm.dt_bias": "mixer.dt_bias",
}

# our fields under their names in transformers
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "expand",
    "head_dim",
    "n_groups",
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_limit",
    "initializer_range",
    "residual_in_fp32",
    "rescale_prenorm_residual",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

MAMBA2 = TransformersFormat(
    name="mamba2",
    config_name="Mamba2Config",
    model_name="Mamba2Model",
    causal_lm_name="Mamba2ForCausalLM",
    renames={"embed_tokens.weight": "embeddings.weight", "norm.weight": "norm_f.weight"},
    layer_renames=LAYER_RENAMES,
    fields={**{name: name for name in _SAME}, "norm_eps": "layer_norm_epsilon"},
    allowed={"hidden_act": ("silu", "swish")},
    # num_heads is expand * hidden_size / head_dim, which Mamba2Config checks; nothing in Mamba-2 has a step rank
    ignored=("num_heads", "time_step_rank", "chunk_size", "intermediate_size"),
    derived={"num_heads": "num_heads"},
)

STATE_SPACES = StateSpacesFormat(
    layer="Mamba2",
    layer_defaults={
        "d_state": 128,
        "d_conv": 4,
        "conv_init": None,
        "expand": 2,
        "headdim": 64,
        "d_ssm": None,  # None: every channel goes through the recurrence
        "ngroups": 1,
        "A_init_range": (1, 16),
        "D_has_hdim": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init_floor": 1e-4,
        "dt_limit": (0.0, float("inf")),
        "bias": False,
        "conv_bias": True,
    },
    renames={"embed_tokens.weight": "embedding.weight", "norm.weight": "norm_f.weight"},
    layer_renames=LAYER_RENAMES,
    fields={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "vocab_size": "vocab_size",
        "residual_in_fp32": "residual_in_fp32",
        "tie_word_embeddings": "tie_embeddings",
        "pad_token_id": "pad_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "state_size": "ssm_cfg.d_state",
        "conv_kernel": "ssm_cfg.d_conv",
        "expand": "ssm_cfg.expand",
        "head_dim": "ssm_cfg.headdim",
        "n_groups": "ssm_cfg.ngroups",
        "time_step_min": "ssm_cfg.dt_min",
        "time_step_max": "ssm_cfg.dt_max",
        "time_step_floor": "ssm_cfg.dt_init_floor",
        "time_step_limit": "ssm_cfg.dt_limit",
        "use_conv_bias": "ssm_cfg.conv_bias",
        "use_bias": "ssm_cfg.bias",
    },
    constants={"norm_eps": 1e-5},
    # how weights were initialised, and which kernels run
    ignored=("ssm_cfg.conv_init", "ssm_cfg.A_init_range", "ssm_cfg.chunk_size", "ssm_cfg.use_mem_eff_path"),
)
