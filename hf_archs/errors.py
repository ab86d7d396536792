"""Errors, and texts of errors and warnings, that several modules use."""

import difflib
import errno
import importlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

from huggingface_hub.errors import StrictDataclassError


class CheckpointMismatch(RuntimeError):
    """A checkpoint does not fit its config."""


def similar(name: str, known: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> list[str]:
    """The ``known`` names that are similar to ``name``, the most similar first.

    Args:
        most: the largest number of names.
        cutoff: the lowest similarity, from 0 to 1 (equal).
    """
    return difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)


def did_you_mean(near: Sequence[str], otherwise: str = "") -> str:
    """The part of an error that suggests the names ``near``; ``otherwise`` if there are none."""
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def reason(error: BaseException) -> str:
    """The message of an error in one line; for a refused config field, the message of its check."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def chain(error: BaseException, outer: BaseException | None = None) -> Iterator[BaseException]:
    """The error and its causes, as a traceback shows them, the newest first, up to ``outer``, which is left out."""
    link: BaseException | None = error
    while link is not None and link is not outer:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full, which safetensors and torch report in other words."""
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(link) for words in ("(os error 28)", "unexpected pos", "PytorchStreamWriter failed"))
        for link in chain(error)
    )


def moved(old: str, *new: str, **renamed: str) -> None:
    """Keep a module of 0.1 importable for one more release; each name that is taken from it warns.

    Args:
        old: the old name of the module; its package is imported already.
        new: the modules in which its names are now.
        renamed: new names by old ones.
    """
    module = ModuleType(old, f"Names that have moved to {' and '.join(new)}.")

    def find(name: str) -> Any:
        called = renamed.get(name, name)
        for place in new:
            if not name.startswith("__") and hasattr(found := importlib.import_module(place), called):
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
    """Import a module of an optional dependency.

    Raises:
        ImportError: if it is missing, naming the extra of hf-archs to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {error.name}: pip install 'hf-archs[{extra}]'") from error
