"""One mixer's state in the cache, and what it keeps so that a forward can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.utils import is_torchdynamo_compiling

from hf_archs.call import call

if TYPE_CHECKING:
    from hf_archs.cache.recurrent import RecurrentCache

KINDS = ("conv", "recurrent")  # of states in transformers' layers
States = dict[str, torch.Tensor]
# (name, how to compute it) -> it; see `Slot.once`
Once = Callable[[str, Callable[[], torch.Tensor]], torch.Tensor]
# (inputs of the recurrence, states before, number of tokens per row) -> states after
Replay = Callable[[States, dict[str, torch.Tensor | None], torch.Tensor], States]


@dataclass
class Segment:
    """One forward since recording began: how many positions, which of them are real (None: all)."""

    length: int
    mask: torch.Tensor | None

    def tokens_in(self, columns: int, batch: int, device: torch.device) -> torch.Tensor:
        """How many real tokens each row has in the first ``columns`` positions: ``(batch,)``."""
        if self.mask is None:
            return torch.full((batch,), columns, device=device)
        return self.mask[:, :columns].sum(1)


@dataclass
class Record:
    """What one slot needs to roll back: its states before the first segment and every segment's inputs."""

    replay: Replay
    before: dict[str, torch.Tensor | None]
    inputs: list[States] = field(default_factory=list)
    first_cut: int = 0  # positions of the first segment that are folded into `before`


class Slot:
    """One mixer's state in the cache; the mixer reads and writes it by name and knows nothing of layers."""

    def __init__(self, cache: RecurrentCache, layer_idx: int, prefix: str = ""):
        self.cache, self.layer_idx, self.prefix = cache, layer_idx, prefix

    def part(self, name: str) -> Slot:
        """The slot of one of several mixers in the layer, whose states' names begin with ``name.``."""
        return Slot(self.cache, self.layer_idx, f"{self.prefix}{name}.")

    def get(self, name: str) -> torch.Tensor | None:
        """The state ``name`` before this forward, or None before the first token."""
        layer, kind, index = self.cache.place(self.layer_idx, self.prefix + name)
        if not layer.has_previous_state[index]:
            return None
        value = getattr(layer, f"{kind}_states")[index]
        if self.cache.grows_in_place(self.layer_idx, self.prefix + name):
            return turned(value, self.cache._before)  # this forward's positions are counted already
        return value

    def once(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A value that follows from the weights alone: computed at the first token of a `generate`, kept until its end.

        Everywhere else it is computed every time: an optimizer, or another adapter, may have changed the weights since
        the last token.
        """
        if not call.generating or torch.is_grad_enabled():
            return compute()
        key = (self.layer_idx, self.prefix + name)
        value = self.cache.derived.get(key)
        if value is None:
            value = compute()
            if not is_torchdynamo_compiling():
                self.cache.derived[key] = value
        return value

    def update(self, states: States, inputs: dict[str, torch.Tensor | None], replay: Replay) -> None:
        """Store the states after this forward.

        Args:
            states: every state of the mixer.
            inputs: what ``replay`` needs of this forward: tensors ``(batch, length, ...)``, real tokens first. It is
                not handed those that are None.
            replay: computes the states after the first ``lengths`` tokens of ``inputs``, from states before.
        """
        self._record(states, inputs, replay)
        for name, value in states.items():
            self.cache.store(self.layer_idx, self.prefix + name, value)

    def grows_in_place(self, name: str) -> bool:
        """Whether `append` can be used: the growing state ``name`` has a buffer of one size, with something in it."""
        layer, _, index = self.cache.place(self.layer_idx, self.prefix + name)
        return layer.has_previous_state[index] and self.cache.grows_in_place(self.layer_idx, self.prefix + name)

    def append(
        self, columns: States, states: States, inputs: dict[str, torch.Tensor | None], replay: Replay
    ) -> tuple[States, torch.Tensor]:
        """`update` where growing states gain the columns of this forward, of which every position is a real token, and
        other states are stored as they are.

        Returns:
            the whole buffers, and the place of each of this forward's columns in them, ``(length,)``; columns of
            earlier positions are at the places before, and what is behind means nothing.
        """
        self._record([*columns, *states], inputs, replay)
        for name, value in states.items():
            self.cache.store(self.layer_idx, self.prefix + name, value)
        held = {}
        for name, value in columns.items():
            layer, kind, index = self.cache.place(self.layer_idx, self.prefix + name)
            held[name] = getattr(layer, f"{kind}_states")[index]
            place = self.cache._before + torch.arange(value.shape[-1], device=value.device)
            held[name].index_copy_(value.ndim - 1, place, value.to(held[name].dtype))
        return held, place

    def _record(self, names: Iterable[str], inputs: dict[str, torch.Tensor | None], replay: Replay) -> None:
        if self.cache.segments and self.cache.is_recording_past(self.layer_idx):
            before = {name: self.get(name) for name in names}
            if self.cache.is_static:  # its buffers are written over below
                before = {name: None if t is None else t.clone() for name, t in before.items()}
            given = {name: t for name, t in inputs.items() if t is not None}
            self.cache.record((self.layer_idx, self.prefix), before, given, replay)


def turned(value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The columns of the last dimension from the one at ``by`` on, and then those before it."""
    size = value.shape[-1]
    return value.index_select(-1, (torch.arange(size, device=value.device) + by) % size)
