"""One call of a model: the names of its cache, and values for the modules below it, for each thread and never on a
module.

A value that a module kept would outlive a call that fails, and two threads, or the replicas of `DataParallel`, would
write over each other's.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

OLD_NAME, NEW_NAME = "past_key_values", "cache"  # of a cache in forwards and outputs of transformers, to 5.23 and since
NAME = NEW_NAME if NEW_NAME in BaseModelOutputWithPast.__dataclass_fields__ else OLD_NAME  # in the installed release


class _Call(threading.local):
    """The values of this thread.

    Attributes:
        site: which of the layers that share a module is running; see `hf_archs.model.shared_weights`.
        pairs: which tokens see each other, a `hf_archs.layers.masks.Pairs`; None for all that are before them.
        show: gets the weights of attention, (b, h, l, columns), and gives what stands for them; None if nobody looks.
        generating: whether `generate` is running, so that the weights stay as they are from one token to the next.
        drawn: how many tokens `generate` has put behind the prompt: ones that real tokens have, in the mask.
        card: the user's own in the folder that a model is saved into, as long as it is pushed from there.
        reading: the checkpoint that ``from_pretrained`` is reading, where every weight of it has to find its place.
    """

    site: int = 0
    pairs: Any = None
    show: Callable[[torch.Tensor], torch.Tensor] | None = None
    generating: bool = False
    drawn: int = 0
    card: bytes | None = None
    reading: Any = None


call = _Call()


@contextlib.contextmanager
def during(**values: Any) -> Iterator[None]:
    """Set values of `call` for the length of a block, whatever becomes of it."""
    before = {name: getattr(call, name) for name in values}
    for name, value in values.items():
        setattr(call, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(call, name, value)
