"""Configs of the retention mixer and of the RetNet architecture."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict

from hf_archs.config.model import ArchConfig, LayerPlan
from hf_archs.layers.mlp import MLPConfig
from hf_archs.parts import PartConfig, StateSpec, check_range


@strict
@dataclass(kw_only=True)
class RetNetMixerConfig(PartConfig):
    """Fields of multi-scale retention (Sun et al. 2023, section 2.3).

    Args:
        num_heads: heads of the retention; each has its own constant decay.
        expand_k: key channels of all heads, per hidden unit.
        expand_v: value channels of all heads, per hidden unit.
        gate_fn: activation of the output gate.
        rotary: rotation of queries and keys. ``half`` (flash-linear-attention): channels c and c + n/2 of a head of n
            are a pair, which turns by ``10000 ** (-2c / n)`` per token. ``interleaved`` (the authors' torchscale):
            channels 2c and 2c + 1 are a pair, and the exponents are spaced evenly from 0 to 1, both included.
        projection_bias: whether the projections have biases.
        head_norm: the norm of each head, ``rms_norm``, or ``layer_norm``, which also subtracts the head's mean.
        head_norm_eps: eps of this norm; None for ``norm_eps``.
        elementwise_affine: whether the norm of each head has a weight.
        normalize_decay: divide the scores of token t by the square root of the sum of its decays, ``(1 - gamma^t) /
            (1 - gamma)``, as torchscale does (section 2.4, the second factor). The norm of each head cancels this
            factor, except for its eps, which then weighs more in the first tokens of a document.
    """

    num_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    gate_fn: Literal["swish", "gelu"] = "swish"
    rotary: Literal["half", "interleaved"] = "half"
    projection_bias: bool = False
    head_norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    head_norm_eps: float | None = None
    elementwise_affine: bool = True
    normalize_decay: bool = False

    def validate_retnet(self) -> None:
        """Refuse values that are out of range or do not fit together."""
        check_range(self, "num_heads", 1, 2**10)
        if self.head_norm_eps is not None:
            check_range(self, "head_norm_eps", 0.0, 1.0)
        for field, unit in (("expand_k", 2 * self.num_heads), ("expand_v", self.num_heads)):
            check_range(self, field, 2.0**-17, 64.0)
            size = self.hidden_size * getattr(self, field)
            if not math.isclose(size, round(size)) or round(size) < unit or round(size) % unit:
                pairs = "pairs of channels in each head" if field == "expand_k" else "channels in each head"
                raise ValueError(
                    f"{type(self).__name__}: {field} is {getattr(self, field)}; allowed is what gives a whole number "
                    f"of {pairs}, that is hidden_size * {field} = {size:g} must be a multiple of {unit} "
                    f"(num_heads is {self.num_heads})"
                )

    @property
    def key_size(self) -> int:
        """Key channels of all heads."""
        return round(self.hidden_size * self.expand_k)

    @property
    def value_size(self) -> int:
        """Value channels of all heads."""
        return round(self.hidden_size * self.expand_v)


def retnet_state(config: RetNetMixerConfig) -> dict[str, StateSpec]:
    """The states: ``retention`` in float32, and ``position``, the number of past tokens, for the next rotation.

    The kind of ``position`` is ``conv``, since transformers expects a state of each kind.
    """
    heads = config.num_heads
    return {
        "retention": StateSpec(
            "recurrent", (heads, config.value_size // heads, config.key_size // heads), torch.float32
        ),
        "position": StateSpec("conv", (1,), torch.int64),
    }


@strict
class ArchRetNetConfig(ArchConfig, RetNetMixerConfig, MLPConfig):
    """Config of a stack of retention and feed-forward: the fields of `ArchConfig`, of `RetNetMixerConfig`, and these.

    Args:
        intermediate_size: width of the feed-forward's hidden layer; None for two thirds of ``hidden_ratio *
            hidden_size``, rounded up to a multiple of 256, as in flash-linear-attention.
        hidden_ratio: see ``intermediate_size``.
        hidden_act: activation of the feed-forward.
        gated: multiply the activation by a second projection (SwiGLU and the like); the paper's is not gated.
        bias: whether the feed-forward's linear layers have a bias.
        inner_norm: LayerNorm of the feed-forward's hidden layer (Wang et al. 2022, "Foundation Transformers", section
            2.1: Sub-LN); only if it is not gated.
    """

    model_type = "hf_archs_retnet"
    mixer_type: ClassVar[str] = "retnet"

    intermediate_size: int | None = None  # type: ignore[assignment]  # an int after __post_init__
    hidden_ratio: float = 2.0
    hidden_act: Literal["swish", "gelu", "relu"] = "swish"  # type: ignore[assignment]
    inner_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_mixer_sizes()
        self.validate_feed_forward()
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256) * 256
        super().__post_init__(**kwargs)

    def validate_feed_forward(self) -> None:
        """Refuse values that are out of range or do not fit together."""
        check_range(self, "hidden_ratio", 1e-3, 1024.0)
        self._allow(not (self.inner_norm and self.gated), "inner_norm", "is False where gated is True")

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """Retention and a feed-forward in every layer; ``inner_norm`` selects the feed-forward with a norm inside."""
        return LayerPlan(self.mixer_type, self, "sub_ln_mlp" if self.inner_norm else "mlp", self)
