"""HyenaDNA checkpoints, as published under ``LongSafari/hyenadna-*-hf``, by rename tables (Nguyen et al. 2023,
"HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution", https://arxiv.org/abs/2306.15794).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_archs.formats import StateDictFormat

# the most layers that the network of a filter may have (see `HyenaFields.validate_hyena`)
_FILTER_LAYERS = range(18)


@dataclass(frozen=True, kw_only=True)
class HyenaDNAFormat(StateDictFormat):
    """``model_type`` ``hyenadna``, which transformers itself does not have.

    Its files hold the positions that filters see, since they were trained; and one frequency under up to three names.
    """

    def __str__(self) -> str:
        return "hyenadna"

    def expand(self, raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        given, defaults = super().expand(raw)
        multiple = given["pad_vocab_size_multiple"]
        given["vocab_size"] = -(-given["vocab_size"] // multiple) * multiple
        given["d_inner"] = 4 * given["d_model"] if given["d_inner"] is None else given["d_inner"]
        given["activation_freq"] = float(given["activation_freq"])
        given["bands"] = (given["emb_dim"] - 1) // 2  # under a name of our own: what it says in another unit
        return given, defaults

    def write_config(self, config: PreTrainedConfig) -> dict[str, Any]:
        written = super().write_config(config)
        written["emb_dim"] = 2 * written.pop("bands") + 1
        return written

    def is_buffer(self, name: str) -> bool:
        return name.endswith("filter_fn.pos_emb.t")

    def buffers(self, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
        t = torch.linspace(0, 1, config.max_positions)[None, :, None]  # type: ignore[attr-defined]
        layers = range(config.num_hidden_layers)  # type: ignore[attr-defined]
        return {f"{self.prefix}.layers.{i}.mixer.filter_fn.pos_emb.t": t for i in layers}


HYENADNA = HyenaDNAFormat(
    name="hyenadna",
    prefix="hyena.backbone",
    renames={
        "embed_tokens.weight": "embeddings.word_embeddings.weight",
        "norm.weight": "ln_f.weight",
        "norm.bias": "ln_f.bias",
    },
    layer_renames={
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
    },
    # one and the same parameter: files have it once or as often as it is used
    layer_aliases={f"mixer.filter_fn.implicit_filter.{2 * i + 1}.freq": "mixer.ssm.freq" for i in _FILTER_LAYERS[1:]},
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
        "tie_word_embeddings": True,
        # of the tokenizer, where the model's file says nothing
        "pad_token_id": 4,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "intermediate_size": "d_inner",
        "num_hidden_layers": "n_layer",
        "max_positions": "max_seq_len",
        "position_bands": "bands",
        "filter_size": "filter_order",
        "filter_layers": "num_inner_mlps",
        "filter_frequency": "activation_freq",
        "initializer_range": "initializer_range",
        "tie_word_embeddings": "tie_word_embeddings",
        "pad_token_id": "pad_token_id",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
    },
    constants={
        "order": 2,
        "conv_kernel": 3,
        "use_bias": True,
        "bias": True,
        "filter_types": ["implicit"],
        "filter_shift": 0.05,
        "hidden_act": "gelu_pytorch_tanh",
        "gated": False,
        "norm_type": "layer_norm",
        "norm_eps": 1e-5,
        "embedding_multiplier": 1.0,
        "residual_in_fp32": True,
        "bidirectional": False,
        "use_cache": True,
    },
    # their projections have biases whatever use_bias says, and two of the dropouts are applied to nothing
    ignored=(
        "model_type",
        "use_bias",
        "train_freq",
        "emb_dim",
        "embed_dropout",
        "hyena_filter_dropout",
        "pad_vocab_size_multiple",
    ),
    # what only initial weights, or other kinds of filters, depend on
    unused=("fast_decay", "slow_decay", "modes", "medium_taps", "short_taps", "filter_group_size"),
    assumed={"learned_positions": True, "rescale_prenorm_residual": True},
)
