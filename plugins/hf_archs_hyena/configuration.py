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
    """Fields of every Hyena mixer, for all filter types (Poli et al. 2023, sections 3 and 4).

    Args:
        order: number of gates, N in the paper; N - 1 long convolutions alternate with them.
        conv_kernel: taps of the short convolution after ``in_proj``.
        use_bias: bias in ``in_proj`` and ``out_proj``, and in the feed-forward.
        max_positions: taps of an implicit filter; inputs may be longer.
        position_bands: frequencies of sine and cosine in the features of a lag, the input of an implicit filter.
        learned_positions: make these features parameters, as in HyenaDNA's checkpoints.
        filter_size: width of the network that computes an implicit filter's taps.
        filter_layers: hidden layers of this network after the first.
        filter_frequency: initial frequency of its sine activations.
        learned_frequency: make the frequency a parameter, one per unit.
        filter_shift: added to the window of an implicit filter, as its lower bound.
        fast_decay: fraction of the taps of an implicit or medium filter after which the fastest channel's window has
            fallen to 0.01.
        slow_decay: the same for the slowest channel.
        modes: modes (pairs of complex poles) of a modal filter.
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
        filter_type: ``implicit`` (a network computes the taps), ``modal`` (a sum of decaying waves, with a state of
            constant size; Massaroli et al. 2023), ``medium`` (explicit taps under a decaying window) or ``short``
            (explicit taps; Ku et al. 2025, section 2).
    """

    filter_type: FilterType = "implicit"


def hyena_state(config: HyenaMixerConfig) -> dict[str, StateSpec]:
    """The states ``conv``, the window of the short convolution, and ``past``, that of the filters.

    ``past`` holds all past inputs of an implicit filter, a window of them for an explicit filter, and one complex
    number per mode of a modal filter.
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
        filter_types: the filter types of the layers, in turn; see `HyenaMixerConfig`.
        intermediate_size: width of the feed-forward's hidden layer, None for four times ``hidden_size``.
        hidden_act: activation of the feed-forward.
        gated: multiply the activation by a second projection.
        bias: whether the feed-forward's linear layers have a bias.
    """

    model_type = "hf_archs_hyena"
    mixer_type: ClassVar[str] = "hyena"
    norm_type: Literal["rms_norm", "layer_norm"] = "layer_norm"
    filter_types: tuple[FilterType, ...] | list[FilterType] = ("implicit",)
    intermediate_size: int | None = None  # type: ignore[assignment]  # an int after __post_init__
    hidden_act: Literal["gelu_pytorch_tanh", "gelu", "silu"] = "gelu_pytorch_tanh"  # type: ignore[assignment]
    gated: bool = False
    bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_mixer_sizes()
        self._mixers: dict[str, HyenaMixerConfig] = {}
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if isinstance(self.filter_types, tuple):
            self.filter_types = list(self.filter_types)  # JSON has no tuples
        if not self.filter_types:
            raise ValueError(f"{type(self).__name__}: filter_types is {self.filter_types}; allowed are one or more")
        super().__post_init__(**kwargs)

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """A mixer with this layer's filter type, and a feed-forward."""
        kind = self.filter_types[layer_idx % len(self.filter_types)]
        if not torch.compiler.is_compiling():  # which cannot construct a config when a forward makes a cache
            shared = {field.name: getattr(self, field.name) for field in fields(HyenaFields)}
            mixer = HyenaMixerConfig(**shared, filter_type=kind)
            if self._mixers.get(kind) != mixer:  # torch.compile guards on the config's identity: keep an equal one
                self._mixers[kind] = mixer
        return LayerPlan(self.mixer_type, self._mixers[kind], "mlp", self)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the mixers' configs, which the fields determine."""
        output = super().to_dict()
        del output["_mixers"]
        return output
