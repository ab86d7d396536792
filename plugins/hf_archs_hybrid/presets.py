"""Patterns of published hybrids: ratio and order of their layers, at any width and depth."""

from collections.abc import Callable
from typing import Any

from hf_archs_hybrid.configuration import ArchHybridConfig

Fields = dict[str, Any]


def _attention(width: int, **fields: Any) -> Fields:
    heads = max(width // 64, 1)
    groups = heads // 4 if heads % 4 == 0 else heads
    return {"type": "attention", "num_heads": heads, "num_key_value_heads": groups, **fields}


def _local(width: int, **fields: Any) -> Fields:
    return _attention(width, **{"window": 2048, **fields}) | {"type": "sliding_attention"}


def _mlp(width: int, **fields: Any) -> Fields:
    return {"type": "mlp", "intermediate_size": -(-8 * width // 3 // 64) * 64, **fields}


def _moe(width: int, experts: int, chosen: int, **fields: Any) -> Fields:
    sizes = {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": 2 * width}
    return {"type": "moe", **sizes, **fields}


def _mamba2(width: int, **fields: Any) -> Fields:
    return {"type": "mamba2", "head_dim": min(64, width), **fields}


def _mixture(width: int) -> Fields:
    """Mamba-2, local attention and experts: the small model of ``hf-archs quickstart --arch hybrid``."""
    return {
        "mixers": {"ssm": _mamba2(width, state_size=64), "local": _local(width, window=256)},
        "layer_pattern": "ssm ssm local",
        "feed_forward": {
            "mlp": _mlp(width, intermediate_size=3 * width // 2),
            "moe": _moe(width, 8, 2, moe_intermediate_size=3 * width // 8),
        },
        "feed_forward_pattern": "mlp moe",
    }


def _jamba(width: int) -> Fields:
    """Lieber et al. 2024, section 3: attention in one layer of eight, experts in every other layer, no positions."""
    return {
        "mixers": {
            "mamba": {"type": "mamba", "bcdt_norm": "affine", "bcdt_norm_eps": 1e-5},
            "attention": _attention(width, rope_theta=None),
        },
        "layer_pattern": "mamba; attention every 8 from 4",
        "feed_forward": {
            "mlp": _mlp(width),
            "moe": _moe(width, 16, 2, moe_intermediate_size=_mlp(width)["intermediate_size"], norm_topk_prob=False),
        },
        "feed_forward_pattern": "mlp; moe every 2 from 1",
    }


def _samba(width: int) -> Fields:
    """Ren et al. 2024, section 2: Mamba and attention with a window of 2,048 in turn, each with a feed-forward."""
    return {
        "mixers": {"mamba": {"type": "mamba"}, "local": _local(width)},
        "layer_pattern": "mamba local",
        "feed_forward": {"mlp": _mlp(width)},
    }


def _zamba2(width: int) -> Fields:
    """Glorioso et al. 2024, section 2: Mamba-2, and in every sixth layer a shared attention and feed-forward with an
    adapter per layer.
    """
    rank = max(width // 32, 1)
    return {
        "mixers": {"mamba2": _mamba2(width), "attention": {**_attention(width), "shared": True, "site_rank": rank}},
        "layer_pattern": "mamba2; attention every 6",
        "feed_forward": {"mlp": {**_mlp(width), "shared": True, "site_rank": rank}},
        "feed_forward_pattern": "none; mlp every 6",
    }


def _nemotron_h(width: int) -> Fields:
    """NVIDIA 2025, section 2.1: layers of Mamba-2 and of feed-forward in turn; 8 % of the layers are attention."""
    return {
        "mixers": {"mamba2": _mamba2(width), "attention": _attention(width, rope_theta=None)},
        "layer_pattern": "mamba2 none mamba2 none mamba2 none mamba2 none mamba2 attention none",
        "feed_forward": {"mlp": _mlp(width, intermediate_size=4 * width, hidden_act="relu2", gated=False)},
        "feed_forward_pattern": "none mlp none mlp none mlp none mlp none none mlp",
    }


def _falcon_h1(width: int) -> Fields:
    """Zuo et al. 2025, section 2: attention and Mamba-2 side by side in every layer."""
    return {
        "mixers": {"mamba2": _mamba2(width), "attention": _attention(width, rope_theta=1e11)},
        "layer_pattern": "mamba2+attention",
        "feed_forward": {"mlp": _mlp(width)},
    }


def _griffin_like(width: int) -> Fields:
    """De et al. 2024, section 2: two recurrent layers to one of local attention; Mamba replaces their recurrence."""
    return {
        "mixers": {"mamba": {"type": "mamba"}, "local": _local(width)},
        "layer_pattern": "mamba mamba local",
        "feed_forward": {"mlp": _mlp(width, hidden_act="gelu_pytorch_tanh")},
    }


def _qwen3_next_like(width: int) -> Fields:
    """Qwen team 2025: three linear layers to one of attention, experts everywhere; Mamba-2 replaces Gated DeltaNet."""
    shared = {"shared_expert_intermediate_size": width // 2, "shared_expert_gate": True}
    return {
        "mixers": {
            "mamba2": _mamba2(width),
            "attention": _attention(width, qk_norm="head", partial_rotary_factor=0.25),
        },
        "layer_pattern": "mamba2*3 attention",
        "feed_forward": {"moe": _moe(width, 32, 4, moe_intermediate_size=width // 2, **shared)},
    }


PRESETS: dict[str, Callable[[int], Fields]] = {
    "mixture": _mixture,
    "jamba": _jamba,
    "samba": _samba,
    "zamba2": _zamba2,
    "nemotron-h": _nemotron_h,
    "falcon-h1": _falcon_h1,
    "griffin-like": _griffin_like,
    "qwen3-next-like": _qwen3_next_like,
}

# default depths: one or two rounds of a pattern; 6 for the others
_DEPTHS = {"mixture": 6, "jamba": 8, "zamba2": 12, "nemotron-h": 11}


def preset_fields(name: str, hidden_size: int = 256, num_hidden_layers: int | None = None, **fields: Any) -> Fields:
    """The fields of `ArchHybridConfig` for a published pattern.

    Args:
        name: one of `PRESETS`.
        hidden_size: width; heads and feed-forwards keep the published proportions to it.
        num_hidden_layers: depth; None for one or two rounds of the pattern.
        fields: other fields of `ArchHybridConfig`, which replace the preset's.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; allowed are {', '.join(PRESETS)}")
    depth = num_hidden_layers or _DEPTHS.get(name, 6)
    return {"hidden_size": hidden_size, "num_hidden_layers": depth, **PRESETS[name](hidden_size), **fields}


def preset(name: str, hidden_size: int = 256, num_hidden_layers: int | None = None, **fields: Any) -> ArchHybridConfig:
    """A config of a published pattern. Arguments and errors as `preset_fields`."""
    return ArchHybridConfig(**preset_fields(name, hidden_size, num_hidden_layers, **fields))
