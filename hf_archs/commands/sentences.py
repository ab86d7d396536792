"""The errors that a user's input can cause, each as one sentence."""

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
    """A check of a command's own failed."""


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
    """Whether something could not be written for want of room; safetensors and torch say so in words of theirs."""
    return any(
        (isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(link) for words in ("(os error 28)", "unexpected pos", "PytorchStreamWriter failed"))
        for link in _chain(error)
    )


def sentence(error: BaseException) -> str:
    """One line that says what was wrong; the cause of a Hub's refusal is looked up in the chain of exceptions."""
    from huggingface_hub import constants

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            said = _one_line(link.server_message or str(link))
            what = f"the Hub at {constants.ENDPOINT} refused {link.response.url.path} ({status}): {said}"
            if isinstance(link, GatedRepoError):
                return f"{what}; ask for access on the repository's page"
            if isinstance(link, RepositoryNotFoundError):
                return f"{what}; check the name, and HF_TOKEN where the repository is private"
            if isinstance(link, RevisionNotFoundError):
                return what
            return f"{what}; a token with the role 'write' is needed" if status in (401, 403) else what
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
    """Print the error's sentence to stderr, the traceback too where HF_ARCHS_DEBUG is set; gives the exit status 2."""
    if os.environ.get("HF_ARCHS_DEBUG"):
        traceback.print_exception(error)
    print(f"error: {sentence(error)}", file=sys.stderr)
    return 2
