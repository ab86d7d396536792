"""Mixture of experts as an architecture of hf-archs, and as a feed-forward for other architectures."""

from hf_archs.registry import Architecture, register, register_feed_forward
from hf_archs_moe import modeling
from hf_archs_moe.callbacks import RouterCallback
from hf_archs_moe.configuration import ArchMoEConfig, MoEConfig
from hf_archs_moe.conversion import LLAMA, MISTRAL, MIXTRAL, OLMOE, QWEN3, QWEN3_MOE
from hf_archs_moe.feed_forward import MoE, moe_ep_plan, moe_tp_plan
from hf_archs_moe.modeling import (
    ArchMoEForCausalLM,
    ArchMoEForMaskedLM,
    ArchMoEForQuestionAnswering,
    ArchMoEForSequenceClassification,
    ArchMoEForTokenClassification,
    ArchMoEModel,
)
from hf_archs_moe.on_disk import expert_conversions
from hf_archs_moe.ops.experts import expert_mlp
from hf_archs_moe.routing import Router, Statistics

__all__ = [
    "ArchMoEConfig",
    "ArchMoEForCausalLM",
    "ArchMoEForMaskedLM",
    "ArchMoEForQuestionAnswering",
    "ArchMoEForSequenceClassification",
    "ArchMoEForTokenClassification",
    "ArchMoEModel",
    "MoE",
    "MoEConfig",
    "Router",
    "RouterCallback",
    "Statistics",
    "expert_mlp",
]

register_feed_forward(
    "moe",
    MoE,
    MoEConfig,
    tp_plan=moe_tp_plan,
    ep_plan=moe_ep_plan,
    lora_targets=("gate_proj", "up_proj", "down_proj"),  # of the shared expert
    tiny={"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32},
    conversions=expert_conversions(),
)
register(
    Architecture(
        "moe",
        modeling,
        tiny={
            "mixer": {"type": "attention", "num_heads": 4, "num_key_value_heads": 2},
            "num_experts": 4,
            "moe_intermediate_size": 48,
            "intermediate_size": 96,
            "expert_layer_period": 2,
            "shared_expert_intermediate_size": 32,
        },
        native_formats=(LLAMA, MISTRAL, QWEN3, MIXTRAL, OLMOE, QWEN3_MOE),
        sizes={
            "small": {
                "vocab_size": 4096,
                "hidden_size": 256,
                "num_hidden_layers": 6,
                "intermediate_size": 384,
                "moe_intermediate_size": 128,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
            },
            # Jiang et al. 2024, table 1
            "8x7b": {
                "vocab_size": 32000,
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "moe_intermediate_size": 14336,
                "mixer": {"type": "attention", "num_heads": 32, "num_key_value_heads": 8, "rope_theta": 1e6},
            },
            # Fedus et al. 2022, table 9
            "switch-base-128": {
                "vocab_size": 32128,
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_experts": 128,
                "moe_intermediate_size": 2048,
                "intermediate_size": 2048,
                "router": "switch",
                "capacity_factor": 1.25,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "hidden_act": "relu",
                "gated": False,
            },
        },
    )
)
