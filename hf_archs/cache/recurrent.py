"""The cache of recurrent models: states, rollback, save and load.

transformers' own layer objects hold the tensors; everything they cannot do (count tokens without keys, roll a
recurrence back, repeat and select batch rows) stands here, once, for the dynamic and the static cache.

Rollback replays. A state per token would cost what a recurrent model exists to avoid, so while transformers records
the past (assisted decoding), each mixer hands over the inputs of its recurrence, and `crop` runs the accepted prefix
again from the state before. Of a long forward only the last ``rollback_window`` positions are kept that way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.utils import is_torchdynamo_compiling

from hf_archs.cache.slot import KINDS, Record, Replay, Segment, Slot, States, turned
from hf_archs.call import NAME
from hf_archs.registry import StateSpec


class RecurrentCache(Cache):
    """What `ArchDynamicCache` and `ArchStaticCache` share; see the module's docstring."""

    is_static = False
    max_cache_len: int | None = None  # columns of growing states in a static cache; None where nobody said

    def _setup(self, config: Any, offloading: bool = False) -> None:
        plans = [config.layer_plan(i).states() for i in range(config.num_hidden_layers)]
        # transformers makes room for one state of each kind
        counts = [max((sum(s.kind == kind for s in specs.values()) for kind in KINDS), default=1) for specs in plans]
        Cache.__init__(self, [LinearAttentionLayer(number_of_states=max(n, 1)) for n in counts], offloading=offloading)
        self.rollback_window = 2  # logits_to_keep + 1; the backbone's causal head keeps it up to date
        self.segments: list[Segment] = []
        self.derived: dict[tuple[int, str], torch.Tensor] = {}  # see `Slot.once`
        self._records: dict[tuple[int, str], Record] = {}  # by layer and prefix of a slot
        self._specs: list[dict[str, StateSpec]] = []
        self._places: list[dict[str, tuple[str, int]]] = []  # of each state: its kind, and which of them it is
        for specs in plans:
            self._specs.append(specs)
            names = {kind: [n for n, spec in specs.items() if spec.kind == kind] for kind in KINDS}
            self._places.append({n: (spec.kind, names[spec.kind].index(n)) for n, spec in specs.items()})
        self._grows = any(spec.grows for specs in self._specs for spec in specs.values())
        self._length: Any = torch.zeros((), dtype=torch.long) if self.is_static else 0
        self._before: Any = torch.zeros((), dtype=torch.long)  # in a static cache, positions before this forward

    # -- counting ----------------------------------------------------------------------------------------------

    def begin(self, length: int, mask: torch.Tensor | None, device: torch.device) -> None:
        """Told by the model at the start of every forward: ``length`` more positions, ``mask`` of the real ones."""
        if self.is_static:
            if (
                self._grows
                and not is_torchdynamo_compiling()
                and self._length + length > (self.max_cache_len or math.inf)
            ):
                raise ValueError(
                    f"the static cache holds max_cache_len = {self.max_cache_len} positions; "
                    f"{int(self._length)} are there and {length} more do not fit"
                )
            if self._length.device != device:
                self._length, self._before = self._length.to(device), self._before.to(device)
                for counter in (self._length, self._before):
                    torch._dynamo.mark_static_address(counter)
            self._before.copy_(self._length)
            self._length.add_(length)
        else:
            self._length += length
        if self.is_recording_past(0):
            self.segments.append(Segment(length, mask))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen so far, pads included, whatever the layer."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer: transformers takes it for caches that do not know how long they are."""
        return [False] * len(self.layers)

    @property
    def batch_size(self) -> int:
        """The batch size of the states, -1 before the first token."""
        return next((tensor.shape[0] for _, tensor in self.held()), -1)

    @property
    def is_empty(self) -> bool:
        """Whether no token has been read yet."""
        return self.batch_size < 0

    # -- states ------------------------------------------------------------------------------------------------

    def slot(self, layer_idx: int) -> Slot:
        """The state of the mixer in layer ``layer_idx``."""
        return Slot(self, layer_idx)

    def place(self, layer_idx: int, name: str) -> tuple[Any, str, int]:
        """Where a state lives: the layer object, ``conv`` or ``recurrent``, and the index among its kind."""
        kind, index = self._places[layer_idx][name]
        return self.layers[layer_idx], kind, index

    def store(self, layer_idx: int, name: str, value: torch.Tensor) -> None:
        """Rebind the state (dynamic) or copy into its buffer, whose address stays (static)."""
        layer, kind, index = self.place(layer_idx, name)
        states = getattr(layer, f"{kind}_states")
        held = states.get(index)
        if self.grows_in_place(layer_idx, name):
            value = _last_columns(value, self.max_cache_len)  # type: ignore[arg-type]
            value = turned(value, -self._length.to(value.device))
        if held is not None and not self.is_static:
            states[index] = value
        elif held is not None and held.shape == value.shape:
            held.copy_(value)
        else:
            if self.is_static and self._specs[layer_idx][name].together:
                value = value.mT.contiguous().mT
            states[index] = value.clone() if self.is_static else value
            if self.is_static and not is_torchdynamo_compiling():
                torch._dynamo.mark_static_address(states[index])
            getattr(layer, f"is_{kind}_states_initialized")[index] = True
            if kind == "conv":
                layer.conv_kernel_size[index] = value.shape[-1]
            layer.device, layer.dtype = value.device, value.dtype
        layer.has_previous_state[index] = True

    def grows_in_place(self, layer_idx: int, name: str) -> bool:
        """Whether a state grows in a buffer of one size.

        There a column's place is that of its position in the cache, so that one more is one more to write. Everywhere
        else the last column is the last position: turned by the number of positions, one becomes the other.
        """
        return self.is_static and self.max_cache_len is not None and self._specs[layer_idx][name].grows

    def held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every state tensor with a stable name, ``layers.<i>.<state>``, as it lies in memory."""
        for layer_idx, specs in enumerate(self._specs):
            for name in specs:
                layer, kind, index = self.place(layer_idx, name)
                tensor = getattr(layer, f"{kind}_states").get(index)
                if tensor is not None:
                    yield f"layers.{layer_idx}.{name}", tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, the columns of growing states as mixers see them: the last one is the last position."""
        for key, tensor in self.held():
            _, layer_idx, name = key.split(".", 2)
            yield key, turned(tensor, self._length) if self.grows_in_place(int(layer_idx), name) else tensor

    def num_bytes(self) -> int:
        """Bytes that the states hold; for a pure recurrent model the same at every length."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.held())

    def state_dict(self) -> States:
        """All states and the number of positions: copies, as tensors that safetensors can write."""
        states = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors()}
        return {**states, "length": torch.as_tensor(self._length).clone()}

    def specs(self) -> dict[str, StateSpec]:
        """The states that there may be, by the names of `held`."""
        return {f"layers.{i}.{name}": spec for i, specs in enumerate(self._specs) for name, spec in specs.items()}

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
        self._length = self._length.fill_(length) if self.is_static else length
        for key in sorted(given):
            _, layer_idx, name = key.split(".", 2)
            self.store(int(layer_idx), name, states[key].clone())  # a caller may load it again

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function of the batch dimension to every state and every recorded input."""
        for layer_idx, specs in enumerate(self._specs):
            for name in specs:
                layer, kind, index = self.place(layer_idx, name)
                states = getattr(layer, f"{kind}_states")
                if states.get(index) is not None:
                    value = function(states[index])
                    if self.is_static and value.shape == states[index].shape:
                        states[index].copy_(value)
                    else:
                        states[index] = value
        for segment in self.segments:
            segment.mask = None if segment.mask is None else function(segment.mask)
        for record in self._records.values():
            record.before = {n: None if t is None else function(t) for n, t in record.before.items()}
            record.inputs = [{n: function(t) for n, t in inputs.items()} for inputs in record.inputs]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda t: t[indices.to(t.device)])

    def reset(self) -> None:
        super().reset()
        self._forget()
        self.derived.clear()
        self._length = self._length.zero_() if self.is_static else 0

    # -- rollback ----------------------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        return True

    def stop_recording(self) -> None:
        """Forget what was recorded and record no more."""
        self._forget()
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _forget(self) -> None:
        self.segments, self._records = [], {}

    def record(
        self, slot: tuple[int, str], before: dict[str, torch.Tensor | None], inputs: States, replay: Replay
    ) -> None:
        """Keep this forward's inputs; of a long one only the window, with the states brought up to its start."""
        record = self._records.setdefault(slot, Record(replay, before))
        segment = self.segments[-1]
        cut = segment.length - self.rollback_window
        batch, device = next((t.shape[0], t.device) for t in inputs.values())
        # rows of a padded batch would be cut at different places; assisted decoding has one row
        if cut > 0 and len(self.segments) == 1 and (batch == 1 or segment.mask is None):
            lengths = segment.tokens_in(cut, batch, device)
            record.before = dict(replay(inputs, record.before, lengths))
            start = cut if segment.mask is None else int(lengths[0])
            documents = inputs.get("seq_idx")
            if documents is not None and start > 0:  # a document that begins there has nothing before it: zeros
                begins = documents[:, start] != documents[:, start - 1]
                record.before = {
                    n: None if t is None else t.masked_fill(begins.view(-1, *[1] * (t.ndim - 1)), 0)
                    for n, t in record.before.items()
                }
            inputs = {name: t[:, start:].clone() for name, t in inputs.items()}
            record.first_cut = cut
        record.inputs.append(inputs)

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
        if not self.segments:
            raise RuntimeError("crop: nothing is recorded; call activate_past_recording() before the forward")
        keep = sum(segment.length for segment in self.segments) + tokens_to_remove
        cut = max((record.first_cut for record in self._records.values()), default=0)
        if keep < cut:
            raise ValueError(
                f"crop: {-tokens_to_remove} tokens cannot be taken back, only the last "
                f"{sum(s.length for s in self.segments) - cut} are recorded"
            )
        self._length = self._length.add_(tokens_to_remove) if self.is_static else self._length + tokens_to_remove
        for (layer_idx, prefix), record in self._records.items():
            states, left = record.before, keep
            for number, (segment, inputs) in enumerate(zip(self.segments, record.inputs)):
                batch, device = next((t.shape[0], t.device) for t in inputs.values())
                columns = min(segment.length, left)
                left -= columns
                lengths = segment.tokens_in(columns, batch, device)
                if number == 0 and cut:
                    lengths = lengths - segment.tokens_in(cut, batch, device)
                if columns:
                    states = dict(record.replay(inputs, states, lengths))
            for name, value in states.items():
                self._restore(layer_idx, prefix + name, value)
        self._forget()

    def _restore(self, layer_idx: int, name: str, value: torch.Tensor | None) -> None:
        if value is not None:
            self.store(layer_idx, name, value)
            return
        layer, kind, index = self.place(layer_idx, name)
        layer.has_previous_state[index] = False  # which is also that of a state of another kind
        states = getattr(layer, f"{kind}_states")
        if self.is_static:
            states[index].zero_()
        else:
            states[index] = None


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
        for layer_idx, specs in enumerate(self._specs):
            for name, spec in specs.items():
                layer, _, index = self.place(layer_idx, name)
                shape = [max_length if size is None else size for size in spec.shape]
                self.store(layer_idx, name, torch.zeros(batch_size, *shape, dtype=spec.dtype or dtype, device=device))
                layer.has_previous_state[index] = True  # zeros are the empty state: one graph for every chunk


def _last_columns(value: torch.Tensor, columns: int) -> torch.Tensor:
    """The last ``columns`` of the last dimension, after zeros where there are fewer."""
    value = value[..., max(value.shape[-1] - columns, 0) :]
    return torch.nn.functional.pad(value, (columns - value.shape[-1], 0))


def adopt(cache: Cache, config: Any) -> RecurrentCache:
    """Make a cache that a user built from transformers' classes one of ours, in place.

    Keys and values that it holds already, as those of prefix tuning, are taken over by attention to all tokens.

    Raises:
        ValueError: for a cache that was made for another kind of model, or holds what a mixer cannot begin with.
    """
    if isinstance(cache, RecurrentCache):
        return cache
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
            adopted.store(layer_idx, "key", k.mT)
            adopted.store(layer_idx, "value", v.mT)
            adopted.store(layer_idx, "position", torch.full((k.shape[0], 1), k.shape[2], device=k.device))
        adopted._length = given[0][0].shape[2]
    return adopted


def _holds_states(layer: Any) -> bool:
    return any(getattr(layer, "has_previous_state", {}).values())
