"""An exponential moving average as a token mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from hf_archs.cache import Slot, States
from hf_archs.config.model import ArchConfig, LayerPlan
from hf_archs.layers.mlp import MLPConfig
from hf_archs.parts import PartConfig, StateSpec, check_range


@strict
@dataclass(kw_only=True)
class AverageConfig(PartConfig):
    """Fields of the average."""

    initial_decay: float = 0.9

    def validate_average(self) -> None:
        check_range(self, "initial_decay", 0.01, 0.99)


def average_state(config: AverageConfig) -> dict[str, StateSpec]:
    return {"average": StateSpec("recurrent", (config.hidden_size,), torch.float32)}


class Decay(nn.Module):
    """The recurrence."""

    def __init__(self, config: AverageConfig):
        super().__init__()
        self.config = config
        self.logit = nn.Parameter(torch.empty(config.hidden_size))

    def init_weights(self) -> None:
        init.constant_(self.logit, torch.logit(torch.tensor(self.config.initial_decay)).item())

    def forward(
        self, x: Tensor, state: Tensor | None, lengths: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = torch.sigmoid(self.logit.to(wide))
        average = x.new_zeros(x.shape[0], x.shape[2], dtype=wide) if state is None else state.to(wide)
        averages = []
        for t in range(x.shape[1]):
            if seq_idx is not None and t > 0:
                real = True if lengths is None else t < lengths
                begins = (seq_idx[:, t] != seq_idx[:, t - 1]) & real
                average = torch.where(begins[:, None], 0, average)
            new = decay * average + x[:, t].to(wide)
            average = new if lengths is None else torch.where((t < lengths)[:, None], new, average)
            averages.append(average)
        return torch.stack(averages, 1).to(x.dtype), average


class Average(nn.Module):
    """Projection, average, projection."""

    def __init__(self, config: AverageConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.ssm = Decay(config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        state: Slot | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        before = None if state is None else state.get("average")
        x = torch.tanh(self.in_proj(hidden_states))
        y, after = self.ssm(x, before, lengths, seq_idx)
        if state is not None:
            state.update({"average": after}, {"x": x, "seq_idx": seq_idx}, self._replay)
        return self.out_proj(y)

    def _replay(self, inputs: States, before: dict[str, Tensor | None], lengths: Tensor) -> States:
        return {"average": self.ssm(inputs["x"], before["average"], lengths, inputs.get("seq_idx"))[1]}


@strict
class ArchToyConfig(ArchConfig, AverageConfig):
    """Config of a stack of averages, each with the core's feed-forward."""

    model_type = "toy_by_a_third_party"
    mixer_type: ClassVar[str] = "toy_average"

    intermediate_size: int = 96

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        wide = MLPConfig(hidden_size=self.hidden_size, intermediate_size=self.intermediate_size)
        return LayerPlan(self.mixer_type, self, "mlp", wide)
