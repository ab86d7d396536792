"""The feed-forward of torchscale's first RetNet, registered as ``sub_ln_mlp``."""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict

from hf_archs.layers.mlp import MLP, MLPConfig
from hf_archs.layers.norm import ArchLayerNorm


@strict
@dataclass(kw_only=True)
class SubLNMLPConfig(MLPConfig):
    """Fields of `hf_archs.layers.mlp.MLPConfig`; ``gated`` must be False."""

    gated: bool = False

    def validate_sub_ln(self) -> None:
        """Refuse a gated feed-forward."""
        self._allow(not self.gated, "gated", "is False")


class SubLNMLP(MLP):
    """``down(norm(act(up(x))))`` with a LayerNorm (Wang et al. 2022, "Foundation Transformers", section 2.1)."""

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        self.norm = ArchLayerNorm(config.intermediate_size, config.norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map ``(..., d)`` to ``(..., d)``."""
        return self.down_proj(self.norm(self.act(self.up_proj(hidden_states))))


def sub_ln_tp_plan(config: MLPConfig) -> dict[str, str]:
    """Tensor-parallel plan: outputs are gathered, since the norm needs the whole hidden layer."""
    return dict.fromkeys(("up_proj", "down_proj"), "colwise_gather_output")
