"""The feed-forward with one hidden layer, registered as ``mlp``."""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.activations import ACT2FN

from hf_archs.parts import PartConfig, check_range
from hf_archs.registry import register_feed_forward


@strict
@dataclass(kw_only=True)
class MLPConfig(PartConfig):
    """Fields of the feed-forward.

    Args:
        intermediate_size: width of the hidden layer.
        hidden_act: name of the activation in transformers.
        gated: whether the activation is multiplied by a second projection (GLU variants, Shazeer 2020).
        bias: whether the linear layers have a bias.
    """

    intermediate_size: int = 2048
    hidden_act: str = "silu"
    gated: bool = True
    bias: bool = False

    def validate_mlp(self) -> None:
        """Raise a `ValueError` for a width out of range, or an activation unknown to transformers."""
        check_range(self, "intermediate_size", 1, 2**20)
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"{type(self).__name__}: hidden_act is {self.hidden_act!r}; allowed are {', '.join(sorted(ACT2FN))}"
            )


class MLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if it is not gated."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.gate_proj = None
        if config.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(..., d)`` to the same."""
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(hidden_states)))
        return self.down_proj(self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def mlp_tp_plan(config: MLPConfig) -> dict[str, str]:
    """Tensor-parallel styles of the linear layers (Shoeybi et al. 2019, section 3)."""
    wide = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
    return {**dict.fromkeys(wide, "colwise"), "down_proj": "rowwise"}


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

register_feed_forward(
    "mlp", MLP, MLPConfig, tp_plan=mlp_tp_plan, lora_targets=PROJECTIONS, tiny={"intermediate_size": 96}
)
