"""Downloads from the Hub: weight files compared with the Hub's sha256, and each failure as one sentence."""

import contextlib
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from hf_archs.errors import chain, is_full_disk

CHECKED = ".hf_archs_checked"  # folder in the cache's folder of a repository: the state of each file that was compared


class TransferError(OSError):
    """A failed transfer with the Hub; the message is one sentence."""


def check_downloads(files: Iterable[str | os.PathLike]) -> None:
    """Compare weight files in the Hub's cache with their sha256, which the cache has as their names.

    A file is read once, after its download, and again after a change of its size or time.

    Args:
        files: weight files; others than downloaded ones are passed over.

    Raises:
        TransferError: an OSError, if a file has another content than on the Hub; it names the file.
    """
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(_check_download, files):
            pass


def _check_download(file: str | os.PathLike) -> None:
    blob = _blob(Path(file))
    if blob is None:
        return
    found = blob.stat()
    state = f"{found.st_size} {found.st_mtime_ns}"
    record = blob.parent.parent / CHECKED / blob.name
    with contextlib.suppress(OSError):  # there is none, or it is another user's
        if record.read_text() == state:
            return
    with blob.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != blob.name:
        raise TransferError(
            f"{Path(file).name} in the cache is not the file on the Hub: its sha256 is {sha256[:16]}..., and the Hub's "
            f"is {blob.name[:16]}...; delete {blob.resolve()}, and the next load fetches it again"
        )
    with contextlib.suppress(OSError):  # a cache that cannot be written is compared at every load
        record.parent.mkdir(exist_ok=True)
        record.write_text(state)


def _blob(file: Path) -> Path | None:
    """The file of the Hub's cache that ``file``, in a snapshot, is a link to, if its name is a sha256."""
    if not file.is_symlink():
        return None
    blob = file.parent / file.readlink()  # one step only: the blob may be a link into a store of several repositories
    return blob if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else None


def failure(error: BaseException, outer: BaseException | None = None) -> str | None:
    """The failure of a transfer from or to the Hub that caused ``error``, as one sentence; None for other errors.

    Args:
        outer: an exception that the caller was handling already, which is no cause.
    """
    links, endpoint = list(chain(error, outer)), constants.ENDPOINT
    for link in links:
        if isinstance(link, TransferError):
            return str(link)
        if isinstance(link, HfHubHTTPError):
            return _refusal(link)
        unreadable = isinstance(link, JSONDecodeError) and _raised_in(link, "huggingface_hub")
        if unreadable or isinstance(link, FileMetadataError):
            found = str(link).partition(",")[0]
            return f"{endpoint} does not answer as a Hub ({found}); check HF_ENDPOINT, and the network for a login page"
    if is_full_disk(error) and any(_raised_in(link, "_download_to_tmp_and_move") for link in links):
        return "the disk of the Hub's cache is full; make room, or set HF_HOME to a folder on another disk"
    for link in links:
        if isinstance(link, OfflineModeIsEnabled):
            return f"{_first_line(error)}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
        if isinstance(link, httpx2.TooManyRedirects):
            return f"the Hub at {endpoint} redirects in a circle ({_one_line(str(link))}); check HF_ENDPOINT"
        if isinstance(link, httpx2.TransportError | ConnectionError):
            return (
                f"the Hub at {endpoint} cannot be reached ({_one_line(str(link))}); check the network and HF_ENDPOINT"
            )
        if _raised_in(link, "xet_get") or _raised_in(link, "_upload_xet_files"):
            return (
                f"the transfer by Xet with the Hub at {endpoint} failed ({_one_line(str(link))}); try again, or with "
                "HF_HUB_DISABLE_XET=1 by plain HTTP"
            )
        if "Consistency check failed" in str(link):
            return f"the Hub at {endpoint} sent less or more than it announced ({_first_line(link)}); try again"
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub at {endpoint} cannot be reached, and the cache lacks the file: {_first_line(error)}"
    return None


def _refusal(error: HfHubHTTPError) -> str:
    request, status = error.response.request, error.response.status_code
    message = _one_line(error.server_message or str(error))
    said = f"the Hub at {constants.ENDPOINT} refused {request.url.path} ({status}): {message}"
    if isinstance(error, GatedRepoError):
        return f"{said}; ask for access on the repository's page"
    if isinstance(error, RepositoryNotFoundError):
        return f"{said}; check the name, and HF_TOKEN where the repository is private"
    if isinstance(error, RevisionNotFoundError):
        return said
    if status in (401, 403):
        role = "of a user who may read it" if request.method in ("GET", "HEAD") else "with the role 'write'"
        return f"{said}; a token {role} is needed"
    return said


@contextlib.contextmanager
def one_sentence(source: str | os.PathLike | None, where: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: a failed transfer with the Hub is a `TransferError`, which is an OSError.

    Args:
        source: folder or repository that is read.
        where: the arguments of ``from_pretrained`` that locate and fetch files.
    """
    outer = sys.exception()
    try:
        yield
    except (OSError, RuntimeError, httpx2.HTTPError) as error:
        said = failure(error, outer)
        if said is None and "does not appear to have a file named" in str(error):
            said = _withheld(source, where, outer)
        if said is None:
            raise
        raise TransferError(said) from error


def _withheld(source: str | os.PathLike | None, where: Mapping[str, Any], outer: BaseException | None) -> str | None:
    """The Hub's refusal to give the weights, which transformers takes for their absence; None if they are absent."""
    try:
        cached_file(source, SAFE_WEIGHTS_NAME, **where)  # type: ignore[arg-type]
    except OSError as refusal:
        return failure(refusal, outer)
    return None


def _raised_in(error: BaseException, name: str) -> bool:
    """Whether an error comes from a function, or from a package, of this name."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name in (frame.f_code.co_name, frame.f_globals["__name__"].partition(".")[0]) for frame in frames)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _first_line(error: BaseException) -> str:
    return _one_line(str(error).strip().partition("\n")[0]).rstrip(".")
