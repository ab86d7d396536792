"""The cache of recurrent models: states, rollback, save and load.

transformers' own layer objects hold the tensors; everything they cannot do (count tokens without keys, roll a
recurrence back, repeat and select batch rows) stands here, once, for the dynamic and the static cache.

Rollback replays. A state per token would cost what a recurrent model exists to avoid, so while transformers records
the past (assisted decoding), each mixer hands over the inputs of its recurrence, and `crop` runs the accepted prefix
again from the state before. Of a long forward only the last positions are kept that way, see `RecurrentCache.begin`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.utils import is_torchdynamo_compiling

from hf_archs.cache.call import NAME
from hf_archs.cache.slot import KINDS, Place, Record, Segment, Slot, States, Timeline, turned
from hf_archs.parts import StateSpec


class RecurrentCache(Cache):
    """The common part of `ArchDynamicCache` and `ArchStaticCache`; see the module's docstring."""

    is_static = False
    max_cache_len: int | None = None  # columns of growing states in a static cache; None where nobody said

    def _setup(self, config: Any, offloading: bool = False) -> None:
        plans = [plan.states() for plan in config.layer_plans()]
        # transformers makes room for one state of each kind
        counts = [max((sum(s.kind == kind for s in specs.values()) for kind in KINDS), default=1) for specs in plans]
        layers = [LinearAttentionLayer(number_of_states=max(n, 1)) for n in counts]
        Cache.__init__(self, [*layers], offloading=offloading)
        self.timeline = Timeline(self.is_static)
        self._slots: list[Slot] = []
        for layer, specs in zip(layers, plans):
            index = {kind: itertools.count() for kind in KINDS}
            places = {
                name: Place(layer, spec, next(index[spec.kind]), self.timeline, self.max_cache_len)
                for name, spec in specs.items()
            }
            self._slots.append(Slot(layer, places, self.timeline))
        self._grows = any(spec.grows for spec in self.specs().values())

    # -- counting ----------------------------------------------------------------------------------------------

    def begin(self, length: int, mask: torch.Tensor | None, device: torch.device, keep: int = 1) -> None:
        """Told by the model at the start of every forward.

        Args:
            length: positions of this forward.
            mask: the real ones, ``(batch, length)`` bool; None where all are.
            keep: of how many last positions the logits are kept, 0 for the least. Assisted decoding keeps those of all
                candidates, and takes back no more than those and one.

        Raises:
            ValueError: where a static cache has no room for them.
        """
        timeline = self.timeline
        if self.is_static:
            if self._grows and self.max_cache_len:
                self._take_room(length, self.max_cache_len)
            if timeline.length.device != device:
                timeline.length, timeline.before = timeline.length.to(device), timeline.before.to(device)
                for counter in (timeline.length, timeline.before):
                    torch._dynamo.mark_static_address(counter)
            timeline.before.copy_(timeline.length)
            timeline.length.add_(length)
        else:
            timeline.length += length
        if self.is_recording_past(0):
            timeline.segments.append(Segment(length, mask, window=max(keep, 1) + 1))

    def _take_room(self, length: int, most: int) -> None:
        """Refuse what does not fit. The device, which counts, is asked only where the last answer does not do."""
        timeline = self.timeline
        if is_torchdynamo_compiling():
            timeline.free = 0  # the compiled forward counts on the device alone
            return
        if timeline.free < length:
            there = int(timeline.length)
            if there + length > most:
                raise ValueError(
                    f"the static cache holds max_cache_len = {most} positions; "
                    f"{there} are there and {length} more do not fit"
                )
            timeline.free = most - there
        timeline.free -= length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen so far, pads included, whatever the layer."""
        return self.timeline.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask's keys: all positions, the new ones among them, from the first on."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: transformers takes it for caches that do not know how long they are."""
        return [False] * len(self.layers)

    @property
    def batch_size(self) -> int:
        """The batch size of the states, -1 before the first token."""
        for slot in self._slots:
            for place in slot.places.values():
                tensor = place.states[place.index]
                if tensor is not None:
                    return tensor.shape[0]
        return -1

    @property
    def is_empty(self) -> bool:
        """Whether no token has been read yet."""
        return self.batch_size < 0

    # -- states ------------------------------------------------------------------------------------------------

    def slot(self, layer_idx: int) -> Slot:
        """The state of the mixer in layer ``layer_idx``, as long as the cache lives."""
        return self._slots[layer_idx]

    def _places(self) -> Iterator[tuple[str, Place]]:
        """The place of every state under a stable name, ``layers.<i>.<state>``."""
        for layer_idx, slot in enumerate(self._slots):
            for name, place in slot.places.items():
                yield f"layers.{layer_idx}.{name}", place

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every state tensor ``(batch, *spec.shape)`` by the names of `specs`, as it lies in memory."""
        for key, place in self._places():
            tensor = place.states[place.index]
            if tensor is not None:
                yield key, tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, the columns of growing states as mixers see them: the last one is the last position."""
        places = dict(self._places())
        for key, tensor in self.held():
            yield key, tensor if places[key].room is None else turned(tensor, self.timeline.length)

    def num_bytes(self) -> int:
        """Bytes that the states hold; for a pure recurrent model the same at every length."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.held())

    def state_dict(self) -> States:
        """All states and the number of positions: copies, as tensors that safetensors can write."""
        states = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors()}
        return {**states, "length": torch.as_tensor(self.timeline.length).clone()}

    def specs(self) -> dict[str, StateSpec]:
        """The states that there may be, each ``layers.<i>.<state>``."""
        return {key: place.spec for key, place in self._places()}

    def load_state_dict(self, states: States) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: where names are missing or do not belong here, or a shape does not fit; nothing is changed.
        """
        names = self.specs()
        given = set(states) - {"length"}
        if "length" not in states or (given and given != set(names)):
            wrong = sorted(given ^ set(names)) or ["length"]
            raise ValueError(f"these states are of another model: {wrong[0]} is missing or unknown")
        for key in sorted(given):
            shape, spec = tuple(states[key].shape), names[key]
            fixed = len(spec.shape) - spec.grows
            if len(shape) != 1 + len(spec.shape) or shape[1 : fixed + 1] != spec.shape[:fixed]:
                expected = ("batch", *spec.shape[:fixed], *["length"] * spec.grows)
                raise ValueError(f"state {key} has shape {shape}; allowed is {expected}")
        self.reset()
        length = int(states["length"])
        self._count(length)
        places = dict(self._places())
        for key in sorted(given):
            places[key].store(states[key].clone())  # a caller may load it again

    def _count(self, length: int) -> None:
        self.timeline.length = self.timeline.length.fill_(length) if self.is_static else length
        self.timeline.free = 0

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function of the batch dimension to every state and every recorded input."""
        for _, place in self._places():
            held = place.states[place.index]
            if held is not None:
                value = function(held)
                if self.is_static and value.shape == held.shape:
                    held.copy_(value)
                else:
                    place.states[place.index] = value
        for segment in self.timeline.segments:
            segment.mask = None if segment.mask is None else function(segment.mask)
        for _, record in self._records():
            record.before = {n: None if t is None else function(t) for n, t in record.before.items()}
            record.inputs = [{n: function(t) for n, t in inputs.items()} for inputs in record.inputs]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows that a beam search goes on with, row ``beam_idx[i]`` for row i; ``beam_idx`` is ``(b,)``."""
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of these indices, in their order; ``indices`` is ``(n,)``."""
        self._map_rows(lambda t: t[indices.to(t.device)])

    def reset(self) -> None:
        """Forget every token, the records and all that slots derived, so that another sequence may begin."""
        super().reset()
        self._forget()
        self.forget_derived()
        self._count(0)

    def forget_derived(self) -> None:
        """Forget what slots computed from the weights, which may be others from here on; see `Slot.once`."""
        for slot in self._slots_and_parts():
            slot.derived.clear()

    # -- rollback ----------------------------------------------------------------------------------------------

    @property
    def segments(self) -> list[Segment]:
        """The forwards that are recorded."""
        return self.timeline.segments

    @property
    def is_croppable(self) -> bool:
        """True always: transformers asks before anything is recorded, and `crop` itself refuses where it cannot."""
        return True

    def stop_recording(self) -> None:
        """Forget what was recorded and record no more."""
        self._forget()
        for slot in self._slots:
            slot.layer.record_past = False

    def _forget(self) -> None:
        self.timeline.segments = []
        for slot in self._slots_and_parts():
            slot.record = None

    def _slots_and_parts(self) -> Iterator[Slot]:
        for slot in self._slots:
            yield from slot.with_parts()

    def _records(self) -> list[tuple[Slot, Record]]:
        return [(slot, slot.record) for slot in self._slots_and_parts() if slot.record is not None]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` positions (0: only forget what was recorded to do so).

        Raises:
            ValueError: for a positive number, or more than was recorded; the cache is unchanged then.
            RuntimeError: where nothing is recorded, see `activate_past_recording`.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if tokens_to_remove == 0:
            self._forget()
            return
        segments, records = self.timeline.segments, self._records()
        if not segments:
            raise RuntimeError("crop: nothing is recorded; call activate_past_recording() before the forward")
        keep = sum(segment.length for segment in segments) + tokens_to_remove
        cut = max((record.first_cut for _, record in records), default=0)
        if keep < cut:
            raise ValueError(
                f"crop: {-tokens_to_remove} tokens cannot be taken back, only the last "
                f"{sum(s.length for s in segments) - cut} are recorded"
            )
        self.timeline.length += tokens_to_remove
        for slot, record in records:
            states, left = record.before, keep
            for number, (segment, inputs) in enumerate(zip(segments, record.inputs)):
                batch, device = next((t.shape[0], t.device) for t in inputs.values())
                columns = min(segment.length, left)
                left -= columns
                lengths = segment.tokens_in(columns, batch, device)
                if number == 0 and cut:
                    lengths = lengths - segment.tokens_in(cut, batch, device)
                if columns:
                    states = dict(record.replay(inputs, states, lengths))
            for name, value in states.items():
                slot.places[name].restore(value)
        self._forget()


class ArchDynamicCache(RecurrentCache, DynamicCache):
    """The cache that `generate` makes for every architecture of this library.

    Args:
        config: the model's config.
        offloading: as in transformers, which offloads keys and values; states, which all layers keep here, stay.
    """

    def __init__(self, config: Any, offloading: bool = False):
        self._setup(config, offloading)

    @property
    def is_compileable(self) -> bool:
        """False: states are rebound, and `generate` would compile every call on a GPU otherwise."""
        return False


class ArchStaticCache(RecurrentCache, StaticCache):
    """States in buffers whose address never changes, for compiled decoding and CUDA graphs.

    Args:
        config: the model's config.
        max_cache_len: positions that key-value layers and growing states can hold; other states have no limit. (One
            more is refused; in a compiled forward by an index that is out of bounds.)
    """

    is_static = True

    def __init__(self, config: Any, max_cache_len: int, offloading: bool = False):
        self.max_cache_len = max_cache_len
        self._setup(config, offloading)

    def early_initialization(
        self, batch_size: int, num_heads: Any, head_dim: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate every buffer now (transformers calls this before it compiles a chunked prefill)."""
        max_length = self.max_cache_len or 0  # a growing state of no columns is an empty one
        for _, place in self._places():
            shape = [max_length if size is None else size for size in place.spec.shape]
            place.store(torch.zeros(batch_size, *shape, dtype=place.spec.dtype or dtype, device=device))


