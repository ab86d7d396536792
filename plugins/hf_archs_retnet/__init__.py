"""RetNet (Sun et al. 2023) as an architecture of hf-archs, and its op `retention`."""

from hf_archs.registry import Architecture, register, register_feed_forward, register_mixer
from hf_archs_retnet import modeling
from hf_archs_retnet.configuration import ArchRetNetConfig, RetNetMixerConfig, retnet_state
from hf_archs_retnet.conversion import FLA, SYNCDOTH, TORCHSCALE, TORCHSCALE_2023
from hf_archs_retnet.mixer import RetNetMixer
from hf_archs_retnet.modeling import (
    ArchRetNetForCausalLM,
    ArchRetNetForMaskedLM,
    ArchRetNetForQuestionAnswering,
    ArchRetNetForSequenceClassification,
    ArchRetNetForTokenClassification,
    ArchRetNetModel,
)
from hf_archs_retnet.ops.retention import multi_scale_log_decay, retention, retention_parallel, retention_reference
from hf_archs_retnet.sub_ln import SubLNMLP, SubLNMLPConfig, sub_ln_tp_plan

__all__ = [
    "ArchRetNetConfig",
    "ArchRetNetForCausalLM",
    "ArchRetNetForMaskedLM",
    "ArchRetNetForQuestionAnswering",
    "ArchRetNetForSequenceClassification",
    "ArchRetNetForTokenClassification",
    "ArchRetNetModel",
    "RetNetMixer",
    "RetNetMixerConfig",
    "multi_scale_log_decay",
    "retention",
    "retention_parallel",
    "retention_reference",
]

# common fields of the paper's models (sections 2.4 and 3.1): heads of 256 keys and 512 values, a plain feed-forward
_PAPER = {
    "rotary": "interleaved",
    "elementwise_affine": False,
    "normalize_decay": True,
    "norm_type": "layer_norm",
    "hidden_act": "gelu",
    "gated": False,
}

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj")

register_mixer(
    "retnet",
    RetNetMixer,
    RetNetMixerConfig,
    state=retnet_state,
    lora_targets=_PROJECTIONS,
    even_targets=_PROJECTIONS,
    tiny={"num_heads": 2},
)
register_feed_forward(
    "sub_ln_mlp",
    SubLNMLP,
    SubLNMLPConfig,
    tp_plan=sub_ln_tp_plan,
    lora_targets=("up_proj", "down_proj"),
    tiny={"intermediate_size": 96},
)
register(
    Architecture(
        "retnet",
        modeling,
        native_formats=(FLA, TORCHSCALE, SYNCDOTH, TORCHSCALE_2023),
        sizes={
            "4m": {
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "vocab_size": 4096,
                "num_heads": 4,
                "intermediate_size": 384,
            },
            "1.3b": {
                **_PAPER,
                "hidden_size": 2048,
                "num_hidden_layers": 24,
                "num_heads": 8,
                "intermediate_size": 4096,
            },
            "2.7b": {
                **_PAPER,
                "hidden_size": 2560,
                "num_hidden_layers": 32,
                "num_heads": 10,
                "intermediate_size": 5120,
            },
            "6.7b": {
                **_PAPER,
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_heads": 16,
                "intermediate_size": 8192,
            },
        },
    )
)
