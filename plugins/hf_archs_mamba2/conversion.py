"""Rename tables for Mamba-2 checkpoints of transformers, flash-linear-attention and mamba_ssm.

transformers and flash-linear-attention both use ``model_type`` ``mamba2``; the latter's additional fields tell them
apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_archs.native.fla import KERNELS, FlaFormat, FormatBesideFla
from hf_archs.native.state_spaces import StateSpacesFormat


@dataclass(frozen=True, kw_only=True)
class Mamba2FlaFormat(FlaFormat):
    """``fla.models.Mamba2Config`` and the state dict of ``Mamba2ForCausalLM``.

    The gated norm has one mean square per group, after the gate, as in training since September 2024 and in evaluation
    since April 2026. Evaluation before that used one mean square for all groups.
    """

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `FlaFormat.expand`. Raises a `ValueError` if the heads do not make up the expanded width."""
        given, defaults = super().expand(raw)
        sizes = [given[name] for name in ("num_heads", "head_dim", "expand", "hidden_size")]
        if all(type(size) is int for size in sizes) and sizes[0] * sizes[1] != sizes[2] * sizes[3]:
            raise ValueError(
                f"num_heads is {sizes[0]} in this {self.name} checkpoint; allowed is expand * hidden_size / head_dim = "
                f"{sizes[2] * sizes[3]} / {sizes[1]}"
            )
        return given, defaults


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

_FIELDS = {**{name: name for name in _SAME}, "norm_eps": "layer_norm_epsilon"}
_NAMES: dict[str, Any] = {
    "renames": {"embed_tokens.weight": "embeddings.weight", "norm.weight": "norm_f.weight"},
    "layer_renames": LAYER_RENAMES,
}

_EARLIER = {
    "layer_norm_epsilon": "norm_eps",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "time_step_limit": "dt_limit",
    "rms_norm": "rmsnorm",
}
# initialisation
_FLA_INITIAL = ("conv_init", "A_init_range")

FLA = Mamba2FlaFormat(
    name="fla_mamba2",
    **_NAMES,
    alone=(*KERNELS, *_FLA_INITIAL, "D_has_hdim"),
    earlier=_EARLIER,
    derived={"num_heads": "num_heads"},
    defaults={
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "head_dim": 64,
        "num_heads": None,  # derived from the others
        "vocab_size": 32000,
        "hidden_size": 2048,
        "state_size": 128,
        "num_hidden_layers": 48,
        "norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "expand": 2,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "D_has_hdim": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "residual_in_fp32": True,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init_floor": 1e-4,
        "dt_limit": (0.0, float("inf")),
        "rescale_prenorm_residual": True,
        "use_cache": True,
        "rmsnorm": True,
        "norm_before_gate": False,
        "tie_word_embeddings": False,
        "fuse_norm": True,
    },
    fields={ours: _EARLIER.get(theirs, theirs) for ours, theirs in _FIELDS.items()},
    allowed={"hidden_act": ("silu", "swish")},
    # time_step_rank: in its config before April 2026, never read
    ignored=("num_heads", "chunk_size", "time_step_rank", *KERNELS, *_FLA_INITIAL),
)

MAMBA2 = FormatBesideFla(
    name="mamba2",
    fla=FLA,
    config_name="Mamba2Config",
    model_name="Mamba2Model",
    causal_lm_name="Mamba2ForCausalLM",
    **_NAMES,
    fields=_FIELDS,
    allowed={"hidden_act": ("silu", "swish"), "rms_norm": (True,)},
    ignored=(
        "num_heads",  # equals expand * hidden_size / head_dim, as Mamba2Config checks
        "intermediate_size",  # never read
        # length of its scan's chunks
        "chunk_size",
        # fields of Mamba's projection to the steps, which Mamba-2 does not have
        *("time_step_rank", "time_step_scale", "time_step_init_scheme"),
        # true in Mamba-Codestral's file, though its norm too is after the gate
        "norm_before_gate",
    ),
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
        "d_ssm": None,  # all channels go through the recurrence
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
        "process_group": None,
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
    # initialisation, choice of kernels, parallelism
    ignored=tuple(
        f"ssm_cfg.{name}"
        for name in ("conv_init", "A_init_range", "chunk_size", "use_mem_eff_path", "sequence_parallel")
    ),
)
