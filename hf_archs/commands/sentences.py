"""The errors that user input can cause, each as one sentence."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError

from hf_archs.errors import CheckpointMismatch, reason


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


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because the disk is full, which safetensors and torch report in other words."""
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(link) for words in ("(os error 28)", "unexpected pos", "PytorchStreamWriter failed"))
        for link in _chain(error)
    )


def sentence(error: BaseException) -> str:
    """The error as one line; the cause of a Hub's refusal is looked up in the chain of exceptions."""
    from huggingface_hub import constants

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            message = _one_line(link.server_message or str(link))
            refusal = f"the Hub at {constants.ENDPOINT} refused {link.response.url.path} ({status}): {message}"
            if isinstance(link, GatedRepoError):
                return f"{refusal}; ask for access on the repository's page"
            if isinstance(link, RepositoryNotFoundError):
                return f"{refusal}; check the name, and HF_TOKEN where the repository is private"
            if isinstance(link, RevisionNotFoundError):
                return refusal
            return f"{refusal}; a token with the role 'write' is needed" if status in (401, 403) else refusal
    for link in chain:
        if isinstance(link, OfflineModeIsEnabled):
            return f"{_first_line(error)}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
        if isinstance(link, httpx2.TransportError | ConnectionError):
            return (
                f"the Hub at {constants.ENDPOINT} cannot be reached ({_one_line(str(link))}); "
                "check the network and HF_ENDPOINT"
            )
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub at {constants.ENDPOINT} cannot be reached, and the cache lacks the file: {_first_line(error)}"
    return reason(error)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _first_line(error: BaseException) -> str:
    return _one_line(str(error).strip().partition("\n")[0]).rstrip(".")


def report(error: BaseException) -> int:
    """Print the error's sentence to stderr, and its traceback if HF_ARCHS_DEBUG is set. Returns the exit status 2."""
    if os.environ.get("HF_ARCHS_DEBUG"):
        traceback.print_exception(error)
    print(f"error: {sentence(error)}", file=sys.stderr)
    return 2
