"""Base classes and protocols of the parts of a model: configs, states, and the calls between parts and the core.

A part is a token mixer or a feed-forward. Letters in shapes: b batch, l length, d hidden size, e experts.
"""

# no `from __future__ import annotations`: `strict` reads the types of PartConfig
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
        kind: ``"conv"`` (a window of past inputs) or ``"recurrent"``, as in transformers' cache.
        shape: the shape without the batch dimension. A last dimension of None makes a growing state, with a column for
            every token read. The last column is the row's latest token. Leading columns may be zeros without a token,
            as in the empty buffer of a static cache.
        dtype: None for the dtype of the activations.
        together: memory layout of a growing state in a static cache. True: the channels of one token are adjacent.
            False: the tokens of one channel are.
    """

    kind: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype | None = None
    together: bool = False

    @property
    def grows(self) -> bool:
        """Whether the state has a column for every token."""
        return self.shape[-1:] == (None,)


def check_range(config: object, field: str, low: float, high: float) -> None:
    """Raise a `ValueError` that names field, value and range, unless ``low <= value <= high``."""
    value = getattr(config, field)
    if not low <= value <= high:
        raise ValueError(f"{type(config).__name__}: {field} is {value}; allowed are {low} to {high}")


@strict
@dataclass(kw_only=True)
class PartConfig:
    """The fields of every token mixer and feed-forward; subclasses add their own.

    The config of a pure stack inherits from the config of its mixer, and is passed to the mixer. In a hybrid every
    named instance has a config of its own.
    """

    hidden_size: int = 768
    norm_eps: float = 1e-5

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `strict` checks no values against the strings that `from __future__ import annotations` makes of types
        cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)

    @property
    def model_config(self) -> Any:
        """The config of the model: for a named instance the config that owns it, else this config itself.

        transformers sets the implementations of attention and experts in it.
        """
        return vars(self).get("_model_config", self)

    def belongs_to(self, model_config: Any) -> Self:
        """Make this the config of a named instance in the model of ``model_config``; returns itself."""
        self._model_config = model_config
        return self

    @property
    def num_heads(self) -> int:
        """1, unless the mixer has heads. (Prompt tuning reads it from every config.)"""
        return 1

    def _allow(self, allowed: bool, field: str, what: str) -> None:
        """Raise a `ValueError` that names field, value and allowed values, unless ``allowed``."""
        if not allowed:
            raise ValueError(f"{type(self).__name__}: {field} is {getattr(self, field)!r}; allowed {what}")

    def validate_mixer_sizes(self) -> None:
        """Check the fields of every part; raises a `ValueError` as `check_range`."""
        check_range(self, "hidden_size", 1, 2**17)
        check_range(self, "norm_eps", 0.0, 1.0)


class TokenMixer(Protocol):
    """The interface of token mixers: an `nn.Module`, constructed as ``cls(config)``.

    Parameters of the recurrence (states, decays, step biases, Hyena's filters) are in a submodule ``ssm``, a name that
    checkpoints, adapters and quantisers know; they stay in float32.
    """

    def forward(
        self,
        hidden_states: Tensor,
        state: "Slot | None" = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        """Mix each token with the earlier tokens of its document.

        Args:
            hidden_states: (b, l, d), with the real tokens of every row first.
            state: holds the states before these tokens, and receives those after them; None without a cache.
            lengths: (b,) number of real tokens of each row; None without padding.
            seq_idx: (b, l) document number of each token; None if every row is a single document.

        Returns:
            (b, l, d) in the dtype of ``hidden_states``; the values at padding have no meaning.
        """


@runtime_checkable
class SelfInitialized(Protocol):
    """A module that initialises its parameters by `transformers.initialization`, which never changes loaded ones."""

    def init_weights(self) -> None:
        """Initialise the parameters and buffers of this module, but not of its children."""


@runtime_checkable
class BringsCallbacks(Protocol):
    """A layer that acts between training steps, as a router does to balance its load."""

    def trainer_callbacks(self) -> "list[TrainerCallback]":
        """Callbacks for a `Trainer`; one of each class serves all layers of the model."""


class RoutedFeedForward(nn.Module):
    """Base of feed-forwards with a router.

    Attributes:
        config: its config; layers with one config object compute their losses together.
        gate: the router, called once in a forward. Its buffer ``training_statistics`` sums the statistics of training.
    """

    config: Any
    gate: nn.Module

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, count: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply to every token the experts that the router selects.

        Args:
            hidden_states: (b, l, d).
            mask: (b, l) bool, the real tokens; None without padding.
            count: whether the statistics are needed.

        Returns:
            (b, l, d) in the dtype of ``hidden_states``; the router's statistics, a vector that can be summed over
            forwards and ranks; and its logits, (b * l, e).
        """
        raise NotImplementedError

    def balance_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """The load-balancing loss of all layers with this config, a scalar tensor.

        Args:
            statistics: the statistics from `forward` of each of these layers.
        """
        raise NotImplementedError

    def auxiliary_loss(self, statistics: Sequence[Tensor]) -> Tensor:
        """The sum of all losses of these layers, multiplied by their coefficients, a scalar tensor.

        Args:
            statistics: as in `balance_loss`.
        """
        raise NotImplementedError

    def balances_as_mixtral(self) -> bool:
        """Whether `auxiliary_loss` is Mixtral's load balancing alone, which TRL computes from router logits."""
        return False

    def figures(self, statistics: Tensor) -> dict[str, Tensor]:
        """Figures for logs, from the statistics of this layer's router."""
        raise NotImplementedError

    def active_fraction(self) -> float:
        """Share of the experts' weights that a token uses."""
        return 1.0

    def check_generation(self) -> None:
        """Raise a `ValueError` if the output of a token depends on later tokens."""

    def trainer_callbacks(self) -> "list[TrainerCallback]":
        """The callbacks of the router for training; see `BringsCallbacks`."""
        return []
