"""Errors and warnings that more than one part of the library gives."""

import difflib
import importlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from huggingface_hub.errors import StrictDataclassError


class CheckpointMismatch(RuntimeError):
    """A checkpoint does not fit its config."""


def similar(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Those of the ``known`` names that are nearly ``name``, the nearest first.

    Args:
        most: how many of them.
        cutoff: how near, from 0 to 1, the same name.
    """
    return difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)


def did_you_mean(near: Sequence[str], otherwise: str = "") -> str:
    """The question in the refusal of a name, whether one of those ``near`` it is meant; where none is, the other."""
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def reason(error: BaseException) -> str:
    """An error in one line; of a refused field, what its check says."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def moved(old: str, *new: str, **renamed: str) -> None:
    """Let a module of 0.1 be imported for one release more: each name in it warns, and is that of a module of today.

    Args:
        old: the module as it was called; the package that it stands in is imported.
        new: the modules that its names are looked for in.
        renamed: names that are called otherwise today, by the old ones.
    """
    module = ModuleType(old, f"Names that have moved to {' and '.join(new)}.")

    def find(name: str) -> Any:
        called = renamed.get(name, name)
        for place in () if name.startswith("__") else new:
            if hasattr(found := importlib.import_module(place), called):
                value = getattr(found, called)
                home = value.__module__ if getattr(value, "__module__", None) in new else place
                message = f"{old}.{name} is {home}.{called} now; the next release has no other name for it"
                warnings.warn(message, FutureWarning, stacklevel=2)
                return value
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    module.__getattr__ = find  # type: ignore[method-assign]
    package, _, last = old.rpartition(".")
    setattr(sys.modules[package], last, module)
    sys.modules[old] = module


def needs(module: str, purpose: str, extra: str) -> Any:
    """The module, imported.

    Raises:
        ImportError: where it is missing; it names the extra of hf-archs that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {error.name}: pip install 'hf-archs[{extra}]'") from error
