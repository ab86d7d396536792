"""A prefix cache: prompts that share a prefix with earlier prompts start from stored states."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

import torch
from peft import PeftModel
from torch import nn

from hf_archs.cache.call import NAME
from hf_archs.cache.recurrent import ArchDynamicCache
from hf_archs.cache.slot import States
from hf_archs.cache.stored import backbone_of


class StateCache:
    """A prefix cache: the states of one model after earlier prompts, least recently used first out. Thread-safe.

    A recurrent state belongs to one position and cannot be cut. States are therefore kept after each prompt and at the
    end of a prefix that two prompts share, such as a system prompt.

    Args:
        model: the model that computes the states. Call `clear` after a change of its weights.
        max_bytes: upper limit of the bytes of all kept states.

    Raises:
        ValueError: for a negative ``max_bytes``, or a model with a prompt adapter, whose virtual tokens come before
            the prompt.
    """

    def __init__(self, model: nn.Module, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; allowed are 0 and more")
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type.value
            raise ValueError(f"the adapter is {kind}; allowed is one without virtual tokens before the prompt")
        self.backbone, self.max_bytes = backbone_of(model), max_bytes
        self._kept: OrderedDict[tuple[int, ...], States] = OrderedDict()  # by tokens, the most recently used last
        self._lock = threading.RLock()

    def read(self, input_ids: torch.Tensor) -> ArchDynamicCache:
        """A cache of all tokens of a prompt except the last, which is left to `generate`.

        The model reads only the tokens after the longest stored prefix.

        Args:
            input_ids: (1, l), without padding.

        Raises:
            ValueError: for another shape.
        """
        if input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.shape[1]:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; allowed is (1, length)")
        key = _key(input_ids[:, :-1])
        cache = ArchDynamicCache(self.backbone.config)
        with self._lock:
            common = [common_prefix(key, kept) for kept in self._kept]
            position = self.known(input_ids)
            if position:
                self._kept.move_to_end(key[:position])
                cache.load_state_dict(self._kept[key[:position]])
        parting = max(common, default=0)
        for end in sorted({parting, input_ids.shape[1] - 1}):
            if end > position:
                with torch.no_grad():
                    self.backbone(input_ids[:, position:end], use_cache=True, **{NAME: cache})
                self.keep(input_ids[:, :end], cache)
                position = end
        return cache

    def keep(self, input_ids: torch.Tensor, cache: ArchDynamicCache) -> None:
        """Keep a copy of the states in ``cache``, which has read ``input_ids``, (1, l).

        Raises:
            ValueError: if it has read another number of tokens.
        """
        if input_ids.shape != (1, cache.get_seq_length()):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; allowed is (1, {cache.get_seq_length()}), the tokens "
                "that the cache has read"
            )
        states = cache.state_dict()
        with self._lock:
            self._kept[_key(input_ids)] = states
            self._kept.move_to_end(_key(input_ids))
            while self.num_bytes() > self.max_bytes:
                self._kept.popitem(last=False)

    def known(self, input_ids: torch.Tensor) -> int:
        """Number of tokens of a prompt, (1, l), that `read` would not read: those of its longest stored prefix."""
        key = _key(input_ids[:, :-1])
        with self._lock:
            return max((len(kept) for kept in self._kept if key[: len(kept)] == kept), default=0)

    def num_bytes(self) -> int:
        """Bytes of all kept states."""
        with self._lock:
            return sum(tensor.nbytes for states in self._kept.values() for tensor in states.values())

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop all kept states."""
        with self._lock:
            self._kept.clear()


def _key(input_ids: torch.Tensor) -> tuple[int, ...]:
    return tuple(input_ids[0].tolist())


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
