"""Hybrids as an architecture of hf-archs: layers of any registered mixers and feed-forwards, in any pattern."""

from hf_archs.registry import Architecture, register
from hf_archs_hybrid import modeling
from hf_archs_hybrid.configuration import ArchHybridConfig
from hf_archs_hybrid.conversion import BAMBA, JAMBA, NEMOTRON_H
from hf_archs_hybrid.modeling import (
    ArchHybridForCausalLM,
    ArchHybridForMaskedLM,
    ArchHybridForQuestionAnswering,
    ArchHybridForSequenceClassification,
    ArchHybridForTokenClassification,
    ArchHybridModel,
)
from hf_archs_hybrid.presets import PRESETS, preset, preset_fields

__all__ = [
    "PRESETS",
    "ArchHybridConfig",
    "ArchHybridForCausalLM",
    "ArchHybridForMaskedLM",
    "ArchHybridForQuestionAnswering",
    "ArchHybridForSequenceClassification",
    "ArchHybridForTokenClassification",
    "ArchHybridModel",
    "preset",
    "preset_fields",
]

register(
    Architecture(
        "hybrid",
        modeling,
        tiny={
            "mixers": {
                "ssm": {"type": "mamba2", "state_size": 16, "head_dim": 16},
                "local": {"type": "sliding_attention", "num_heads": 4, "num_key_value_heads": 2, "window": 6},
                "keep": {"type": "retnet", "num_heads": 4},
            },
            "layer_pattern": "ssm local+keep",
            "feed_forward": {
                "mlp": {"type": "mlp", "intermediate_size": 96},
                "moe": {"type": "moe", "num_experts": 4, "moe_intermediate_size": 48},
            },
            "feed_forward_pattern": "mlp moe",
        },
        native_formats=(JAMBA, BAMBA, NEMOTRON_H),
        sizes={name: preset_fields(name, vocab_size=4096) for name in PRESETS},
    )
)
