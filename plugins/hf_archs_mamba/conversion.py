"""Rename tables for Mamba checkpoints of transformers, flash-linear-attention and mamba_ssm.

transformers and flash-linear-attention both use ``model_type`` ``mamba``; the latter's additional fields tell them
apart.
"""

from typing import Any

from hf_archs.native.fla import KERNELS, FlaFormat, FormatBesideFla
from hf_archs.native.formats import TransformersFormat
from hf_archs.native.state_spaces import StateSpacesFormat

LAYER_RENAMES = {
    "mixer.ssm.A_log": "mixer.A_log",
    "mixer.ssm.D": "mixer.D",
    "mixer.ssm.dt_bias": "mixer.dt_proj.bias",
}

# our fields under their names in transformers
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "expand",
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "time_step_rank",
    "time_step_scale",
    "time_step_init_scheme",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "initializer_range",
    "residual_in_fp32",
    "rescale_prenorm_residual",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_FIELDS = {
    **{name: name for name in _SAME},
    "norm_eps": "layer_norm_epsilon",
    "inner_size": "intermediate_size",  # it overrides expand, which FalconMamba 7B gives as 16 instead of 2
}

_NAMES: dict[str, Any] = {
    "renames": {"embed_tokens.weight": "embeddings.weight", "norm.weight": "norm_f.weight"},
    "layer_renames": LAYER_RENAMES,
}
_TRANSFORMERS: dict[str, Any] = {
    **_NAMES,
    "allowed": {"hidden_act": ("silu", "swish"), "rms_norm": (True,)},
    "ignored": (
        # transformers' choice of scan
        "use_mambapy",
        "use_associative_scan",
        # left over from mamba_ssm's layout, and repeated by the fields above
        *("d_model", "d_inner", "n_layer", "ssm_cfg", "pad_vocab_size_multiple", "fused_add_norm"),
    ),
    "derived": {"time_step_rank": "dt_rank", "intermediate_size": "channels"},
}

_EARLIER = {
    "layer_norm_epsilon": "norm_eps",
    "time_step_rank": "dt_rank",
    "time_step_scale": "dt_scale",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_init_scheme": "dt_init_scheme",
    "time_step_floor": "dt_init_floor",
}

# flash-linear-attention's results have not changed from March 2024 to August 2026
FLA = FlaFormat(
    name="fla_mamba",
    **_NAMES,
    alone=KERNELS,
    earlier=_EARLIER,
    derived={"dt_rank": "dt_rank", "intermediate_size": "channels"},
    defaults={
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 2048,
        "state_size": 16,
        "num_hidden_layers": 48,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "expand": 2,
        "intermediate_size": None,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "residual_in_fp32": False,
        "dt_rank": "auto",
        "dt_scale": 1.0,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init_scheme": "random",
        "dt_init_floor": 1e-4,
        "rescale_prenorm_residual": False,
        "use_cache": True,
        "tie_word_embeddings": False,
        "fuse_norm": True,
    },
    fields={ours: _EARLIER.get(theirs, theirs) for ours, theirs in _FIELDS.items()},
    constants={"bcdt_norm": "none"},
    allowed={"hidden_act": ("silu", "swish")},
    ignored=KERNELS,
    unused=("bcdt_norm_eps",),
)

MAMBA = FormatBesideFla(
    name="mamba",
    fla=FLA,
    config_name="MambaConfig",
    model_name="MambaModel",
    causal_lm_name="MambaForCausalLM",
    fields=_FIELDS,
    constants={"bcdt_norm": "none"},
    unused=("bcdt_norm_eps",),
    **_TRANSFORMERS,
)

FALCON_MAMBA = TransformersFormat(
    name="falcon_mamba",
    config_name="FalconMambaConfig",
    model_name="FalconMambaModel",
    causal_lm_name="FalconMambaForCausalLM",
    fields={**_FIELDS, "bcdt_norm_eps": "mixer_rms_eps"},
    constants={"bcdt_norm": "plain"},
    **_TRANSFORMERS,
)

STATE_SPACES = StateSpacesFormat(
    layer="Mamba1",
    layer_defaults={
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "dt_rank": "auto",
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init": "random",
        "dt_scale": 1.0,
        "dt_init_floor": 1e-4,
        "conv_bias": True,
        "bias": False,
    },
    renames={**_NAMES["renames"], "embed_tokens.weight": "embedding.weight"},
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
        "time_step_rank": "ssm_cfg.dt_rank",
        "time_step_min": "ssm_cfg.dt_min",
        "time_step_max": "ssm_cfg.dt_max",
        "time_step_init_scheme": "ssm_cfg.dt_init",
        "time_step_scale": "ssm_cfg.dt_scale",
        "time_step_floor": "ssm_cfg.dt_init_floor",
        "use_conv_bias": "ssm_cfg.conv_bias",
        "use_bias": "ssm_cfg.bias",
    },
    constants={"norm_eps": 1e-5, "bcdt_norm": "none"},
    ignored=("ssm_cfg.use_fast_path",),
)
