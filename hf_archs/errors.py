"""Errors that more than one part of the library raises."""

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub.errors import (
    StrictDataclassError,
)


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


def needs(module: str, purpose: str, extra: str) -> Any:
    """The module, imported.

    Raises:
        ImportError: where it is missing; it names the extra of hf-archs that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {error.name}: pip install 'hf-archs[{extra}]'") from error
