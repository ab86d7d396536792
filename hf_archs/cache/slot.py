"""One mixer's state in the cache, and the record that rolls it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import is_torchdynamo_compiling

from hf_archs.cache.call import call
from hf_archs.parts import StateSpec

KINDS = ("conv", "recurrent")  # kinds of states in transformers' layers
States = dict[str, torch.Tensor]
# (name, compute) -> value; see `Slot.once`
Once = Callable[[str, Callable[[], torch.Tensor]], torch.Tensor]
# (inputs of the recurrence, states before, tokens per row) -> states after
Replay = Callable[[States, dict[str, torch.Tensor | None], torch.Tensor], States]


@dataclass
class Segment:
    """One forward since recording began.

    Attributes:
        length: number of positions.
        mask: the real tokens, ``(batch, length)`` bool; None if there is no padding.
        window: number of last positions that `RecurrentCache.crop` can remove.
    """

    length: int
    mask: torch.Tensor | None
    window: int

    def tokens_in(self, columns: int, batch: int, device: torch.device) -> torch.Tensor:
        """Number of real tokens of each row in the first ``columns`` positions, ``(batch,)``."""
        if self.mask is None:
            return torch.full((batch,), columns, device=device)
        return self.mask[:, :columns].sum(1)


@dataclass
class Record:
    """The rollback record of one slot: its states before the first segment, and the inputs of every segment."""

    replay: Replay
    before: dict[str, torch.Tensor | None]
    inputs: list[States] = field(default_factory=list)
    first_cut: int = 0  # leading positions of the first segment that `before` already contains


class Timeline:
    """The count of positions and the recorded forwards, shared by a cache and its slots.

    (A slot that referred to the cache would form a reference cycle, and the states would wait for garbage collection.)

    Attributes:
        is_static: True for a static cache: states are buffers and counts are tensors, all at fixed addresses.
        length: positions read, including those of the current forward.
        before: in a static cache, positions before the current forward.
        free: in a static cache, how many more positions fit for certain.
        segments: the forwards since recording began.
    """

    def __init__(self, is_static: bool):
        self.is_static = is_static
        self.length: Any = torch.zeros((), dtype=torch.long) if is_static else 0
        self.before: Any = torch.zeros((), dtype=torch.long) if is_static else 0
        self.free = 0
        self.segments: list[Segment] = []


class Place:
    """The storage of one state, ``(batch, *spec.shape)``, in a layer object of transformers.

    Attributes:
        states: the layer's tensors of the state's kind, by index; this state is the one at ``index``.
        filled: by index, whether a state was stored; a conv and a recurrent state of one index share the entry.
        room: number of columns of a growing state's buffer in a static cache; None for every other state. Column i of
            that buffer is position i, so a decode step writes one column. Mixers see the columns rolled, the last
            position last.
    """

    def __init__(
        self, layer: LinearAttentionLayer, spec: StateSpec, index: int, timeline: Timeline, max_cache_len: int | None
    ):
        self.layer, self.spec, self.index, self.timeline = layer, spec, index, timeline
        self.states: dict[int, torch.Tensor | None] = getattr(layer, f"{spec.kind}_states")
        self.filled: dict[int, bool] = layer.has_previous_state
        self._initialized: dict[int, bool] = getattr(layer, f"is_{spec.kind}_states_initialized")
        self.room = max_cache_len if timeline.is_static and spec.grows else None

    def store(self, value: torch.Tensor) -> None:
        """Rebind the state (dynamic cache), or copy into its buffer at a fixed address (static cache)."""
        held, static = self.states[self.index], self.timeline.is_static
        if self.room is not None:
            value = rolled(last_columns(value, self.room), -self.timeline.length.to(value.device))
        if held is not None and not static:
            self.states[self.index] = value
        elif held is not None and held.shape == value.shape:
            held.copy_(value)
        else:
            self._allocate(value)
        self.filled[self.index] = True

    def _allocate(self, value: torch.Tensor) -> None:
        if self.timeline.is_static:
            value = (value.mT.contiguous().mT if self.spec.together else value).clone()
            if not is_torchdynamo_compiling():
                torch._dynamo.mark_static_address(value)
        self.states[self.index] = value
        self._initialized[self.index] = True
        layer: Any = self.layer
        if self.spec.kind == "conv":
            layer.conv_kernel_size[self.index] = value.shape[-1]
        layer.device, layer.dtype = value.device, value.dtype

    def restore(self, value: torch.Tensor | None) -> None:
        """`store` the value; None empties the state, as before the first token."""
        if value is not None:
            self.store(value)
            return
        self.filled[self.index] = False
        held = self.states[self.index]
        if self.timeline.is_static and held is not None:
            held.zero_()
        else:
            self.states[self.index] = None
            self._initialized[self.index] = False  # else transformers' `reset` calls zero_() on None


class Slot:
    """One mixer's states in the cache, read and written by name.

    Attributes:
        places: the storage of each state by name; for mixers side by side in one layer, ``<part>.<name>``.
        record: the rollback record; None if nothing is recorded.
        derived: values kept by `once`.
    """

    def __init__(self, layer: LinearAttentionLayer, places: dict[str, Place], timeline: Timeline):
        self.layer, self.places, self.timeline = layer, places, timeline
        self.record: Record | None = None
        self.derived: dict[str, torch.Tensor] = {}
        self._parts: dict[str, Slot] = {}
        for name in places:
            if "." in name:
                self.part(name.partition(".")[0])

    def part(self, name: str) -> Slot:
        """The slot of one of several mixers side by side in a layer: the states named ``<name>.<state>``."""
        slot = self._parts.get(name)
        if slot is None:
            begin = f"{name}."
            places = {n.removeprefix(begin): place for n, place in self.places.items() if n.startswith(begin)}
            slot = self._parts[name] = Slot(self.layer, places, self.timeline)
        return slot

    def with_parts(self) -> Iterator[Slot]:
        """This slot and the slots of its parts, recursively."""
        yield self
        for part in self._parts.values():
            yield from part.with_parts()

    def get(self, name: str) -> torch.Tensor | None:
        """The state ``name`` before this forward, ``(batch, *spec.shape)``, or None before the first token."""
        place = self.places[name]
        if not place.filled[place.index]:
            return None
        value = place.states[place.index]
        if place.room is not None and value is not None:
            return rolled(value, self.timeline.before)  # `length` already counts this forward
        return value

    def once(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A value that depends on the weights alone, computed once per `generate`, at its first token.

        Outside `generate`, or with gradients enabled, it is computed at every call: an optimizer step or another
        adapter may have changed the weights.
        """
        if not call.generating or torch.is_grad_enabled():
            return compute()
        value = self.derived.get(name)
        if value is None:
            value = compute()
            if not is_torchdynamo_compiling():
                self.derived[name] = value
        return value

    def update(self, states: States, inputs: dict[str, torch.Tensor | None], replay: Replay) -> None:
        """Store the states after this forward.

        Args:
            states: every state of the mixer.
            inputs: the inputs of ``replay``, tensors ``(batch, length, ...)`` with real tokens first. Entries of None
                are not passed to it.
            replay: computes the states after the first ``lengths`` tokens of ``inputs`` from the states before.
        """
        if self.timeline.segments:
            self._keep(states, inputs, replay)
        for name, value in states.items():
            self.places[name].store(value)

    def grows_in_place(self, name: str) -> bool:
        """Whether `append` can be used: the growing state ``name`` has a buffer that is filled (static cache)."""
        place = self.places[name]
        return place.room is not None and place.filled[place.index]

    def append(
        self, columns: States, states: States, inputs: dict[str, torch.Tensor | None], replay: Replay
    ) -> tuple[States, torch.Tensor]:
        """`update` that writes only this forward's columns of growing states. No position may be padding.

        Args:
            columns: the new columns of each growing state, ``(batch, ..., length)``.
            states: every other state of the mixer.
            inputs, replay: as in `update`.

        Returns:
            The whole buffers of the growing states, and the column index of each new token in them, ``(length,)``.
            Earlier positions are in the columns before; the columns after have no meaning.
        """
        if self.timeline.segments:
            self._keep([*columns, *states], inputs, replay)
        for name, value in states.items():
            self.places[name].store(value)
        held: States = {}
        for name, value in columns.items():
            place = self.places[name]
            buffer = place.states[place.index]
            assert buffer is not None
            column = self.timeline.before + torch.arange(value.shape[-1], device=value.device)
            held[name] = buffer.index_copy_(value.ndim - 1, column, value.to(buffer.dtype))
        return held, column

    def _keep(self, names: Iterable[str], inputs: dict[str, torch.Tensor | None], replay: Replay) -> None:
        """Record this forward's inputs; of a long forward, the window and the states before it."""
        if not self.layer.record_past:
            return
        before = {name: self.get(name) for name in names}
        if self.timeline.is_static:  # the caller overwrites the buffers
            before = {name: None if t is None else t.clone() for name, t in before.items()}
        given = {name: t for name, t in inputs.items() if t is not None}
        if self.record is None:
            self.record = Record(replay, before)
        record, segments = self.record, self.timeline.segments
        segment = segments[-1]
        cut = segment.length - segment.window
        batch, device = next((t.shape[0], t.device) for t in given.values())
        # not for a padded batch, whose rows have different cuts; assisted decoding has one row
        if cut > 0 and len(segments) == 1 and (batch == 1 or segment.mask is None):
            lengths = segment.tokens_in(cut, batch, device)
            record.before = dict(replay(given, record.before, lengths))
            start = cut if segment.mask is None else int(lengths[0])
            documents = given.get("seq_idx")
            if documents is not None and start > 0:  # a document that begins at the cut starts from zero states
                begins = documents[:, start] != documents[:, start - 1]
                record.before = {
                    n: None if t is None else t.masked_fill(begins.view(-1, *[1] * (t.ndim - 1)), 0)
                    for n, t in record.before.items()
                }
            given = {name: t[:, start:].clone() for name, t in given.items()}
            record.first_cut = cut
        record.inputs.append(given)


def last_columns(value: torch.Tensor, columns: int) -> torch.Tensor:
    """The last ``columns`` columns of the last dimension, zero-padded on the left: ``(..., columns)``."""
    value = value[..., max(value.shape[-1] - columns, 0) :]
    return torch.nn.functional.pad(value, (columns - value.shape[-1], 0))


def rolled(value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The last dimension rolled left: ``torch.roll(value, -by, -1)``, with ``by`` a tensor."""
    size = value.shape[-1]
    return value.index_select(-1, (torch.arange(size, device=value.device) + by) % size)
