"""RetNet checkpoints of flash-linear-attention and of the authors' torchscale, by rename tables.

Neither package is imported. What the two call the same model differs in the rotation, the norms and the feed-forward;
see `hf_archs_retnet.configuration.RetNetMixerConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_archs.formats import StateDictFormat

# neither has these, and they change nothing but the rounding and the initial weights
_ASSUMED = {"residual_in_fp32": False, "rescale_prenorm_residual": False}


@dataclass(frozen=True, kw_only=True)
class FlaFormat(StateDictFormat):
    """``model_type`` ``retnet``, which transformers itself does not have."""

    def __str__(self) -> str:
        return "flash-linear-attention's retnet"

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        given, defaults = super().expand(raw)
        if given["num_kv_heads"] == given["num_heads"]:
            given["num_kv_heads"] = None
        given["hidden_ratio"] = 4 if given["hidden_ratio"] is None else given["hidden_ratio"]
        for name in ("expand_k", "expand_v", "hidden_ratio"):  # whole numbers in many files
            given[name] = float(given[name])
        given["elementwise_affine"] = bool(given["elementwise_affine"])  # None is none
        return given, defaults


@dataclass(frozen=True, kw_only=True)
class TorchscaleFormat(StateDictFormat):
    """The options of torchscale's ``RetNetConfig`` as a ``config.json``, and the state dict of a ``RetNetDecoder``.

    torchscale divides each row of the scores by two factors of its own before the norm of each head, which takes such
    factors out again: the results differ by that norm's eps only, as those of its own three forms do.
    """

    def detect(self, raw: Mapping[str, Any]) -> bool:
        return "model_type" not in raw and "decoder_retention_heads" in raw

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        given, defaults = super().expand(raw)
        width = given["decoder_embed_dim"]
        # under names of our own: what they say in other units
        given["expand_v"] = given["decoder_value_embed_dim"] / width
        given["multiplier"] = 1.0 if given["no_scale_embedding"] else math.sqrt(width)
        return given, defaults

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        written = super().write_config(config)
        multiplier, width = written.pop("multiplier"), written["decoder_embed_dim"]
        if multiplier not in (1.0, math.sqrt(width)):
            raise ValueError(
                f"{type(config).__name__}: embedding_multiplier is {multiplier!r}, which a {self.name} model cannot "
                f"represent; allowed: 1.0 and the square root of hidden_size"
            )
        written["no_scale_embedding"] = multiplier == 1.0
        written["decoder_value_embed_dim"] = round(written.pop("expand_v") * width)
        return written

    def theirs(self, name: str) -> str:
        return super().theirs(name).removeprefix(f"{self.prefix}.")

    def ours(self, name: str) -> str:
        name = name.removeprefix(f"{self.prefix}.")  # which checkpoints of whole fairseq models have
        if name == self.renames["lm_head.weight"]:
            return "lm_head.weight"
        return super().ours(f"{self.prefix}.{name}")

    def key_mapping(self) -> dict[str, str]:
        prefix = rf"^(?:{self.prefix}\.)?"
        head = rf"{prefix}output_projection\.weight$"
        return {head: "lm_head.weight", rf"{prefix}(?=embed_tokens\.|layers\.|layer_norm\.)": "model."} | {
            theirs: ours for theirs, ours in super().key_mapping().items() if "output_projection" not in theirs
        }

    def is_buffer(self, name: str) -> bool:
        return "retnet_rel_pos." in name

    def buffers(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Angles and decays, which their ``load_state_dict`` wants to find, as they compute them."""
        pairs = config.key_size // config.num_heads // 2  # type: ignore[attr-defined]
        angle = (1.0 / (10000 ** torch.linspace(0, 1, pairs))).repeat_interleave(2)
        heads = torch.arange(config.num_heads, dtype=torch.float)  # type: ignore[attr-defined]
        return {"retnet_rel_pos.angle": angle, "retnet_rel_pos.decay": torch.log(1 - 2 ** (-5 - heads))}


