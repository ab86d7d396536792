"""Hybrids as an architecture of hf-archs: layers of any registered mixers and feed-forwards, in any pattern."""

from hf_archs.parallel import ParallelMixer
from hf_archs.registry import Architecture, register
from hf_archs_hybrid.configuration import ArchHybridConfig
from hf_archs_hybrid.modeling import (
    ArchHybridForCausalLM,
    ArchHybridForMaskedLM,
    ArchHybridForQuestionAnswering,
    ArchHybridForSequenceClassification,
    ArchHybridForTokenClassification,
    ArchHybridModel,
)

__all__ = [
    "ArchHybridConfig",
    "ArchHybridForCausalLM",
    "ArchHybridForMaskedLM",
    "ArchHybridForQuestionAnswering",
    "ArchHybridForSequenceClassification",
    "ArchHybridForTokenClassification",
    "ArchHybridModel",
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
        lora_targets=("in_proj", "out_proj"),
        tiny={
            "mixers": {
                "ssm": {"type": "mamba2", "state_size": 16, "head_dim": 16},
                "other": {"type": "mamba", "state_size": 8},
                "keep": {"type": "retnet", "num_heads": 4},
            },
            "layer_pattern": "ssm other+keep",
            "feed_forward_pattern": "mlp none",
            "feed_forward": {"mlp": {"type": "mlp", "intermediate_size": 96}},
        },
    )
)
