"""Configs of the Mamba-2 mixer and of the architecture."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict

from hf_archs.config.model import ArchConfig
from hf_archs.parts import PartConfig, StateSpec, check_range


@strict
@dataclass(kw_only=True)
class Mamba2MixerConfig(PartConfig):
    """Fields of the state-space-duality mixer (Dao and Gu 2024, section 7).

    Args:
        state_size: width of keys and queries (B and C), N in the paper.
        expand: channels per hidden unit.
        inner_size: channels; None is ``expand * hidden_size``.
        head_dim: channels per head, P in the paper; it must divide the channels.
        n_groups: groups of heads that share B and C, and groups of the gated norm.
        conv_kernel: taps of the causal convolution.
        use_bias: bias in ``in_proj`` and ``out_proj``.
        use_conv_bias: bias in the convolution.
        time_step_min: smallest initial step.
        time_step_max: largest initial step.
        time_step_floor: lower bound of the initial steps.
        time_step_limit: range that steps are clamped to.
    """

    state_size: int = 128
    expand: int = 2
    inner_size: int | None = None
    head_dim: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] | list[float] = (0.0, float("inf"))

    def validate_mixer_sizes(self) -> None:
        """Refuse sizes that are out of range. Runs first, since the other checks divide by them."""
        super().validate_mixer_sizes()
        check_range(self, "head_dim", 1, 2**12)  # num_heads divides by it

    def validate_mamba2(self) -> None:
        """Refuse values that are out of range or do not fit together."""
        check_range(self, "state_size", 1, 2**12)
        check_range(self, "expand", 1, 64)
        if self.inner_size is not None:
            check_range(self, "inner_size", 1, 2**20)
        check_range(self, "conv_kernel", 2, 8)
        check_range(self, "time_step_max", 1e-9, 1e3)
        check_range(self, "time_step_min", 1e-9, self.time_step_max)
        check_range(self, "time_step_floor", 1e-9, 1e3)
        if self.channels % self.head_dim:
            raise ValueError(
                f"{type(self).__name__}: head_dim is {self.head_dim}; allowed are divisors of "
                f"{'expand * hidden_size' if self.inner_size is None else 'inner_size'} = {self.channels}"
            )
        if self.n_groups < 1 or self.num_heads % self.n_groups:
            raise ValueError(
                f"{type(self).__name__}: n_groups is {self.n_groups}; allowed are divisors of the "
                f"{self.num_heads} heads"
            )
        if len(self.time_step_limit) != 2 or not 0 <= self.time_step_limit[0] <= self.time_step_limit[1]:
            raise ValueError(
                f"{type(self).__name__}: time_step_limit is {self.time_step_limit}; allowed is a pair 0 <= low <= high"
            )

    @property
    def channels(self) -> int:
        """Channels of the recurrence: ``inner_size``, by default ``expand * hidden_size``."""
        return self.inner_size or self.expand * self.hidden_size

    @property
    def num_heads(self) -> int:
        """Heads of the recurrence; each has one decay."""
        return self.channels // self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.channels + 2 * self.n_groups * self.state_size


def mamba2_state(config: Mamba2MixerConfig) -> dict[str, StateSpec]:
    """The states: ``conv``, the convolution's window, and ``ssm``, that of the recurrence, in float32."""
    return {
        "conv": StateSpec("conv", (config.conv_size, config.conv_kernel - 1)),
        "ssm": StateSpec("recurrent", (config.num_heads, config.head_dim, config.state_size), torch.float32),
    }


@strict
class ArchMamba2Config(ArchConfig, Mamba2MixerConfig):
    """Config of a pure stack of Mamba-2 mixers: the fields of `ArchConfig` and of `Mamba2MixerConfig`."""

    model_type = "hf_archs_mamba2"
    mixer_type: ClassVar[str] = "mamba2"
