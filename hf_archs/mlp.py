"""The gated feed-forward, registered as ``mlp``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn

from hf_archs.configuration import MixerConfig, check_range
from hf_archs.registry import register_feed_forward


@strict
@dataclass(kw_only=True)
class MLPConfig(MixerConfig):
    """Args: intermediate_size: width of the hidden layer; bias: whether the linear layers have one."""

    intermediate_size: int = 2048
    bias: bool = False

    def validate_intermediate_size(self) -> None:
        check_range(self, "intermediate_size", 1, 2**20)


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, SwiGLU)."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


register_feed_forward("mlp", GatedMLP, MLPConfig)
