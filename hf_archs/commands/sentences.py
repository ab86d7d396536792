"""The errors that user input can cause, each as one sentence."""

import os
import sys
import traceback

import httpx2
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_archs.errors import CheckpointMismatch, is_full_disk, reason
from hf_archs.native.hub import failure


class CheckFailed(RuntimeError):
    """A command's own check of its results failed."""


EXPECTED = (
    CheckFailed,
    CheckpointMismatch,
    ValueError,
    OSError,
    ImportError,
    StrictDataclassError,
    SafetensorError,
    httpx2.HTTPError,
)


def is_expected(error: BaseException) -> bool:
    """Whether an error is of these, or comes of a failed transfer with the Hub."""
    return isinstance(error, EXPECTED) or failure(error) is not None


def sentence(error: BaseException) -> str:
    """The error as one line; a failed transfer with the Hub is looked up in the chain of exceptions."""
    said = failure(error)
    if said is None:
        said = f"the disk is full ({reason(error)}); make room" if is_full_disk(error) else reason(error)
    return said


def report(error: BaseException) -> int:
    """Print the error's sentence to stderr, and its traceback if HF_ARCHS_DEBUG is set. Returns the exit status 2."""
    if os.environ.get("HF_ARCHS_DEBUG"):
        traceback.print_exception(error)
    print(f"error: {sentence(error)}", file=sys.stderr)
    return 2
