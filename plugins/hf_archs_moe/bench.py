"""Benchmarks of mixtures of experts: the experts against transformers' forms, the model against Mixtral."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_archs.native.conversion import from_native
from hf_archs.testing import measuring
from hf_archs_moe.expert_layer import ArchExperts
from hf_archs_moe.ops.experts import cases, expert_mlp


class _Experts(nn.Module):
    """The attributes that transformers' functions read of a module of experts."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False
    _is_expert_parallel = False
    _apply_gate = ArchExperts._apply_gate  # type: ignore[attr-defined]

    def __init__(self, up: torch.Tensor, down: torch.Tensor):
        super().__init__()
        self.__dict__.update(gate_up_proj=up, down_proj=down, num_experts=up.shape[0], act_fn=nn.SiLU())


def _transformers(name: str) -> Callable[..., torch.Tensor]:
    def run(x: Any, expert_index: Any, expert_weight: Any, up: Any, down: Any) -> torch.Tensor:
        return ALL_EXPERTS_FUNCTIONS[name](_Experts(up, down), x, expert_index, expert_weight)

    return run


def ops(device: torch.device) -> Iterator[measuring.Measure]:
    """The experts alone, in training and for a token."""
    if device.type == "cuda":
        shapes = [(16384, 2048, 1024, 64, 8), (16384, 4096, 14336, 8, 2), (64, 4096, 14336, 8, 2)]
    else:
        shapes = [(1024, 256, 512, 8, 2), (1, 256, 512, 8, 2)]
    sizes = [
        {"batch": 1, "length": tokens, "hidden": hidden, "inner": inner, "experts": experts, "k": k}
        for tokens, hidden, inner, experts, k in shapes
    ]
    arguments = ("x", "expert_index", "expert_weight", "up", "down")
    for label, tensors in measuring.sized("expert_mlp", cases, arguments, sizes, device):
        for peer in ("grouped_mm", "batched_mm") if len(tensors["x"]) < 100 else ("grouped_mm",):
            yield from measuring.op_measures(label, f"transformers' {peer}", expert_mlp, _transformers(peer), tensors)


def models(device: torch.device) -> Iterator[measuring.Measure]:
    """A whole training step, prefill and decoding against Mixtral with the same weights."""
    config = MixtralConfig(
        **measuring.SIZE,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2**15,
    )
    native = MixtralForCausalLM(config).to(device)  # type: ignore[arg-type]
    ours = from_native(native)
    yield from measuring.native_measures(
        "moe", device, ours, native, measuring.Targets(native_step=1.0, prefill=1.0, decode=1.0)
    )
