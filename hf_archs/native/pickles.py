"""Weights from a pickle, by torch's ``weights_only`` reader, which imports and calls nothing that the file names."""

from __future__ import annotations

import os
import pickle
import zipfile
from typing import Any

import torch


class _Nothing:
    """Stands for an object of any class that torch does not allow; the class itself is never imported."""

    def __new__(cls, *args: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _mapping(*args: Any) -> dict[Any, Any]:
    return {}


# classes whose items are set after construction, which torch allows for dicts only
_MAPPINGS = ("collections.defaultdict",)
_ALLOWED = "allowed is a pickle of tensors, as torch.save(model.state_dict(), ...) writes it"


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The state dict in a pickle written by `torch.save`: the whole content, or its entry ``state_dict``.

    Other entries may be of any class and are ignored (a checkpoint of PyTorch Lightning holds settings and states too).

    Raises:
        ValueError: if the file is not such a pickle, torch refuses to read it, or its state dict holds anything but
            tensors.
    """
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        stand_ins = [(_mapping if name in _MAPPINGS else _Nothing, name) for name in unsafe]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a truncated file, or one of another kind, can fail in any way
        # torch wraps the cause in the advice to read the file without ``weights_only``
        found = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
        why = " ".join(str(found).split()).partition(". ")[0].rstrip(".") or type(found).__name__
        raise ValueError(f"{os.fspath(path)} cannot be read as weights alone ({why}); {_ALLOWED}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{os.fspath(path)} holds no weights; {_ALLOWED}")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{os.fspath(path)} holds {name!r}, which is no tensor; {_ALLOWED}")
    return state