FLA = FlaFormat(
    name="retnet",
    prefix="model",
    renames={"embed_tokens.weight": "embeddings.weight"},
    layer_renames={
        "norm.weight": "attn_norm.weight",
        **{f"mixer.{x}_proj.weight": f"attn.{x}_proj.weight" for x in ("q", "k", "v", "g")},
        "mixer.out_proj.weight": "attn.o_proj.weight",
        "mixer.norm.weight": "attn.g_norm_swish_gate.weight",
        "feed_forward_norm.weight": "mlp_norm.weight",
        **{f"feed_forward.{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    },
    layer_aliases={"attn.g_norm.weight": "mixer.norm.weight"},  # where norm and gate are not fused
    defaults={
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "attn_mode": "chunk",
        "hidden_size": 2048,
        "expand_k": 1.0,
        "expand_v": 2.0,
        "hidden_ratio": 2,
        "intermediate_size": None,
        "num_hidden_layers": 24,
        "num_heads": 8,
        "num_kv_heads": None,
        "feature_map": None,
        "hidden_act": "swish",
        "use_short_conv": False,
        "conv_size": 4,
        "use_output_gate": True,
        "max_position_embeddings": 2048,
        "elementwise_affine": True,
        "norm_eps": 1e-6,
        "attn": None,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "fuse_norm": True,
        "vocab_size": 32000,
    },
    fields={
        name: name
        for name in (
            "hidden_size",
            "expand_k",
            "expand_v",
            "hidden_ratio",
            "intermediate_size",
            "num_hidden_layers",
            "num_heads",
            "elementwise_affine",
            "norm_eps",
            "use_cache",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "tie_word_embeddings",
            "initializer_range",
            "vocab_size",
        )
    },
    # hidden_act is the activation of the gate as well
    constants={
        "rotary": "half",
        "gate_fn": "swish",
        "hidden_act": "swish",
        "gated": True,
        "bias": False,
        "norm_type": "rms_norm",
        "embedding_multiplier": 1.0,
        "bidirectional": False,
    },
    # which kernels run; and what only attention layers have
    ignored=(
        "attn_mode",
        "fuse_norm",
        "fuse_swiglu",
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "use_l2warp",
        "max_position_embeddings",
        "conv_size",
    ),
    assumed=_ASSUMED,
)

TORCHSCALE = TorchscaleFormat(
    name="torchscale",
    prefix="decoder",
    renames={"norm.weight": "layer_norm.weight", "lm_head.weight": "output_projection.weight"},
    layer_renames={
        "norm.weight": "retention_layer_norm.weight",
        **{f"mixer.{x}_proj.weight": f"retention.{x}_proj.weight" for x in ("q", "k", "v", "g", "out")},
        "feed_forward_norm.weight": "final_layer_norm.weight",
        "feed_forward.gate_proj.weight": "ffn.fc1.weight",
        "feed_forward.up_proj.weight": "ffn.gate.weight",
        "feed_forward.down_proj.weight": "ffn.fc2.weight",
    },
    defaults={
        "decoder_embed_dim": 768,
        "decoder_value_embed_dim": 1280,
        "decoder_retention_heads": 3,
        "decoder_ffn_embed_dim": 1280,
        "decoder_layers": 12,
        "decoder_normalize_before": True,
        "activation_fn": "gelu",
        "no_scale_embedding": True,
        "layernorm_embedding": False,
        "moe_freq": 0,
        "deepnorm": False,
        "use_ffn_rms_norm": False,
        "use_glu": True,
        "multiway": False,
        "share_decoder_input_output_embed": False,
        "layernorm_eps": 1e-6,
        "xpos_rel_pos": False,
        "vocab_size": -1,
        "pad_token_id": 0,
    },
    fields={
        "hidden_size": "decoder_embed_dim",
        "num_heads": "decoder_retention_heads",
        "intermediate_size": "decoder_ffn_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "hidden_act": "activation_fn",
        "tie_word_embeddings": "share_decoder_input_output_embed",
        "norm_eps": "layernorm_eps",
        "vocab_size": "vocab_size",
        "pad_token_id": "pad_token_id",
        "expand_v": "expand_v",
        "embedding_multiplier": "multiplier",
    },
    constants={
        "rotary": "interleaved",
        "expand_k": 1.0,
        "gate_fn": "swish",
        "elementwise_affine": False,
        "gated": True,
        "bias": False,
        "norm_type": "rms_norm",
        "bidirectional": False,
    },
    ignored=(
        "decoder_value_embed_dim",
        "no_scale_embedding",
        "dropout",
        "activation_dropout",
        "drop_path_rate",
        "subln",
        "no_output_layer",
        "chunkwise_recurrent",
        "recurrent_chunk_size",
    ),
    unused=("hidden_ratio", "initializer_range", "use_cache"),
    assumed={**_ASSUMED, "bos_token_id": None, "eos_token_id": None},
)
