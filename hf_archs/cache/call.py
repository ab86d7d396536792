"""Values of one model call, kept per thread for the modules below the model, and the names of the cache argument.

They are not attributes of modules: an attribute would outlive a call that fails, and two threads, or the replicas of
`DataParallel`, would overwrite each other's values.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

OLD_NAME, NEW_NAME = "past_key_values", "cache"  # the cache in transformers' forwards and outputs, up to 5.23 and later
NAME = NEW_NAME if NEW_NAME in BaseModelOutputWithPast.__dataclass_fields__ else OLD_NAME  # in the installed release


class _Call(threading.local):
    """The values of this thread.

    Attributes:
        site: index of the running layer among those that share a module; see `hf_archs.model.shared_weights`.
        pairs: the `hf_archs.layers.masks.Pairs` of a mask of four dimensions; None for causal attention.
        show: receives the attention weights (b, h, l, columns) and returns weights to use; None if none are recorded.
        generating: whether `generate` is running, during which the weights do not change.
        drawn: how many real tokens `generate` has appended to the prompt so far.
        card: the user's own model card in the folder being saved, while the model is pushed from there.
        shared: values of `once` by key, during a forward of one token; None otherwise.
        reading: the `hf_archs.native.reading.Reading` of a running ``from_pretrained``, which checks the checkpoint.
    """

    site: int = 0
    pairs: Any = None
    show: Callable[[torch.Tensor], torch.Tensor] | None = None
    generating: bool = False
    drawn: int = 0
    card: bytes | None = None
    reading: Any = None
    shared: dict[Any, Any] | None = None


call = _Call()


@contextlib.contextmanager
def during(**values: Any) -> Iterator[None]:
    """Set values of `call` inside a ``with`` block and restore them after it, also after an exception."""
    before = {name: getattr(call, name) for name in values}
    for name, value in values.items():
        setattr(call, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(call, name, value)


def once(key: Any, compute: Callable[[], Any]) -> Any:
    """A value that all layers share: in a forward of one token the first layer computes it, otherwise every layer."""
    shared = call.shared
    if shared is None:
        return compute()
    if key not in shared:
        shared[key] = compute()
    return shared[key]