def adopt(cache: Cache, config: Any) -> RecurrentCache:
    """Make a cache that a user built from transformers' classes one of ours, in place.

    Keys and values that it holds already, as those of prefix tuning, are taken over by attention to all tokens.

    Raises:
        ValueError: for a cache that was made for another kind of model, or holds what a mixer cannot begin with.
    """
    if isinstance(cache, RecurrentCache):
        return cache
    if not isinstance(cache, Cache):
        raise ValueError(f"{NAME} is a {type(cache).__name__}; allowed is a Cache")
    ours = {DynamicCache: ArchDynamicCache, StaticCache: ArchStaticCache}.get(type(cache))
    if ours is None or len(cache.layers) not in (0, config.num_hidden_layers):
        raise ValueError(
            f"{NAME} is a {type(cache).__name__} that was not made for this model; "
            "pass hf_archs.cache.ArchDynamicCache(model.config), or none"
        )
    given: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    full = any(k is not None and k.numel() for k, _ in given) or any(_holds_states(layer) for layer in cache.layers)
    if full and (ours is ArchStaticCache or set(config.layer_types) != {"full_attention"}):
        raise ValueError(
            f"{NAME} is a {type(cache).__name__} with something in it, as prefix tuning makes it: only a model whose "
            "layers are all attention can begin with keys and values that others made; recurrent layers have none"
        )
    cache.__class__ = ours
    adopted: Any = cache
    adopted._setup(config)
    if full:
        for layer_idx, (k, v) in enumerate(given):
            column = torch.full((k.shape[0], 1), k.shape[2], device=k.device)
            for name, value in (("key", k.mT), ("value", v.mT), ("position", column)):
                adopted.slot(layer_idx).places[name].store(value)
        adopted._count(given[0][0].shape[2])
    return adopted


def _holds_states(layer: Any) -> bool:
    return any(getattr(layer, "has_previous_state", {}).values())
