"""Hyena (Poli et al. 2023) as an architecture of hf-archs, and its op `long_conv`."""

from hf_archs.data.dna import dna_tokenizer
from hf_archs.errors import moved
from hf_archs.registry import Architecture, register, register_mixer
from hf_archs_hyena import modeling
from hf_archs_hyena.configuration import ArchHyenaConfig, HyenaMixerConfig, hyena_state
from hf_archs_hyena.conversion import HYENADNA, ORIGINAL
from hf_archs_hyena.distillation import distill_filters
from hf_archs_hyena.mixer import HyenaMixer
from hf_archs_hyena.modeling import (
    ArchHyenaForCausalLM,
    ArchHyenaForMaskedLM,
    ArchHyenaForQuestionAnswering,
    ArchHyenaForSequenceClassification,
    ArchHyenaForTokenClassification,
    ArchHyenaModel,
)
from hf_archs_hyena.ops.long_conv import long_conv

__all__ = [
    "ArchHyenaConfig",
    "ArchHyenaForCausalLM",
    "ArchHyenaForMaskedLM",
    "ArchHyenaForQuestionAnswering",
    "ArchHyenaForSequenceClassification",
    "ArchHyenaForTokenClassification",
    "ArchHyenaModel",
    "HyenaMixer",
    "HyenaMixerConfig",
    "distill_filters",
    "dna_tokenizer",
    "long_conv",
]

# HyenaDNA's vocabulary: 12 characters and special tokens, padded to 16 rows
_DNA = {"vocab_size": 16, "pad_token_id": 4, "bos_token_id": 2, "eos_token_id": 1}

moved("hf_archs_hyena.modal", "hf_archs_hyena.ops.modal")  # names of version 0.1
moved("hf_archs_hyena.toeplitz_conv", "hf_archs_hyena.ops.toeplitz_conv")

register_mixer(
    "hyena",
    HyenaMixer,
    HyenaMixerConfig,
    state=hyena_state,
    lora_targets=("in_proj", "out_proj"),
    even_targets=("in_proj", "out_proj"),
    # at high frequencies the slope of a filter changes too fast for finite differences
    tiny={"max_positions": 16384, "filter_size": 16, "filter_frequency": 1.0},
)
register(
    Architecture(
        "hyena",
        modeling,
        native_formats=(HYENADNA, ORIGINAL),
        sizes={
            "4m": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096, "max_positions": 16384},
            # `hf-archs quickstart --task genome`: explicit taps for near bases, implicit taps for far bases
            "genome": {
                "hidden_size": 128,
                "num_hidden_layers": 4,
                "intermediate_size": 256,
                "max_positions": 4096,
                "filter_types": ["medium", "implicit"],
                **_DNA,
            },
            # the published models' sizes (Nguyen et al. 2023, "HyenaDNA")
            "tiny-1k": {"hidden_size": 128, "num_hidden_layers": 2, "max_positions": 1026, **_DNA},
            "tiny-1k-d256": {"hidden_size": 256, "num_hidden_layers": 2, "max_positions": 1026, **_DNA},
            "small-32k": {"hidden_size": 256, "num_hidden_layers": 4, "max_positions": 32770, **_DNA},
            "medium-160k": {"hidden_size": 256, "num_hidden_layers": 8, "max_positions": 160002, **_DNA},
            "medium-450k": {"hidden_size": 256, "num_hidden_layers": 8, "max_positions": 450002, **_DNA},
            "large-1m": {"hidden_size": 256, "num_hidden_layers": 8, "max_positions": 1000002, **_DNA},
        },
    )
)
