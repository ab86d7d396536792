"""RetNet checkpoints of the authors' torchscale and of syncdoth's package, which has the same options.

Neither package is imported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_archs.native.formats import StateDictFormat

# constants of flash-linear-attention and of later versions of the other packages
RMS_NORMS = {"projection_bias": False, "head_norm": "rms_norm", "head_norm_eps": None, "inner_norm": False}
# fields that no RetNet package has; they affect rounding and initial weights only
ASSUMED = {"residual_in_fp32": False, "rescale_prenorm_residual": False}


def is_decoder(raw: Mapping[str, Any]) -> bool:
    """True for a ``config.json`` with options of torchscale."""
    return any(name.startswith("decoder_") for name in raw)


@dataclass(frozen=True, kw_only=True)
class DecoderFormat(StateDictFormat):
    """The options of torchscale's ``RetNetConfig`` as a ``config.json``.

    A model computes as torchscale's recurrent form of retention, which has one factor per row of the scores (see
    ``normalize_decay``). Its parallel and chunkwise forms also divide each row by its absolute sum if that is above 1,
    which only changes the weight of the eps in the following norm.
    """

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `StateDictFormat.expand`, with the value width and the embedding's scale in our units."""
        given, defaults = super().expand(raw)
        width = given["decoder_embed_dim"]
        # our names, for the same in our units
        given["expand_v"] = given.pop("decoder_value_embed_dim") / width
        given["multiplier"] = 1.0 if given.pop("no_scale_embedding") else math.sqrt(width)
        return given, defaults

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As `StateDictFormat.write_config`. Raises a `ValueError` for an embedding scale that is not an option."""
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

    def is_buffer(self, name: str) -> bool:
        """True for the angles and decays of relative positions."""
        return "retnet_rel_pos." in name

    def buffers(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """Angles and decays as torchscale computes them; its ``load_state_dict`` requires them."""
        pairs = config.key_size // config.num_heads // 2  # type: ignore[attr-defined]
        angle = (1.0 / (10000 ** torch.linspace(0, 1, pairs))).repeat_interleave(2)
        heads = torch.arange(config.num_heads, dtype=torch.float)  # type: ignore[attr-defined]
        found = {"retnet_rel_pos.angle": angle, "retnet_rel_pos.decay": torch.log(1 - 2 ** (-5 - heads))}
        return {self.theirs(f"model.{name}"): tensor for name, tensor in found.items()}


@dataclass(frozen=True, kw_only=True)
class SyncdothFormat(DecoderFormat):
    """The package github.com/syncdoth/RetNet: ``model_type`` ``retnet`` with torchscale's options."""

    def __str__(self) -> str:
        return "syncdoth's retnet"

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """True for ``model_type`` ``retnet`` with torchscale's options."""
        return raw.get("model_type") == "retnet" and is_decoder(raw)

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `DecoderFormat.expand`. Raises a `ValueError` for a file from before 2 October 2023."""
        if "decoder_value_embed_dim" not in raw:
            raise ValueError(
                f"decoder_value_embed_dim is missing in this {self.name} checkpoint, as in those from before 2 October "
                "2023, whose projections have biases; allowed is a checkpoint of a later version, with that field"
            )
        return super().expand(raw)


@dataclass(frozen=True, kw_only=True)
class TorchscaleFormat(DecoderFormat):
    """The options of torchscale's ``RetNetConfig``, and the state dict of a ``RetNetDecoder``."""

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """True for options of retention with a value width, without a ``model_type``."""
        return "model_type" not in raw and "decoder_retention_heads" in raw and "decoder_value_embed_dim" in raw

    def theirs(self, name: str) -> str:
        """As `NativeFormat.theirs`, without the decoder's prefix, which its state dict does not have."""
        return super().theirs(name).removeprefix(f"{self.prefix}.")

    def ours(self, name: str) -> str:
        """As `NativeFormat.ours`, for a name with or without the decoder's prefix."""
        name = name.removeprefix(f"{self.prefix}.")  # of checkpoints of whole fairseq models
        if name == self.renames["lm_head.weight"]:
            return "lm_head.weight"
        return super().ours(f"{self.prefix}.{name}")

    def key_mapping(self) -> dict[str, str]:
        """As `NativeFormat.key_mapping`, with an optional decoder's prefix."""
        prefix = rf"^(?:{self.prefix}\.)?"
        head = rf"{prefix}output_projection\.weight$"
        return {
            head: "lm_head.weight",
            rf"{prefix}(?=embed_tokens\.|layernorm_embedding\.|layers\.|layer_norm\.)": "model.",
        } | {theirs: ours for theirs, ours in super().key_mapping().items() if "output_projection" not in theirs}


