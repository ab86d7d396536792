"""A plugin as a third party wrote it for hf-archs 0.1; tests/core/test_a_plugin_of_0_1.py runs it.

It stays as it is: its imports and its call of `Architecture` are those of that version. Its mixer is an exponential
moving average behind a short convolution; the last layer is attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hf_archs.attention import AttentionConfig
from hf_archs.backbone import ArchBlock, ArchForCausalLM, ArchForMaskedLM, ArchModel, ArchPreTrainedModel
from hf_archs.configuration import ArchConfig, LayerPlan, MixerConfig, check_range
from hf_archs.convolution import CausalConv1d
from hf_archs.mlp import MLPConfig
from hf_archs.norm import ArchRMSNorm
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from hf_archs.cache import Slot, States
from hf_archs.kernels.numerics import wide
from hf_archs.registry import Architecture, StateSpec, register, register_mixer

TAPS = 3


@strict
@dataclass(kw_only=True)
class EMAMixerConfig(MixerConfig):
    """Fields of the average.

    Args:
        initial_decay: what is left of the average after one token.
    """

    initial_decay: float = 0.9

    def validate_ema(self) -> None:
        check_range(self, "initial_decay", 0.01, 0.99)


def ema_state(config: EMAMixerConfig) -> dict[str, StateSpec]:
    """The window of the convolution, and the average."""
    return {
        "conv": StateSpec("conv", (config.hidden_size, TAPS - 1)),
        "average": StateSpec("recurrent", (config.hidden_size,), torch.float32),
    }


class EMA(nn.Module):
    """The recurrence and its decays, which stay in float32."""

    def __init__(self, config: EMAMixerConfig):
        super().__init__()
        self.config = config
        self.logit = nn.Parameter(torch.empty(config.hidden_size))

    def init_weights(self) -> None:
        init.constant_(self.logit, torch.logit(torch.tensor(self.config.initial_decay)).item())

    def forward(
        self,
        x: torch.Tensor,  # (b, l, d)
        average: torch.Tensor | None,  # (b, d)
        lengths: torch.Tensor | None,
        seq_idx: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decay, x = torch.sigmoid(wide(self.logit)), wide(x)
        average = x.new_zeros(x.shape[0], x.shape[2]) if average is None else wide(average)
        averages = []
        for t in range(x.shape[1]):
            if seq_idx is not None and t > 0:
                average = torch.where((seq_idx[:, t] != seq_idx[:, t - 1])[:, None], 0, average)
            new = decay * average + (1 - decay) * x[:, t]
            average = new if lengths is None else torch.where((t < lengths)[:, None], new, average)
            averages.append(average)
        return torch.stack(averages, 1), average


class EMAMixer(nn.Module):
    """Projection, convolution, moving average, norm, projection."""

    def __init__(self, config: EMAMixerConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.conv1d = CausalConv1d(config.hidden_size, TAPS, bias=True)
        self.ssm = EMA(config)
        self.norm = ArchRMSNorm(config.hidden_size, config.norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: Slot | None = None,
        lengths: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        conv, average = (None, None) if state is None else (state.get("conv"), state.get("average"))
        u = self.in_proj(hidden_states)
        x, conv = self.conv1d(u, conv, lengths, seq_idx, None if state is None else state.once)
        y, average = self.ssm(x, average, lengths, seq_idx)
        if state is not None:
            state.update({"conv": conv, "average": average}, {"u": u, "x": x, "seq_idx": seq_idx}, self._replay)
        return self.out_proj(self.norm(y))

    def _replay(self, inputs: States, before: dict[str, torch.Tensor | None], lengths: torch.Tensor) -> States:
        seq_idx = inputs.get("seq_idx")
        _, conv = self.conv1d(inputs["u"], before["conv"], lengths, seq_idx)
        _, average = self.ssm(inputs["x"], before["average"], lengths, seq_idx)
        return {"conv": conv, "average": average}


@strict
class ArchEMAConfig(ArchConfig, EMAMixerConfig):
    """Averages below one layer of attention, each with a feed-forward."""

    model_type = "plugin_of_0_1_ema"
    mixer_type: ClassVar[str] = "plugin_of_0_1_ema"

    intermediate_size: int = 96

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        wide = MLPConfig(hidden_size=self.hidden_size, intermediate_size=self.intermediate_size)
        if layer_idx == self.num_hidden_layers - 1:
            attention = AttentionConfig(hidden_size=self.hidden_size, num_heads=2).belongs_to(self)
            return LayerPlan("attention", attention, "mlp", wide)
        return LayerPlan(self.mixer_type, self, "mlp", wide)


class ArchEMAPreTrainedModel(ArchPreTrainedModel):
    config_class = ArchEMAConfig
    _no_split_modules = [ArchBlock.__name__]


class ArchEMAModel(ArchModel):
    config_class = ArchEMAConfig


class ArchEMAForCausalLM(ArchForCausalLM, GenerationMixin):
    config_class = ArchEMAConfig
    _model_class = ArchEMAModel


class ArchEMAForMaskedLM(ArchForMaskedLM):
    config_class = ArchEMAConfig
    _model_class = ArchEMAModel


class ArchEMAForSequenceClassification(GenericForSequenceClassification, ArchEMAPreTrainedModel):
    pass


class ArchEMAForTokenClassification(GenericForTokenClassification, ArchEMAPreTrainedModel):
    pass


class ArchEMAForQuestionAnswering(GenericForQuestionAnswering, ArchEMAPreTrainedModel):
    pass


SIZES: dict[str, dict[str, Any]] = {"small": {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 4096}}

register_mixer("plugin_of_0_1_ema", EMAMixer, EMAMixerConfig, state=ema_state)
register(
    Architecture(
        name="ema",
        config_class=ArchEMAConfig,
        model_class=ArchEMAModel,
        causal_lm_class=ArchEMAForCausalLM,
        masked_lm_class=ArchEMAForMaskedLM,
        sequence_classification_class=ArchEMAForSequenceClassification,
        token_classification_class=ArchEMAForTokenClassification,
        question_answering_class=ArchEMAForQuestionAnswering,
        mixer_class=EMAMixer,
        lora_targets=("in_proj", "out_proj", "q_proj", "k_proj", "v_proj"),
        even_targets=("in_proj", "out_proj"),
        tiny={"intermediate_size": 96},
        sizes=SIZES,
    )
)
