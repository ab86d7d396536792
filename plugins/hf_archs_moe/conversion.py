"""Rename tables for transformers' Mixtral, OLMoE and Qwen3-MoE, and for dense decoders to upcycle."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hf_archs.native.formats import TransformersFormat
from hf_archs.parts import PartConfig
from hf_archs_moe.configuration import MoEConfig

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "hidden_act",
    "num_experts_per_tok",
    "initializer_range",
    "router_aux_loss_coef",
    "output_router_logits",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)

# attention's fields under their names in transformers
ATTENTION_FIELDS = {
    "mixer.num_heads": "num_attention_heads",
    "mixer.num_key_value_heads": "num_key_value_heads",
    "mixer.rope_theta": "rope_parameters.rope_theta",
}

_COMMON: dict[str, Any] = {
    "prefix": "model",
    "nested": ("rope_parameters",),
    "layer_renames": {
        "norm.weight": "input_layernorm.weight",
        "feed_forward_norm.weight": "post_attention_layernorm.weight",
        **{
            f"mixer.{ours}.{kind}": f"self_attn.{theirs}.{kind}"
            for ours, theirs in {
                "q_proj": "q_proj",
                "k_proj": "k_proj",
                "v_proj": "v_proj",
                "out_proj": "o_proj",
            }.items()
            for kind in ("weight", "bias")
        },
        "feed_forward.gate.weight": "mlp.gate.weight",
        "feed_forward.experts.gate_up_proj": "mlp.experts.gate_up_proj",
        "feed_forward.experts.down_proj": "mlp.experts.down_proj",
    },
    "ignored": ("max_position_embeddings",),
    "allowed": {"attention_dropout": (0.0,), "rope_parameters.rope_type": ("default",)},
}
# sizes for tests
_TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONSTANTS = {
    "router": "top_k",
    "mixer.type": "attention",
    "residual_in_fp32": False,
    "rescale_prenorm_residual": False,
}
_PER_EXPERT = {
    rf"mlp\.experts\.(\d+)\.{name}_proj\.weight": rf"feed_forward.experts.\2.{name}_proj.weight"
    for name in ("gate", "up", "down")
}
_DENSE = {f"feed_forward.{x}_proj.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
_BIASES = {f"mixer.{ours}": "attention_bias" for ours in ("attention_bias", "output_bias")}
_QK_NORMS = {f"mixer.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in ("q", "k")}

MIXTRAL = TransformersFormat(
    name="mixtral",
    config_name="MixtralConfig",
    model_name="MixtralModel",
    causal_lm_name="MixtralForCausalLM",
    tiny={**_TINY, "num_local_experts": 4},
    fields={
        **{name: name for name in _SAME},
        **ATTENTION_FIELDS,
        "mixer.head_dim": "head_dim",
        "norm_eps": "rms_norm_eps",
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
        "router_jitter_noise": "router_jitter_noise",
    },
    constants={**_CONSTANTS, "norm_topk_prob": True},
    unused=("intermediate_size",),
    layer_patterns={
        r"block_sparse_moe\.gate\.weight": "feed_forward.gate.weight",
        r"block_sparse_moe\.experts\.(\d+)\.w1\.weight": r"feed_forward.experts.\2.gate_proj.weight",
        r"block_sparse_moe\.experts\.(\d+)\.w3\.weight": r"feed_forward.experts.\2.up_proj.weight",
        r"block_sparse_moe\.experts\.(\d+)\.w2\.weight": r"feed_forward.experts.\2.down_proj.weight",
    },
    **_COMMON,
)

OLMOE = TransformersFormat(
    name="olmoe",
    config_name="OlmoeConfig",
    model_name="OlmoeModel",
    causal_lm_name="OlmoeForCausalLM",
    tiny={**_TINY, "num_experts": 4},
    fields={
        **{name: name for name in _SAME},
        **ATTENTION_FIELDS,
        "mixer.clip_qkv": "clip_qkv",
        **_BIASES,
        "norm_eps": "rms_norm_eps",
        "num_experts": "num_experts",
        "moe_intermediate_size": "intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
    },
    constants={**_CONSTANTS, "mixer.qk_norm": "full"},
    unused=("intermediate_size",),
    layer_patterns=_PER_EXPERT,
    **{**_COMMON, "layer_renames": {**_COMMON["layer_renames"], **_QK_NORMS}},
)

QWEN3_MOE = TransformersFormat(
    name="qwen3_moe",
    config_name="Qwen3MoeConfig",
    model_name="Qwen3MoeModel",
    causal_lm_name="Qwen3MoeForCausalLM",
    tiny={**_TINY, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    fields={
        **{name: name for name in _SAME},
        **ATTENTION_FIELDS,
        "mixer.head_dim": "head_dim",
        **_BIASES,
        "norm_eps": "rms_norm_eps",
        "num_experts": "num_experts",
        "moe_intermediate_size": "moe_intermediate_size",
        "intermediate_size": "intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
        "dense_layers": "mlp_only_layers",
    },
    constants={**_CONSTANTS, "mixer.qk_norm": "head"},
    layer_patterns=_PER_EXPERT,
    **{
        **_COMMON,
        "layer_renames": {**_COMMON["layer_renames"], **_QK_NORMS, **_DENSE},
        "ignored": (*_COMMON["ignored"], "max_window_layers"),  # counts layers with a window; there are none
    },
)


@dataclass(frozen=True, kw_only=True)
class DenseFormat(TransformersFormat):
    """A decoder of attention and gated feed-forwards, read as a model without experts."""

    def read_config(self, raw: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
        """As `NativeFormat.read_config`, with all layers dense. Also raises a `ValueError` for sliding windows."""
        if "sliding_attention" in (raw.get("layer_types") or ()):
            raise ValueError(
                f"layer_types has 'sliding_attention' in this {self.name} checkpoint, which {config_class.__name__} "
                "cannot represent; allowed: 'full_attention'"
            )
        fields = super().read_config(raw, config_class)
        return {**fields, "dense_layers": list(range(fields["num_hidden_layers"]))}

    def write_fields(self, config: Any) -> dict[str, Any]:
        """As `NativeFormat.write_fields`. Also raises a `ValueError` for layers with experts."""
        experts = [i for i in range(config.num_hidden_layers) if config.has_experts(i)]
        if experts:
            raise ValueError(
                f"{type(config).__name__}: layers {experts} have experts, which a {self.name} model cannot represent; "
                "allowed are none"
            )
        return super().write_fields(config)


# fields of experts, which dense models do not have
_OF_EXPERTS = {f.name for f in dataclasses.fields(MoEConfig)} - {f.name for f in dataclasses.fields(PartConfig)}
_NO_EXPERTS: dict[str, Any] = {
    **_COMMON,
    "layer_renames": {**_COMMON["layer_renames"], **_DENSE},
    "unused": (
        *(_OF_EXPERTS - {"hidden_act", "gated"}),
        "dense_layers",
        "expert_layer_period",
        "expert_layer_offset",
        "output_router_logits",
    ),
}
_ROUTERS = ("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
_DENSE_FIELDS = {
    **{name: name for name in _SAME if name not in _ROUTERS},
    **ATTENTION_FIELDS,
    "norm_eps": "rms_norm_eps",
    "intermediate_size": "intermediate_size",
}
_DENSE_CONSTANTS = {name: value for name, value in _CONSTANTS.items() if name != "router"} | {"gated": True}
_DENSE_TINY = {name: value for name, value in _TINY.items() if name != "num_experts_per_tok"}
_NO_WINDOW = {"sliding_window": (None,), "use_sliding_window": (False,)}

LLAMA = DenseFormat(
    name="llama",
    config_name="LlamaConfig",
    model_name="LlamaModel",
    causal_lm_name="LlamaForCausalLM",
    tiny=_DENSE_TINY,
    fields={
        **_DENSE_FIELDS,
        "mixer.head_dim": "head_dim",
        **_BIASES,
    },
    constants=_DENSE_CONSTANTS,
    **{**_NO_EXPERTS, "ignored": (*_COMMON["ignored"], "pretraining_tp")},
)

MISTRAL = DenseFormat(
    name="mistral",
    config_name="MistralConfig",
    model_name="MistralModel",
    causal_lm_name="MistralForCausalLM",
    tiny={**_DENSE_TINY, "sliding_window": None},
    fields={**_DENSE_FIELDS, "mixer.head_dim": "head_dim"},
    constants=_DENSE_CONSTANTS,
    **{**_NO_EXPERTS, "allowed": {**_COMMON["allowed"], **_NO_WINDOW}},
)

QWEN3 = DenseFormat(
    name="qwen3",
    config_name="Qwen3Config",
    model_name="Qwen3Model",
    causal_lm_name="Qwen3ForCausalLM",
    tiny={**_DENSE_TINY, "head_dim": 16},
    fields={
        **_DENSE_FIELDS,
        "mixer.head_dim": "head_dim",
        **_BIASES,
    },
    constants={**_DENSE_CONSTANTS, "mixer.qk_norm": "head"},
    **{
        **_NO_EXPERTS,
        "layer_renames": {**_NO_EXPERTS["layer_renames"], **_QK_NORMS},
        "ignored": (*_COMMON["ignored"], "layer_types", "max_window_layers"),
        "allowed": {**_COMMON["allowed"], **_NO_WINDOW},
    },
)
