"""Rename tables for HyenaDNA checkpoints.

``LongSafari/hyenadna-*-hf``, and the original layout of ``LongSafari/hyenadna-*-seqlen`` (Nguyen et al. 2023,
"HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution", https://arxiv.org/abs/2306.15794;
code: github.com/HazyResearch/hyena-dna).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_archs.native.formats import StateDictFormat

# indices of the layers in the largest filter network (see `HyenaFields.validate_hyena`)
_FILTER_LAYERS = range(18)


@dataclass(frozen=True, kw_only=True)
class HyenaDNAFormat(StateDictFormat):
    """``model_type`` ``hyenadna``, which transformers itself does not have.

    Its files hold the trained features of the positions, and one shared frequency under up to three names.

    Attributes:
        features: their config field for the number of features of a position.
    """

    features: str = "emb_dim"

    def __str__(self) -> str:
        return self.name

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `StateDictFormat.expand`, with derived sizes. Raises a `ValueError` for an impossible size."""
        given, defaults = super().expand(raw)
        width = self._whole_number(given, "d_model", 1)
        multiple = self._whole_number(given, "pad_vocab_size_multiple", 1)
        given["vocab_size"] = -(-self._whole_number(given, "vocab_size", 1) // multiple) * multiple
        given["d_inner"] = 4 * width if given["d_inner"] is None else given["d_inner"]
        features = self._whole_number(given, self.features, 3)
        if features % 2 == 0:
            raise ValueError(f"{self.features} is {features} in this {self} checkpoint; allowed are odd numbers from 3")
        given["bands"] = (features - 1) // 2  # our name, for the same in our unit
        for ours in ("filter_frequency", "filter_shift", "norm_eps"):
            theirs = self.fields.get(ours)
            if theirs is not None and type(given[theirs]) is int:
                given[theirs] = float(given[theirs])
        return given, defaults

    def _whole_number(self, given: Mapping[str, Any], name: str, least: int) -> int:
        value = given[name]
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r} in this {self} checkpoint; allowed are whole numbers from {least}")
        return value

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As `StateDictFormat.write_config`, with bands converted to the number of features."""
        written = super().write_config(config)
        written[self.features] = 2 * written.pop("bands") + 1
        return written

    def is_buffer(self, name: str) -> bool:
        """True for the positions' times, which their number determines."""
        return name.endswith("filter_fn.pos_emb.t")

    def buffers(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        """The positions' times in every layer's filter, ``(1, max_positions, 1)``."""
        t = torch.linspace(0, 1, config.max_positions)[None, :, None]  # type: ignore[attr-defined]
        layers = range(config.num_hidden_layers)  # type: ignore[attr-defined]
        return {f"{self.prefix}.layers.{i}.mixer.filter_fn.pos_emb.t": t for i in layers}


@dataclass(frozen=True, kw_only=True)
class OriginalFormat(HyenaDNAFormat):
    """The layout of HyenaDNA's own code.

    The config has no ``model_type`` and holds the mixer's options under ``layer``, which the tables name
    ``layer.<option>``. The weights are a PyTorch Lightning checkpoint.
    """

    def detect(self, raw: Mapping[str, Any]) -> bool:
        """True for ``d_model``, ``n_layer`` and options under ``layer``, without a ``model_type``."""
        return "model_type" not in raw and isinstance(raw.get("layer"), Mapping) and {"d_model", "n_layer"} <= set(raw)

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `HyenaDNAFormat.expand`, with flat options. Raises a `ValueError` for a mixer of another width."""
        mixer = {f"layer.{name}": value for name, value in raw["layer"].items()}
        given, defaults = super().expand({**{k: v for k, v in raw.items() if k != "layer"}, **mixer})
        self._whole_number(given, "layer.l_max", 2)
        if given.pop("layer.d_model", given["d_model"]) != given["d_model"]:
            raise ValueError(
                f"layer.d_model is {raw['layer']['d_model']!r} in this {self} checkpoint; allowed is d_model = "
                f"{given['d_model']}"
            )
        return given, defaults

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        """As `HyenaDNAFormat.write_config`, with the mixer's options under ``layer``."""
        written = super().write_config(config)
        mixer = {name.removeprefix("layer."): written.pop(name) for name in [*written] if name.startswith("layer.")}
        return {**written, "layer": mixer}

    # Lightning holds the model as `model`; activation checkpointing wraps mixer and mlp in a module `layer`

    def ours(self, name: str) -> str:
        """As `NativeFormat.ours`, for a name in a Lightning checkpoint."""
        return super().ours(re.sub(r"\.(mixer|mlp)\.layer\.", r".\1.", name.removeprefix("model.")))

    def key_mapping(self) -> dict[str, str]:
        """As `NativeFormat.key_mapping`, also removing Lightning's prefix and the ``layer`` of checkpointed modules."""
        plain = {r"^model\.(backbone|lm_head)\.": r"\1.", r"\.(mixer|mlp)\.layer\.": r".\1."}
        return {**plain, **super().key_mapping()}

    def is_buffer(self, name: str) -> bool:
        """As `HyenaDNAFormat.is_buffer`, and True for the sums of Lightning's metrics."""
        return super().is_buffer(name) or "torchmetrics" in name


_RENAMES = {
    "embed_tokens.weight": "embeddings.word_embeddings.weight",
    "norm.weight": "ln_f.weight",
    "norm.bias": "ln_f.bias",
}
_LAYER_RENAMES = {
    **{f"norm.{x}": f"norm1.{x}" for x in ("weight", "bias")},
    **{f"feed_forward_norm.{x}": f"norm2.{x}" for x in ("weight", "bias")},
    **{f"feed_forward.up_proj.{x}": f"mlp.fc1.{x}" for x in ("weight", "bias")},
    **{f"feed_forward.down_proj.{x}": f"mlp.fc2.{x}" for x in ("weight", "bias")},
    **{f"mixer.conv1d.{x}": f"mixer.short_filter.{x}" for x in ("weight", "bias")},
    "mixer.ssm.bias": "mixer.filter_fn.bias",
    "mixer.ssm.z": "mixer.filter_fn.pos_emb.z",
    "mixer.ssm.deltas": "mixer.filter_fn.modulation.deltas",
    "mixer.ssm.freq": "mixer.filter_fn.implicit_filter.1.freq",
    **{
        f"mixer.ssm.layers.{i}.{x}": f"mixer.filter_fn.implicit_filter.{2 * i}.{x}"
        for i in _FILTER_LAYERS
        for x in ("weight", "bias")
    },
}
# one shared parameter, which files hold once or under the name of every use
_LAYER_ALIASES = {f"mixer.filter_fn.implicit_filter.{2 * i + 1}.freq": "mixer.ssm.freq" for i in _FILTER_LAYERS[1:]}

_TIED_DNA = {
    "tie_word_embeddings": True,
    # the tokenizer's; the model's config has none
    "pad_token_id": 4,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_inner",
    "num_hidden_layers": "n_layer",
    "position_bands": "bands",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_CONSTANTS = {
    "order": 2,
    "use_bias": True,
    "bias": True,
    "filter_types": ["implicit"],
    "hidden_act": "gelu_pytorch_tanh",
    "gated": False,
    "norm_type": "layer_norm",
    "embedding_multiplier": 1.0,
    "bidirectional": False,
    "use_cache": True,
}
# fields of initialisation and of other filter types
_UNUSED = ("fast_decay", "slow_decay", "modes", "medium_taps", "short_taps", "filter_group_size")
_ASSUMED = {"learned_positions": True, "rescale_prenorm_residual": True}

HYENADNA = HyenaDNAFormat(
    name="hyenadna",
    prefix="hyena.backbone",
    renames=_RENAMES,
    layer_renames=_LAYER_RENAMES,
    layer_aliases=_LAYER_ALIASES,
    defaults={
        "model_type": "hyenadna",
        "architectures": ["HyenaDNAForCausalLM"],
        "vocab_size": 12,
        "d_model": 256,
        "d_inner": None,
        "use_bias": True,
        "train_freq": True,
        "max_seq_len": 1024,
        "emb_dim": 3,
        "n_layer": 12,
        "num_inner_mlps": 2,
        "hyena_order": 2,
        "short_filter_order": 3,
        "filter_order": 64,
        "activation_freq": 1,
        "embed_dropout": 0.1,
        "hyena_dropout": 0.0,
        "hyena_filter_dropout": 0.0,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "pad_vocab_size_multiple": 8,
        **_TIED_DNA,
    },
    fields={
        **_FIELDS,
        "max_positions": "max_seq_len",
        "filter_size": "filter_order",
        "filter_layers": "num_inner_mlps",
        "filter_frequency": "activation_freq",
        "learned_frequency": "train_freq",
        "initializer_range": "initializer_range",
    },
    # PyTorch's eps in the layers' norms, the config's in the final one
    constants={**_CONSTANTS, "conv_kernel": 3, "filter_shift": 0.05, "norm_eps": 1e-5, "residual_in_fp32": True},
    # their code ignores use_bias (projections always have biases) and never applies these two dropouts
    ignored=(
        "model_type",
        "use_bias",
        "emb_dim",
        "embed_dropout",
        "hyena_filter_dropout",
        "pad_vocab_size_multiple",
    ),
    unused=_UNUSED,
    assumed=_ASSUMED,
)

ORIGINAL = OriginalFormat(
    name="hyenadna-original",
    prefix="backbone",
    pickle="weights.ckpt",
    features="layer.emb_dim",
    renames=_RENAMES,
    layer_renames=_LAYER_RENAMES,
    layer_aliases=_LAYER_ALIASES,
    # defaults of model, layer, operator and filter in standalone_hyenadna.py, which reads the published files
    defaults={
        "d_inner": None,
        "vocab_size": None,
        "pad_vocab_size_multiple": 1,
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": False,
        "resid_dropout": 0.0,
        "attn_layer_idx": None,
        "max_position_embeddings": 0,
        "identity_mlp": False,
        **_TIED_DNA,
        "layer._name_": "hyena",
        "layer.l_max": None,
        "layer.order": 2,
        "layer.filter_order": 64,
        "layer.num_inner_mlps": 2,
        "layer.emb_dim": 3,
        "layer.w": 1,
        "layer.shift": 0.05,
        "layer.modulate": True,
        "layer.short_filter_order": 3,
        "layer.bias": True,
        "layer.num_heads": 1,
        "layer.inner_factor": 1,
        "layer.num_blocks": 1,
        "layer.outer_mixing": False,
        "layer.post_order_ffn": False,
        "layer.filter_cls": "hyena-filter",
        "layer.linear_mixer": False,
        "layer.normalized": False,
        "layer.bidirectional": False,
        "layer.activation": "id",
        "layer.dropout": 0.0,
    },
    fields={
        **_FIELDS,
        "max_positions": "layer.l_max",
        "filter_size": "layer.filter_order",
        "filter_layers": "layer.num_inner_mlps",
        "filter_frequency": "layer.w",
        "filter_shift": "layer.shift",
        "conv_kernel": "layer.short_filter_order",
        "norm_eps": "layer_norm_epsilon",
        "residual_in_fp32": "residual_in_fp32",
    },
    constants={**_CONSTANTS, "learned_frequency": True},
    allowed={"attn_layer_idx": (None, []), "layer.local_order": (3,)},
    ignored=(
        "_name_",
        "pad_vocab_size_multiple",
        "layer.emb_dim",
        # kernels, memory, return values
        "fused_mlp",
        "fused_dropout_add_ln",
        "checkpoint_mixer",
        "checkpoint_mlp",
        "process_group",
        "sequence_parallel",
        "return_hidden_state",
        "layer.fused_bias_fc",
        "layer.fused_fft_conv",
        "layer.jit_filter",
        "layer.return_state",
        # training and initialisation: decays and frequency are in the checkpoint
        "attn_cfg",
        "embed_dropout",
        "initializer_cfg",
        "layer.lr",
        "layer.wd",
        "layer.lr_pos_emb",
        "layer.modulation_lr",
        "layer.fast_decay_pct",
        "layer.slow_decay_pct",
        "layer.target",
        # their filter applies no dropout and never receives train_freq
        "layer.filter_dropout",
        "layer.train_freq",
    ),
    unused=(*_UNUSED, "initializer_range"),
    assumed=_ASSUMED,
)
