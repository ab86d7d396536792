"""Benchmarks of hybrids: the small mixture against Llama, and Jamba against transformers'."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import JambaConfig, JambaForCausalLM

from hf_archs.native.conversion import from_native
from hf_archs.testing import measuring
from hf_archs_hybrid.presets import PRESETS


def ops(device: torch.device) -> Iterator[measuring.Measure]:
    """None of its own."""
    yield from ()


def models(device: torch.device) -> Iterator[measuring.Measure]:
    """The whole models. (transformers' Jamba scans token by token; one training step of it is enough.)"""
    yield from measuring.model_measures(
        "hybrid", device, PRESETS["mixture"](measuring.SIZE["hidden_size"]), measuring.Targets()
    )
    fields: dict[str, Any] = {
        **measuring.SIZE,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
    }
    native: Any = JambaForCausalLM(JambaConfig(**fields))
    yield from measuring.native_measures("hybrid, jamba", device, from_native(native), native, measuring.Targets(), 1)
