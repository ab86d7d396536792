"""Configs of the Mamba mixer and of the architecture."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict

from hf_archs.config.model import ArchConfig
from hf_archs.parts import PartConfig, StateSpec, check_range


@strict
@dataclass(kw_only=True)
class MambaMixerConfig(PartConfig):
    """Fields of the selective state-space mixer (Gu and Dao 2023, section 3).

    Args:
        state_size: states per channel, N in the paper.
        expand: channels per hidden unit, E in the paper.
        inner_size: channels; None is ``expand * hidden_size``.
        conv_kernel: taps of the causal convolution.
        use_bias: bias in ``in_proj`` and ``out_proj``.
        use_conv_bias: bias in the convolution.
        time_step_rank: rank of the projection to the steps; None is ``hidden_size / 16``, rounded up.
        time_step_scale: scale of the initial ``dt_proj``.
        time_step_init_scheme: initial ``dt_proj``: uniform (``random``) or ``constant``.
        time_step_min: smallest initial step.
        time_step_max: largest initial step.
        time_step_floor: lower bound of the initial steps.
        bcdt_norm: RMS norm of B, C and the input of the steps: ``plain`` without weights (FalconMamba) or ``affine``
            with learned weights (Jamba).
        bcdt_norm_eps: eps of this norm.
    """

    state_size: int = 16
    expand: int = 2
    inner_size: int | None = None
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_rank: int | None = None
    time_step_scale: float = 1.0
    time_step_init_scheme: Literal["random", "constant"] = "random"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    bcdt_norm: Literal["none", "plain", "affine"] = "none"
    bcdt_norm_eps: float = 1e-6

    def validate_mamba(self) -> None:
        """Refuse values that are out of range or do not fit together."""
        check_range(self, "state_size", 1, 2**12)
        check_range(self, "expand", 1, 64)
        if self.inner_size is not None:
            check_range(self, "inner_size", 1, 2**20)
        check_range(self, "conv_kernel", 2, 8)
        if self.time_step_rank is not None:
            check_range(self, "time_step_rank", 1, 2**17)
        check_range(self, "time_step_scale", 0.0, 1e3)
        check_range(self, "time_step_max", 1e-9, 1e3)
        check_range(self, "time_step_min", 1e-9, self.time_step_max)
        check_range(self, "time_step_floor", 1e-9, 1e3)
        check_range(self, "bcdt_norm_eps", 0.0, 1.0)

    @property
    def channels(self) -> int:
        """Channels of the recurrence: ``inner_size``, by default ``expand * hidden_size``."""
        return self.inner_size or self.expand * self.hidden_size

    @property
    def dt_rank(self) -> int:
        """Rank of the projection to the steps: ``time_step_rank`` or its default."""
        return self.time_step_rank or math.ceil(self.hidden_size / 16)


def mamba_state(config: MambaMixerConfig) -> dict[str, StateSpec]:
    """The states: ``conv``, the convolution's window, and ``ssm``, that of the recurrence, in float32."""
    return {
        "conv": StateSpec("conv", (config.channels, config.conv_kernel - 1)),
        "ssm": StateSpec("recurrent", (config.channels, config.state_size), torch.float32),
    }


@strict
class ArchMambaConfig(ArchConfig, MambaMixerConfig):
    """Config of a pure stack of Mamba mixers: the fields of `ArchConfig` and of `MambaMixerConfig`."""

    model_type = "hf_archs_mamba"
    mixer_type: ClassVar[str] = "mamba"
