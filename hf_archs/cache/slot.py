"""One mixer's state in the cache, and what it keeps so that a forward can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import is_torchdynamo_compiling

from hf_archs.cache.call import call
from hf_archs.parts import StateSpec

KINDS = ("conv", "recurrent")  # of states in transformers' layers
States = dict[str, torch.Tensor]
# (name, how to compute it) -> it; see `Slot.once`
Once = Callable[[str, Callable[[], torch.Tensor]], torch.Tensor]
# (inputs of the recurrence, states before, number of tokens per row) -> states after
Replay = Callable[[States, dict[str, torch.Tensor | None], torch.Tensor], States]


@dataclass
class Segment:
    """One forward since recording began.

    Attributes:
        length: its positions.
        mask: which of them are real, ``(batch, length)`` bool; None where all are.
        window: how many of its last ones can be taken back.
    """

    length: int
    mask: torch.Tensor | None
    window: int

    def tokens_in(self, columns: int, batch: int, device: torch.device) -> torch.Tensor:
        """How many real tokens each row has in the first ``columns`` positions: ``(batch,)``."""
        if self.mask is None:
            return torch.full((batch,), columns, device=device)
        return self.mask[:, :columns].sum(1)


@dataclass
class Record:
    """The record that one slot rolls back by: its states before the first segment and every segment's inputs."""

    replay: Replay
    before: dict[str, torch.Tensor | None]
    inputs: list[States] = field(default_factory=list)
    first_cut: int = 0  # positions of the first segment that are folded into `before`


class Timeline:
    """Positions read so far, and the forwards since recording began; a cache and its slots share one.

    (Slots that held the cache would make a circle, and its states would stay in memory until Python looks for circles.)

    Attributes:
        is_static: whether states are written into buffers, and positions counted in tensors that stay where they are.
        length: positions read, those of this forward among them.
        before: in a static cache, positions before this forward.
        free: in a static cache, how many more positions fit for certain.
    """

    def __init__(self, is_static: bool):
        self.is_static = is_static
        self.length: Any = torch.zeros((), dtype=torch.long) if is_static else 0
        self.before: Any = torch.zeros((), dtype=torch.long) if is_static else 0
        self.free = 0
        self.segments: list[Segment] = []


class Place:
    """The home of one state, ``(batch, *spec.shape)``, in a layer object of transformers.

    Attributes:
        states: the layer's tensors of the state's kind, of which this is the one at ``index``.
        filled: whether there is something in them, by index; two states of different kinds share an entry.
        room: columns of the buffer that a growing state has in a static cache; None for every other state. There a
            column's place is that of its position in the cache, so that one more is one more to write. Everywhere else
            the last column is the last position: turned by the number of positions, one becomes the other.
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
        """Rebind the state (dynamic) or copy into its buffer, whose address stays (static)."""
        held, static = self.states[self.index], self.timeline.is_static
        if self.room is not None:
            value = turned(last_columns(value, self.room), -self.timeline.length.to(value.device))
        if held is not None and not static:
            self.states[self.index] = value
        elif held is not None and held.shape == value.shape:
            held.copy_(value)
        else:
            self._first(value)
        self.filled[self.index] = True

    def _first(self, value: torch.Tensor) -> None:
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
        """`store`, or make it empty as before the first token."""
        if value is not None:
            self.store(value)
            return
        self.filled[self.index] = False
        held = self.states[self.index]
        if self.timeline.is_static and held is not None:
            held.zero_()
        else:
            self.states[self.index] = None
            self._initialized[self.index] = False  # or transformers' `reset` fills it with zeros


class Slot:
    """One mixer's state in the cache; the mixer reads and writes it by name and knows nothing of layers.

    Attributes:
        places: of its states, by their names. Those of the parts of a layer are there too, as ``<part>.<name>``.
        record: what it needs to roll back; None where nothing is recorded.
        derived: see `once`.
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
        """The slot of one of several mixers in the layer, whose states' names begin with ``name.``."""
        slot = self._parts.get(name)
        if slot is None:
            begin = f"{name}."
            places = {n.removeprefix(begin): place for n, place in self.places.items() if n.startswith(begin)}
            slot = self._parts[name] = Slot(self.layer, places, self.timeline)
        return slot

    def with_parts(self) -> Iterator[Slot]:
        """This slot, and those of all parts that were asked for or have states."""
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
            return turned(value, self.timeline.before)  # this forward's positions are counted already
        return value

    def once(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A value that follows from the weights alone: computed at the first token of a `generate`, kept until its end.

        Everywhere else it is computed every time: an optimizer, or another adapter, may have changed the weights since
        the last token.
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
            inputs: what ``replay`` needs of this forward: tensors ``(batch, length, ...)``, real tokens first. It is
                not handed those that are None.
            replay: computes the states after the first ``lengths`` tokens of ``inputs``, from states before.
        """
        if self.timeline.segments:
            self._keep(states, inputs, replay)
        for name, value in states.items():
            self.places[name].store(value)

    def grows_in_place(self, name: str) -> bool:
        """Whether `append` can be used: the growing state ``name`` has a buffer of one size, with something in it."""
        place = self.places[name]
        return place.room is not None and place.filled[place.index]

    def append(
        self, columns: States, states: States, inputs: dict[str, torch.Tensor | None], replay: Replay
    ) -> tuple[States, torch.Tensor]:
        """`update` where growing states gain the columns of this forward, of which every position is a real token, and
        other states are stored as they are.

        Returns:
            the whole buffers, and the place of each of this forward's columns in them, ``(length,)``; columns of
            earlier positions are at the places before, and what is behind means nothing.
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
        """Record this forward's inputs; of a long one only the window, with the states brought up to its start."""
        if not self.layer.record_past:
            return
        before = {name: self.get(name) for name in names}
        if self.timeline.is_static:  # its buffers are written over below
            before = {name: None if t is None else t.clone() for name, t in before.items()}
        given = {name: t for name, t in inputs.items() if t is not None}
        if self.record is None:
            self.record = Record(replay, before)
        record, segments = self.record, self.timeline.segments
        segment = segments[-1]
        cut = segment.length - segment.window
        batch, device = next((t.shape[0], t.device) for t in given.values())
        # rows of a padded batch would be cut at different places; assisted decoding has one row
        if cut > 0 and len(segments) == 1 and (batch == 1 or segment.mask is None):
            lengths = segment.tokens_in(cut, batch, device)
            record.before = dict(replay(given, record.before, lengths))
            start = cut if segment.mask is None else int(lengths[0])
            documents = given.get("seq_idx")
            if documents is not None and start > 0:  # a document that begins there has nothing before it: zeros
                begins = documents[:, start] != documents[:, start - 1]
                record.before = {
                    n: None if t is None else t.masked_fill(begins.view(-1, *[1] * (t.ndim - 1)), 0)
                    for n, t in record.before.items()
                }
            given = {name: t[:, start:].clone() for name, t in given.items()}
            record.first_cut = cut
        record.inputs.append(given)


def last_columns(value: torch.Tensor, columns: int) -> torch.Tensor:
    """The last ``columns`` of the last dimension, after zeros where there are fewer: ``(..., columns)``."""
    value = value[..., max(value.shape[-1] - columns, 0) :]
    return torch.nn.functional.pad(value, (columns - value.shape[-1], 0))


def turned(value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The columns of the last dimension from the one at ``by`` on, and then those before it."""
    size = value.shape[-1]
    return value.index_select(-1, (torch.arange(size, device=value.device) + by) % size)
