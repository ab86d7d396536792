"""Configs of the Hyena mixer and of the architecture."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict

from hf_archs.config.model import ArchConfig, LayerPlan
from hf_archs.layers.mlp import MLPConfig
from hf_archs.parts import PartConfig, StateSpec, check_range

FilterType = Literal["implicit", "modal", "medium", "short"]
MAX_TAPS = 128


@strict
@dataclass(kw_only=True)
class HyenaFields(PartConfig):
    """What every Hyena mixer is told, whatever its filters (Poli et al. 2023, sections 3 and 4).

    Args:
        order: multiplications by a gate, N in the paper; N - 1 convolutions stand between them.
        conv_kernel: taps of the short convolution after ``in_proj``.
        use_bias: bias in ``in_proj`` and ``out_proj``, and in the feed-forward.
        max_positions: the lag at which implicit filters end; texts may be longer.
        position_bands: frequencies of sine and cosine that an implicit filter knows its lag by.
        learned_positions: make those features of the lag parameters, as HyenaDNA's checkpoints have them.
        filter_size: width of the network that gives an implicit filter its taps.
        filter_layers: hidden layers of that network after the first.
        filter_frequency: frequency of its sine activations, at first.
        learned_frequency: make that frequency a parameter, of every unit its own.
        filter_shift: what the window of an implicit filter falls to, instead of 0.
        fast_decay: part of ``max_positions`` after which the window of the fastest channel has fallen to a hundredth.
        slow_decay: the same of the slowest channel.
        modes: pairs of complex poles of a modal filter.
        medium_taps: taps of a medium filter.
        short_taps: taps of a short filter.
        filter_group_size: channels that share a medium or short filter.
    """

    order: int = 2
    conv_kernel: int = 3
    use_bias: bool = True
    max_positions: int = 32768
    position_bands: int = 2
    learned_positions: bool = False
    filter_size: int = 64
    filter_layers: int = 2
    filter_frequency: float = 10.0
    learned_frequency: bool = True
    filter_shift: float = 0.05
    fast_decay: float = 0.3
    slow_decay: float = 1.5
    modes: int = 16
    medium_taps: int = 128
    short_taps: int = 7
    filter_group_size: int = 1

    def validate_hyena(self) -> None:
        """Refuse values that are out of range or do not fit together."""
        check_range(self, "order", 2, 16)
        check_range(self, "conv_kernel", 2, 8)
        check_range(self, "max_positions", 2, 2**24)
        check_range(self, "position_bands", 1, 64)
        check_range(self, "filter_size", 1, 2**12)
        check_range(self, "filter_layers", 0, 16)
        check_range(self, "filter_frequency", 1e-6, 1e6)
        check_range(self, "filter_shift", 0.0, 1e3)
        check_range(self, "slow_decay", 1e-6, 1e6)
        check_range(self, "fast_decay", 1e-6, self.slow_decay)
        check_range(self, "modes", 1, 2**10)
        check_range(self, "medium_taps", 1, MAX_TAPS)
        check_range(self, "short_taps", 1, MAX_TAPS)
        if self.filter_group_size < 1 or self.hidden_size % self.filter_group_size:
            raise ValueError(
                f"{type(self).__name__}: filter_group_size is {self.filter_group_size}; allowed are divisors of "
                f"hidden_size = {self.hidden_size}"
            )

    @property
    def filter_channels(self) -> int:
        """Channels of all convolutions between the gates."""
        return (self.order - 1) * self.hidden_size


@strict
@dataclass(kw_only=True)
class HyenaMixerConfig(HyenaFields):
    """Fields of one Hyena mixer.

    Args:
        filter_type: ``implicit`` (a network gives the taps), ``modal`` (a sum of decaying waves, whose state is
            constant; Massaroli et al. 2023), ``medium`` (explicit taps under a decaying window) or ``short`` (explicit
            taps; Ku et al. 2025, section 2).
    """

    filter_type: FilterType = "implicit"


def hyena_state(config: HyenaMixerConfig) -> dict[str, StateSpec]:
    """The window of the short convolution, and what the filters need of the past.

    That is all of it for an implicit filter, a window for explicit ones, and one complex number for each mode.
    """
    channels = config.filter_channels
    specs = {"conv": StateSpec("conv", ((config.order + 1) * config.hidden_size, config.conv_kernel - 1))}
    if config.filter_type == "implicit":
        specs["past"] = StateSpec("recurrent", (channels, None))
    elif config.filter_type == "modal":
        specs["past"] = StateSpec("recurrent", (channels, config.modes, 2), torch.float32)
    else:
        taps = config.short_taps if config.filter_type == "short" else config.medium_taps
        specs["past"] = StateSpec("conv", (channels, taps - 1))
    return specs


@strict
class ArchHyenaConfig(ArchConfig, HyenaFields, MLPConfig):
    """Config of a stack of Hyena mixers and feed-forwards, as in HyenaDNA (Nguyen et al. 2023).

    Args:
        filter_types: the filters of the layers, repeated; see `HyenaMixerConfig`.
        intermediate_size: width of the feed-forward's hidden layer, None for four times ``hidden_size``.
        hidden_act: activation of the feed-forward.
        gated: multiply that activation by a second projection.
        bias: whether the linear layers of the feed-forward have one.
    """

    model_type = "hf_archs_hyena"
    mixer_type: ClassVar[str] = "hyena"
    norm_type: Literal["rms_norm", "layer_norm"] = "layer_norm"
    filter_types: tuple[FilterType, ...] | list[FilterType] = ("implicit",)
    intermediate_size: int | None = None  # type: ignore[assignment]  # a whole number as soon as there is a config
    hidden_act: Literal["gelu_pytorch_tanh", "gelu", "silu"] = "gelu_pytorch_tanh"  # type: ignore[assignment]
    gated: bool = False
    bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_mixer_sizes()
        self._mixers: dict[str, HyenaMixerConfig] = {}
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if isinstance(self.filter_types, tuple):
            self.filter_types = list(self.filter_types)  # as it comes out of a file
        if not self.filter_types:
            raise ValueError(f"{type(self).__name__}: filter_types is {self.filter_types}; allowed are one or more")
        super().__post_init__(**kwargs)

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """A mixer with this layer's kind of filter, and a feed-forward."""
        kind = self.filter_types[layer_idx % len(self.filter_types)]
        if not torch.compiler.is_compiling():  # a compiled forward makes caches, but cannot make configs
            shared = {field.name: getattr(self, field.name) for field in fields(HyenaFields)}
            mixer = HyenaMixerConfig(**shared, filter_type=kind)
            if self._mixers.get(kind) != mixer:  # graphs are guarded by its identity
                self._mixers[kind] = mixer
        return LayerPlan(self.mixer_type, self._mixers[kind], "mlp", self)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the mixers' configs that were made from the fields."""
        output = super().to_dict()
        del output["_mixers"]
        return output
