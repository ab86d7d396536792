"""Mamba-2 (Dao and Gu 2024) as an architecture of hf-archs, and its op `ssd_scan`."""

from hf_archs.registry import Architecture, register, register_mixer
from hf_archs_mamba2 import modeling
from hf_archs_mamba2.configuration import ArchMamba2Config, Mamba2MixerConfig, mamba2_state
from hf_archs_mamba2.conversion import FLA, MAMBA2, STATE_SPACES
from hf_archs_mamba2.mixer import Mamba2Mixer
from hf_archs_mamba2.modeling import (
    ArchMamba2ForCausalLM,
    ArchMamba2ForMaskedLM,
    ArchMamba2ForQuestionAnswering,
    ArchMamba2ForSequenceClassification,
    ArchMamba2ForTokenClassification,
    ArchMamba2Model,
)
from hf_archs_mamba2.ops.ssd_scan import ssd_scan

__all__ = [
    "ArchMamba2Config",
    "ArchMamba2ForCausalLM",
    "ArchMamba2ForMaskedLM",
    "ArchMamba2ForQuestionAnswering",
    "ArchMamba2ForSequenceClassification",
    "ArchMamba2ForTokenClassification",
    "ArchMamba2Model",
    "Mamba2Mixer",
    "Mamba2MixerConfig",
    "ssd_scan",
]

register_mixer(
    "mamba2",
    Mamba2Mixer,
    Mamba2MixerConfig,
    state=mamba2_state,
    lora_targets=("in_proj", "out_proj"),
    even_targets=("out_proj",),
    tiny={"state_size": 16, "head_dim": 16, "n_groups": 2},
)
register(
    Architecture(
        "mamba2",
        modeling,
        native_formats=(MAMBA2, FLA, STATE_SPACES),
        # the published models' widths and depths (Dao and Gu 2024, table 10)
        sizes={
            "4m": {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 4096, "state_size": 64},
            "130m": {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288},
            "370m": {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50288},
            "780m": {"hidden_size": 1536, "num_hidden_layers": 48, "vocab_size": 50288},
            "1.3b": {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50288},
            "2.7b": {"hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50288},
        },
    )
)
