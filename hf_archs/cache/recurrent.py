"""The cache of recurrent models: states, rollback, save and load.

transformers' layer objects hold the tensors. This module adds the operations that they lack, for the dynamic and the
static cache alike: counting tokens without keys, rolling back a recurrence, repeating and selecting batch rows.

Rollback is by replay, since a copy of the state per token would cost the memory that a recurrent model saves. While
transformers records the past (assisted decoding), each mixer hands over the inputs of its recurrence, and `crop` runs
the accepted prefix again from the state before. A long forward keeps its last positions only, see
`RecurrentCache.begin`.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.utils import is_torchdynamo_compiling

from hf_archs.cache import stored
from hf_archs.cache.call import NAME
from hf_archs.cache.slot import KINDS, Place, Record, Segment, Slot, States, Timeline, rolled
from hf_archs.parts import StateSpec


class RecurrentCache(Cache):
    """Base of `ArchDynamicCache` and `ArchStaticCache`."""

    is_static = False
    max_cache_len: int | None = None  # columns of growing states in a static cache; None if not given

    def _setup(self, config: Any, offloading: bool = False) -> None:
        plans = [plan.states() for plan in config.layer_plans()]
        # a layer of transformers has the same number of states of each kind, at least one
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
        """Count and record a forward; the model calls this at the start of each.

        Args:
            length: number of positions.
            mask: the real tokens, ``(batch, length)`` bool; None if there is no padding.
            keep: the forward's ``logits_to_keep``; 0 counts as 1. `crop` can remove one position more than that:
                assisted decoding keeps the logits of all candidates.

        Raises:
            ValueError: if a static cache is too short.
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
        """Positions read so far, padding included; the same for every layer."""
        return self.timeline.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys in a mask, new positions included, and the offset of the first, 0."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: `generate` does not ask a cache of linear layers for its length."""
        return [False] * len(self.layers)

    @property
    def batch_size(self) -> int:
        """Number of batch rows; -1 before the first token."""
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
        """The states of the mixer in layer ``layer_idx``; the same object at every call."""
        return self._slots[layer_idx]

    def _places(self) -> Iterator[tuple[str, Place]]:
        """The storage of every state, as ``layers.<i>.<state>``."""
        for layer_idx, slot in enumerate(self._slots):
            for name, place in slot.places.items():
                yield f"layers.{layer_idx}.{name}", place

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every state tensor ``(batch, *spec.shape)`` with its name in `specs`, as stored."""
        for key, place in self._places():
            tensor = place.states[place.index]
            if tensor is not None:
                yield key, tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `held`, with the columns of growing states in the order that mixers see."""
        places = dict(self._places())
        for key, tensor in self.held():
            yield key, tensor if places[key].room is None else rolled(tensor, self.timeline.length)

    def num_bytes(self) -> int:
        """Bytes of all states; constant in the length for a purely recurrent model."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.held())

    def state_dict(self) -> States:
        """Copies of all states, and the number of positions, as contiguous tensors for safetensors."""
        states = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors()}
        return {**states, "length": torch.as_tensor(self.timeline.length).clone()}

    def specs(self) -> dict[str, StateSpec]:
        """The specification of every state, filled or not, by the name ``layers.<i>.<state>``."""
        return {key: place.spec for key, place in self._places()}

    def load_state_dict(self, states: States) -> None:
        """Load the states of a `state_dict`.

        Raises:
            ValueError: for missing or unknown names, or a wrong shape; the cache is unchanged then.
        """
        names = self.specs()
        given = set(states) - {"length"}
        if "length" not in states or (given and given != set(names)):
            wrong = sorted(given ^ set(names)) or ["length"]
            raise ValueError(f"these states are of another model: {wrong[0]} is missing or unknown")
        for key in sorted(given):
            shape, spec = tuple(states[key].shape), names[key]
            fixed = spec.shape[:-1] if spec.grows else spec.shape
            if len(shape) != 1 + len(spec.shape) or shape[1 : 1 + len(fixed)] != fixed:
                expected = ("batch", *fixed, "length") if spec.grows else ("batch", *fixed)
                raise ValueError(f"state {key} has shape {shape}; allowed is {expected}")
        length = int(states["length"])
        if self._grows and self.is_static and length > (self.max_cache_len or math.inf):
            raise ValueError(f"the states are of {length} positions; allowed are max_cache_len = {self.max_cache_len}")
        self.reset()
        self._count(length)
        places = dict(self._places())
        for key in sorted(given):
            places[key].store(states[key].clone())  # the caller may load them again

    def save(self, path: str | os.PathLike, model: nn.Module) -> None:
        """Write the states to a safetensors file, with the config and a fingerprint of ``model``, which computed them.

        The file is written completely or not at all.

        Raises:
            ValueError: if the cache is empty, or ``model`` is no model of transformers.
        """
        stored.save(self, path, model)

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: nn.Module, *arguments: Any, filename: str = stored.FILE, **download: Any
    ) -> Self:
        """A cache with the states from `save` or `push_to_hub`, in the dtypes and on the devices of ``model``.

        Args:
            path: a file, or a repository on the Hub.
            model: a model with the weights, including adapters, that computed the states; its precision may differ.
            arguments: further arguments of the class: ``max_cache_len`` of a static cache.
            filename: the file in the repository.
            download: arguments of transformers' ``cached_file``: ``revision``, ``token``, ...

        Raises:
            OSError: if there is no such file.
            ValueError: for a damaged file, another format or version, or another model.
        """
        cache = cls(stored.backbone_of(model).config, *arguments)
        stored.load(cache, stored.find(path, filename, **download), model)
        return cache

    def push_to_hub(self, repo_id: str, model: nn.Module, filename: str = stored.FILE, **upload: Any) -> Any:
        """`save` to a repository on the Hub, which is created if missing.

        Args:
            upload: ``token`` and ``private``, and arguments of ``HfApi.upload_file``: ``commit_message``, ...

        Returns:
            The ``CommitInfo``.
        """
        return stored.push(self, repo_id, model, filename, **upload)

    def _count(self, length: int) -> None:
        self.timeline.length = self.timeline.length.fill_(length) if self.is_static else length
        self.timeline.free = 0

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function of the batch dimension to every state, recorded mask and recorded input."""
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
        """Replace row i by row ``beam_idx[i]``, as a beam search asks; ``beam_idx`` is ``(b,)``."""
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, its copies next to each other."""
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, ``(n,)``, in that order."""
        self._map_rows(lambda t: t[indices.to(t.device)])

    def reset(self) -> None:
        """Empty the cache for another sequence: states, rollback records and values of `Slot.once`."""
        super().reset()
        self._forget()
        self.forget_derived()
        self._count(0)

    def forget_derived(self) -> None:
        """Drop the values of `Slot.once`, for a call that may have other weights."""
        for slot in self._slots_and_parts():
            slot.derived.clear()

    # -- rollback ----------------------------------------------------------------------------------------------

    @property
    def segments(self) -> list[Segment]:
        """The recorded forwards."""
        return self.timeline.segments

    @property
    def is_croppable(self) -> bool:
        """Always True: transformers asks before anything is recorded, and `crop` raises if it cannot."""
        return True

    def stop_recording(self) -> None:
        """Drop the rollback records and record no more."""
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
        """Remove the last ``-tokens_to_remove`` positions, and drop the rollback records; 0 only drops the records.

        Raises:
            ValueError: for a positive number, or for more positions than recorded; the cache is unchanged then.
            RuntimeError: if nothing is recorded, see `activate_past_recording`.
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
    """The cache that `generate` makes by default.

    Args:
        config: the model's config.
        offloading: passed to transformers, which offloads only layers of keys and values: the states stay.
    """

    def __init__(self, config: Any, offloading: bool = False):
        self._setup(config, offloading)

    @property
    def is_compileable(self) -> bool:
        """False, since states are rebound; `generate` would otherwise compile every call on a GPU."""
        return False


class ArchStaticCache(RecurrentCache, StaticCache):
    """A cache of buffers at fixed addresses, for compiled decoding and CUDA graphs.

    Args:
        config: the model's config.
        max_cache_len: number of positions that growing states (keys and values) can hold; other states have no limit.
            One position more is a ValueError, or an index out of bounds in a compiled forward.
        offloading: as for `ArchDynamicCache`.
    """

    is_static = True

    def __init__(self, config: Any, max_cache_len: int, offloading: bool = False):
        self.max_cache_len = max_cache_len
        self._setup(config, offloading)

    def early_initialization(
        self, batch_size: int, num_heads: Any, head_dim: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate every buffer now; transformers calls this before it compiles a chunked prefill."""
        max_length = self.max_cache_len or 0  # a growing state without columns is empty
        for _, place in self._places():
            shape = [max_length if size is None else size for size in place.spec.shape]
            place.store(torch.zeros(batch_size, *shape, dtype=place.spec.dtype or dtype, device=device))


def adopt(cache: Cache, config: Any) -> RecurrentCache:
    """Turn a `DynamicCache` or `StaticCache` of transformers into a cache of this library, in place.

    Keys and values that it holds, such as a prefix of prefix tuning, are kept for layers of full attention.

    Raises:
        ValueError: for a cache of another kind of model, or one with contents that a mixer cannot start from.
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
