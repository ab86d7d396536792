"""Mamba (Gu and Dao 2023) as an architecture of hf-archs, and its op `selective_scan`."""

from hf_archs.registry import Architecture, register, register_mixer
from hf_archs_mamba import modeling
from hf_archs_mamba.configuration import ArchMambaConfig, MambaMixerConfig, mamba_state
from hf_archs_mamba.conversion import FALCON_MAMBA, FLA, MAMBA, STATE_SPACES
from hf_archs_mamba.mixer import MambaMixer
from hf_archs_mamba.modeling import (
    ArchMambaForCausalLM,
    ArchMambaForMaskedLM,
    ArchMambaForQuestionAnswering,
    ArchMambaForSequenceClassification,
    ArchMambaForTokenClassification,
    ArchMambaModel,
)
from hf_archs_mamba.ops.selective_scan import selective_scan

__all__ = [
    "ArchMambaConfig",
    "ArchMambaForCausalLM",
    "ArchMambaForMaskedLM",
    "ArchMambaForQuestionAnswering",
    "ArchMambaForSequenceClassification",
    "ArchMambaForTokenClassification",
    "ArchMambaModel",
    "MambaMixer",
    "MambaMixerConfig",
    "selective_scan",
]

register_mixer(
    "mamba",
    MambaMixer,
    MambaMixerConfig,
    state=mamba_state,
    lora_targets=("in_proj", "x_proj", "dt_proj", "out_proj"),
    even_targets=("in_proj", "out_proj"),
    tiny={"state_size": 8},
)
register(
    Architecture(
        "mamba",
        modeling,
        native_formats=(MAMBA, FALCON_MAMBA, FLA, STATE_SPACES),
        # the published models' widths and depths (Gu and Dao 2023, table 12)
        sizes={
            "4m": {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 4096},
            "130m": {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280},
            "370m": {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50280},
            "790m": {"hidden_size": 1536, "num_hidden_layers": 48, "vocab_size": 50280},
            "1.4b": {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280},
            "2.8b": {"hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50280},
        },
    )
)
