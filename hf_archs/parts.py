"""The ground that every part of a model stands on: its config, its states, and the protocols between it and the core.

A part is a token mixer or a feed-forward. Letters in shapes: b batch, l length, d hidden size, e experts.
"""

# no `annotations` of the future here: `strict` reads the types of PartConfig
import importlib.metadata
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from hf_archs.cache import Slot

VERSION = importlib.metadata.version("hf-archs")


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a mixer's state.

    Attributes:
        kind: ``"conv"`` (a window of past inputs) or ``"recurrent"``: where transformers' cache keeps it.
        shape: without the batch dimension. The last dimension may be None: time, for a mixer that needs all it has
            read. Such a state grows with every token; its last column is the row's latest token, and zeros in the
            first columns are tokens that never were (a static cache begins with nothing else).
        dtype: None for the dtype of the activations.
        together: whether the values of a column of a growing state lie together in a static cache, for mixers that read
            column by column, and not those of a row.
    """

    kind: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype | None = None
    together: bool = False

    @property
    def grows(self) -> bool:
        """Whether the state holds something of every token."""
        return self.shape[-1:] == (None,)


def check_range(config: object, field: str, low: float, high: float) -> None:
    """Raise a `ValueError` that names field, value and what is allowed, unless ``low <= value <= high``."""
    value = getattr(config, field)
    if not low <= value <= high:
        raise ValueError(f"{type(config).__name__}: {field} is {value}; allowed are {low} to {high}")


@strict
@dataclass(kw_only=True)
class PartConfig:
    """The fields of every token mixer and feed-forward; each kind adds its own in a subclass.

    The config of a pure stack inherits from the config of its mixer and is handed to the mixer as it is; in a hybrid
    every named instance has a config of its own.
    """

    hidden_size: int = 768
    norm_eps: float = 1e-5

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `from __future__ import annotations` makes strings of types, and `strict` checks no value against a string
        cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)

    @property
    def model_config(self) -> Any:
        """The config of the model that this one belongs to: itself, unless it is one of several named instances.

        transformers keeps there which implementation of attention and of experts runs.
        """
        return self.__dict__.get("_model_config", self)

    def belongs_to(self, model_config: Any) -> Self:
        """This config, as an instance in the model of ``model_config``."""
        self.__dict__["_model_config"] = model_config
        return self

    @property
    def num_heads(self) -> int:
        """One, unless the mixer has heads. (Prompt tuning asks every config for them.)"""
        return 1

    def _allow(self, allowed: bool, field: str, what: str) -> None:
        """Raise a `ValueError` that names field, value and what is allowed, unless ``allowed``."""
        if not allowed:
            raise ValueError(f"{type(self).__name__}: {field} is {getattr(self, field)!r}; allowed {what}")

    def validate_mixer_sizes(self) -> None:
        """Check the fields of every part. Raises a `ValueError` that names the field, its value and the range."""
        check_range(self, "hidden_size", 1, 2**17)
        check_range(self, "norm_eps", 0.0, 1.0)


class TokenMixer(Protocol):
    """A token mixer as a block calls it, and `hf_archs.registry.register_mixer` takes it: built as ``cls(config)``.

    It is an `nn.Module`. Parameters of the recurrence (states, decays, step biases, Hyena's filters) stand in a
    submodule ``ssm``, a name that checkpoints, adapters and quantisers know; they stay in float32.
    """

    def forward(
        self,
        hidden_states: Tensor,
        state: "Slot | None" = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of every row, each with those before it in its document.

        Args:
            hidden_states: (b, l, d), in every row the real tokens first.
            state: the states that the mixer continues and leaves behind; None without a cache.
            lengths: (b,) real tokens in each row; None where all are.
            seq_idx: (b, l) the document of each token; None where a row is one.

        Returns:
            (b, l, d) in the dtype of ``hidden_states``; rows behind ``lengths`` mean nothing.
        """


@runtime_checkable
class SelfInitialized(Protocol):
    """A module that draws its own parameters, by `transformers.initialization`, which never overwrites loaded ones."""

    def init_weights(self) -> None:
        """Give every parameter and buffer of this module alone its first value."""


@runtime_checkable
class BringsCallbacks(Protocol):
    """A layer that must act between the steps of a training, as a router does to balance its load."""

    def trainer_callbacks(self) -> "list[TrainerCallback]":
        """Callbacks for a `Trainer`. One of each class is taken, and serves all layers of the model."""


class RoutedFeedForward(nn.Module):
    """Base of the feed-forwards with a router.

    Attributes:
        config: its config; layers with one config object make their losses together.
        gate: the router, called once in a forward. What it has counted in training stands in its buffer
            ``training_statistics``.
    """

    config: Any
    gate: nn.Module

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, count: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute every token by the experts that its router gives it.

        Args:
            hidden_states: (b, l, d).
            mask: (b, l) bool, the real tokens; None where all are.
            count: whether the statistics are asked for.

        Returns:
            (b, l, d) in the dtype of ``hidden_states``; the router's statistics in one vector, which adds up over
            forwards and ranks; and its logits, (b * l, e).
        """
        raise NotImplementedError

    def balance_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """The loss that balances the load in all layers with this config, zero-dimensional.

        Args:
            statistics: those that `forward` of each of these layers gave, counted.
        """
        raise NotImplementedError

    def auxiliary_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """All that these layers add to the loss, coefficients included; zero-dimensional.

        Args:
            statistics: as those of `balance_loss`.
        """
        raise NotImplementedError

    def figures(self, statistics: Tensor) -> dict[str, Tensor]:
        """Figures of this layer's router for people to look at, from its statistics."""
        raise NotImplementedError

    def active_fraction(self) -> float:
        """The share of the experts' weights that a token uses."""
        return 1.0

    def check_generation(self) -> None:
        """Raise a `ValueError` where the output of a token depends on later tokens."""

    def trainer_callbacks(self) -> "list[TrainerCallback]":
        """Callbacks that the router needs in training; see `BringsCallbacks`."""
        return []
