"""Hybrids as an architecture of hf-archs: layers of any registered mixers and feed-forwards, in any pattern."""

from hf_archs.parallel import ParallelMixer
from hf_archs.registry import Architecture, register
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
        name="hybrid",
        config_class=ArchHybridConfig,
        model_class=ArchHybridModel,
        causal_lm_class=ArchHybridForCausalLM,
        masked_lm_class=ArchHybridForMaskedLM,
        sequence_classification_class=ArchHybridForSequenceClassification,
        token_classification_class=ArchHybridForTokenClassification,
        question_answering_class=ArchHybridForQuestionAnswering,
        mixer_class=ParallelMixer,
        # those of the layers that a pattern has; PEFT passes over the others
        lora_targets=("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
        even_targets=("q_proj", "k_proj", "v_proj", "out_proj"),
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