@dataclass(frozen=True, kw_only=True)
class Torchscale2023Format(TorchscaleFormat):
    """torchscale before 29 September 2023.

    It has no ``decoder_value_embed_dim``, values twice as wide as the model, biases, LayerNorms, and an ungated
    feed-forward with a LayerNorm inside.

    The eps of each head's norm was ``layernorm_eps`` at first, 1e-6 from 2 August (commit 2c29de0) to 27 September
    (commit d1fefe9), then ``layernorm_eps`` again. Files do not record it, so ``config.json`` must hold it under our
    name, ``head_norm_eps``, unless ``layernorm_eps`` is 1e-6 too.
    """

    def __str__(self) -> str:
        return "torchscale before 29 September 2023"

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """True for options of retention without a value width and without a ``model_type``."""
        return "model_type" not in raw and "decoder_retention_heads" in raw and not super().detect(raw)

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `DecoderFormat.expand`, with values twice as wide. Raises a `ValueError` if the norm's eps is unknown."""
        width = raw.get("decoder_embed_dim", self.defaults["decoder_embed_dim"])
        given, defaults = super().expand({**raw, "decoder_value_embed_dim": 2 * width})
        if given["head_norm_eps"] is None and given["layernorm_eps"] != 1e-6:
            raise ValueError(
                "head_norm_eps is missing in this torchscale checkpoint, which has no decoder_value_embed_dim and is "
                "thus from before 29 September 2023; allowed is a config.json with it, 1e-6 for versions from 2 August "
                f"to 27 September, and layernorm_eps, {given['layernorm_eps']!r}, for those before and after"
            )
        return given, defaults

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As `DecoderFormat.write_config`. Raises a `ValueError` for values that are not twice as wide."""
        written = super().write_config(config)
        if written.pop("decoder_value_embed_dim") != 2 * written["decoder_embed_dim"]:
            raise ValueError(
                f"{type(config).__name__}: expand_v is {config.expand_v!r}, which a {self.name} model cannot "  # type: ignore[attr-defined]
                "represent; allowed: 2.0"
            )
        if written["head_norm_eps"] is None:
            written["head_norm_eps"] = written["layernorm_eps"]
        return written


_DECODER: dict[str, Any] = {
    "layer_renames": {
        "norm.weight": "retention_layer_norm.weight",
        **{f"mixer.{x}_proj.weight": f"retention.{x}_proj.weight" for x in ("q", "k", "v", "g", "out")},
        "feed_forward_norm.weight": "final_layer_norm.weight",
        "feed_forward.gate_proj.weight": "ffn.fc1.weight",
        "feed_forward.up_proj.weight": "ffn.gate.weight",
        "feed_forward.down_proj.weight": "ffn.fc2.weight",
    },
    "constants": {
        "rotary": "interleaved",
        "expand_k": 1.0,
        "gate_fn": "swish",
        "elementwise_affine": False,
        "normalize_decay": True,
        **RMS_NORMS,
        "gated": True,
        "bias": False,
        "norm_type": "rms_norm",
        "bidirectional": False,
    },
}
_DECODER_RENAMES = {"norm.weight": "layer_norm.weight", "embed_norm.weight": "layernorm_embedding.weight"}
_DECODER_DEFAULTS = {
    "decoder_embed_dim": 768,
    "decoder_value_embed_dim": 1280,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 1280,
    "decoder_layers": 12,
    "decoder_normalize_before": True,
    "activation_fn": "gelu",
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "deepnorm": False,
    "use_lm_decay": False,
    "use_glu": True,
    "layernorm_eps": 1e-6,
}
_DECODER_FIELDS = {
    "hidden_size": "decoder_embed_dim",
    "num_heads": "decoder_retention_heads",
    "intermediate_size": "decoder_ffn_embed_dim",
    "num_hidden_layers": "decoder_layers",
    "hidden_act": "activation_fn",
    "norm_eps": "layernorm_eps",
    "vocab_size": "vocab_size",
    "pad_token_id": "pad_token_id",
    "expand_v": "expand_v",
    "embedding_multiplier": "multiplier",
    "embedding_norm": "layernorm_embedding",
}
_DECODER_IGNORED = (
    # training only
    "dropout",
    "activation_dropout",
    "drop_path_rate",
    "z_loss_coeff",
    # chunk length of its chunkwise form
    "recurrent_chunk_size",
)
# norms of the ungated feed-forward
_UNGATED = ("subln", "use_ffn_rms_norm")
_TORCHSCALE_DEFAULTS = {
    "moe_freq": 0,
    "use_xmoe": False,
    "multiway": False,
    "share_decoder_input_output_embed": False,
    "vocab_size": -1,
    "pad_token_id": 0,
}
_TORCHSCALE: dict[str, Any] = {
    "prefix": "decoder",
    "unused": ("hidden_ratio", "initializer_range", "use_cache"),
    "assumed": {**ASSUMED, "bos_token_id": None, "eos_token_id": None},
}
_TORCHSCALE_FIELDS = {**_DECODER_FIELDS, "tie_word_embeddings": "share_decoder_input_output_embed"}
_TORCHSCALE_IGNORED = (
    *_DECODER_IGNORED,
    "chunkwise_recurrent",
    # the weights show it
    "no_output_layer",
    # fields of experts, which moe_freq = 0 excludes
    "moe_top1_expert",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_eval_capacity_token_fraction",
    "moe_second_expert_policy",
    "moe_normalize_gate_prob_before_dropping",
    # options of torchscale's other decoders, which RetNetDecoder never reads
    "rel_pos_buckets",
    "max_rel_pos",
    "max_target_positions",
    "xpos_rel_pos",
    "xpos_scale_base",
    # training
    "checkpoint_activations",
    "fsdp",
    "ddp_rank",
)

TORCHSCALE = TorchscaleFormat(
    name="torchscale",
    renames={**_DECODER_RENAMES, "lm_head.weight": "output_projection.weight"},
    defaults=_DECODER_DEFAULTS | _TORCHSCALE_DEFAULTS,
    fields=_TORCHSCALE_FIELDS,
    ignored=(*_TORCHSCALE_IGNORED, *_UNGATED),
    **_DECODER,
    **_TORCHSCALE,
)

TORCHSCALE_2023 = Torchscale2023Format(
    name="torchscale-2023",
    renames={
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in (("norm", "layer_norm"), ("embed_norm", "layernorm_embedding"))
        for kind in ("weight", "bias")
    }
    | {"lm_head.weight": "output_projection.weight"},
    layer_renames={
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in (
            ("norm", "retention_layer_norm"),
            *((f"mixer.{x}_proj", f"retention.{x}_proj") for x in ("q", "k", "v", "g", "out")),
            ("feed_forward_norm", "final_layer_norm"),
            ("feed_forward.up_proj", "ffn.fc1"),
            ("feed_forward.norm", "ffn.ffn_layernorm"),
            ("feed_forward.down_proj", "ffn.fc2"),
        )
        for kind in ("weight", "bias")
    },
    defaults={
        **{name: value for name, value in _DECODER_DEFAULTS.items() if name != "decoder_value_embed_dim"},
        **_TORCHSCALE_DEFAULTS,
        "decoder_ffn_embed_dim": 1536,
        "layernorm_eps": 1e-5,
        "subln": True,
        "use_glu": False,
        "head_norm_eps": None,
    },
    fields={**_TORCHSCALE_FIELDS, "inner_norm": "subln", "head_norm_eps": "head_norm_eps"},
    constants={
        **{name: value for name, value in _DECODER["constants"].items() if name not in RMS_NORMS},
        "projection_bias": True,
        "head_norm": "layer_norm",
        "gated": False,
        "bias": True,
        "norm_type": "layer_norm",
    },
    ignored=_TORCHSCALE_IGNORED,
    **_TORCHSCALE,
)

SYNCDOTH = SyncdothFormat(
    name="syncdoth",
    prefix="model",
    renames=_DECODER_RENAMES,
    defaults={
        **_DECODER_DEFAULTS,
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        "vocab_size": 50257,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    },
    fields={
        **_DECODER_FIELDS,
        **{
            name: name
            for name in ("initializer_range", "use_cache", "bos_token_id", "eos_token_id", "tie_word_embeddings")
        },
    },
    ignored=(
        *_DECODER_IGNORED,
        *_UNGATED,
        "forward_impl",
        # additional outputs
        "output_retentions",
        # part of the tokenizer
        "unk_token_id",
    ),
    unused=("hidden_ratio",),
    assumed=ASSUMED,
    **_DECODER,
)
