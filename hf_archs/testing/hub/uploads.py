"""Uploads of large files: by LFS, whole or in parts, and by Xet."""

import base64
import fnmatch
import hashlib
import math
import os
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_archs.testing.hub.access import Access
from hf_archs.testing.hub.repository import HubError, Repository, folders_of

LARGE_FILE = 10 * 2**20  # bytes; a larger file is LFS regardless of its name


@dataclass
class _Upload:
    """The announced upload of one LFS object. The ticket in its URL is the permission, as in a signed URL."""

    repo: Repository
    sha256: str
    size: int
    chunk: int  # bytes of a part; 0 if the object is uploaded whole
    etags: list[str | None]  # the ETag of each part; None until the part has arrived


class Uploads(Access):
    """The endpoints for uploads before a commit."""

    def __init__(self, root: Path, users: Mapping[str, tuple[str, str]], multipart_threshold: int) -> None:
        super().__init__(root, users)
        self.multipart_threshold = multipart_threshold
        self.uploads: dict[str, _Upload] = {}

    async def preupload(self, request: Request) -> Response:
        """Return which files are LFS, which are ignored, and which exist already."""
        repo = self.open(request, "propose" if "create_pr" in request.query_params else "write")
        body = await request.json()
        files = self.commit_of(request, repo)["files"]

        def text_of(path: str) -> str:
            return repo.object(files[path]["sha256"]).read_text() if path in files else ""

        lfs = [line.split()[0] for line in text_of(".gitattributes").splitlines() if "filter=lfs" in line]
        gitignore = body.get("gitIgnore", text_of(".gitignore"))

        def answer(file: dict[str, Any]) -> dict[str, Any]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            large = binary or file["size"] > LARGE_FILE or any(_matches(path, pattern) for pattern in lfs)
            mode = "lfs" if large else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": _is_ignored(path, gitignore)}
            if path in files:  # lets the client omit unchanged files
                row["oid"] = files[path]["sha256" if files[path]["lfs"] else "oid"]
            return row

        return JSONResponse({"files": [answer(file) for file in body["files"]]})

    async def xet_write_token(self, request: Request) -> Response:
        """Return a ``local://`` store for an upload by Xet."""
        repo = self.open(request, "propose" if "create_pr" in request.query_params else "write")
        return _xet_token(_new_store(repo, "xet"))

    async def xet_read_token(self, request: Request) -> Response:
        """Return a ``local://`` store with the files of a revision that came by Xet."""
        import hf_xet

        repo = self.open(request)
        wanted = {entry["sha256"] for entry in self.commit_of(request, repo)["files"].values() if entry.get("xet")}
        store = _new_store(repo, "xet-read")
        with tempfile.TemporaryDirectory(dir=repo.folder) as made:
            with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{made}") as upload:
                for sha256 in wanted:
                    upload.start_upload_file(str(repo.object(sha256)), sha256=sha256)
            _copy_store(made, store)
        return _xet_token(store)

    async def lfs_batch(self, request: Request) -> Response:
        """Return the upload URLs of LFS objects."""
        body = await request.json()
        # an upload for a pull request has no ref, and needs only the right to propose
        repo = self.open(request, "write" if "ref" in body else "propose")
        return JSONResponse({"objects": [self._instruct(request, repo, promised) for promised in body["objects"]]})

    def _instruct(self, request: Request, repo: Repository, promised: dict[str, Any]) -> dict[str, Any]:
        sha256, size = promised["oid"], promised["size"]
        row = {"oid": sha256, "size": size}
        if repo.object(sha256).exists():
            return row
        ticket = secrets.token_urlsafe(32)
        chunk = self.multipart_threshold if size > self.multipart_threshold else 0
        parts = math.ceil(size / chunk) if chunk else 0
        self.uploads[ticket] = _Upload(repo, sha256, size, chunk, [None] * parts)
        upload: dict[str, Any] = {"href": f"{request.base_url}lfs/{ticket}"}
        if chunk:
            urls = {str(i): f"{upload['href']}/{i}" for i in range(1, parts + 1)}
            upload["header"] = urls | {"chunk_size": str(chunk)}
        verify = {"href": f"{str(request.url).removesuffix('/batch')}/verify"}
        return row | {"actions": {"upload": upload, "verify": verify}}

    def _upload_of(self, request: Request) -> tuple[str, _Upload]:
        ticket = request.path_params["ticket"]
        if ticket not in self.uploads:
            raise HubError(403, "this upload URL is not one of this Hub's")
        return ticket, self.uploads[ticket]

    async def upload(self, request: Request) -> Response:
        """Receive a whole object, or one part of it."""
        ticket, upload = self._upload_of(request)
        part = request.path_params.get("part")
        if (part is None) != (upload.chunk == 0) or not 1 <= (part or 1) <= max(1, len(upload.etags)):
            raise HubError(400, f"the upload has {len(upload.etags) or 'no'} parts; there is no part {part}")
        if part is None:
            file = upload.repo.folder / "incoming" / secrets.token_hex(8)
            sha256, _, size = await _receive(request.stream(), file, upload.size)
            upload.repo.adopt(file, upload.sha256, upload.size, (sha256, size))
            return Response()
        upload.etags[part - 1] = None
        expected = min(upload.chunk, upload.size - (part - 1) * upload.chunk)
        file = upload.repo.folder / "incoming" / f"{ticket}.{part}"
        _, md5, size = await _receive(request.stream(), file, expected)
        if size != expected:
            raise HubError(422, f"part {part} has {size} bytes, not {expected}")
        upload.etags[part - 1] = f'"{md5}"'
        return Response(headers={"ETag": f'"{md5}"'})

    async def complete(self, request: Request) -> Response:
        """Join the parts of a multipart upload."""
        ticket, upload = self._upload_of(request)
        body = await request.json()
        named = [(part["partNumber"], part["etag"]) for part in body["parts"]]
        if body["oid"] != upload.sha256 or named != list(enumerate(upload.etags, 1)) or None in upload.etags:
            raise HubError(422, "the parts named are not the parts that arrived")
        parts = [upload.repo.folder / "incoming" / f"{ticket}.{i}" for i, _ in named]
        whole = upload.repo.folder / "incoming" / ticket
        with whole.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target, 2**20)
                part.unlink()
        del self.uploads[ticket]
        upload.repo.adopt(whole, upload.sha256, upload.size)
        return JSONResponse({"success": True})

    async def lfs_verify(self, request: Request) -> Response:
        """Check that an object has arrived."""
        repo = self.open(request, "propose")
        body = await request.json()
        file = repo.object(body["oid"])
        if not file.exists() or file.stat().st_size != body["size"]:
            raise HubError(404, f"no object {body['oid']} of {body['size']} bytes")
        return JSONResponse({})


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern of ``.gitignore`` or ``.gitattributes`` matches ``path`` or a folder above it."""
    pattern = pattern.strip().rstrip("/")
    levels = [path, *folders_of([path])]
    if "/" not in pattern:
        levels = [level.rpartition("/")[2] for level in levels]
    return any(fnmatch.fnmatchcase(level, pattern.lstrip("/")) for level in levels)


def _is_ignored(path: str, gitignore: str) -> bool:
    ignored = False
    for line in gitignore.splitlines():  # the last line that matches decides
        if line.strip() and not line.startswith("#") and _matches(path, line.removeprefix("!")):
            ignored = not line.startswith("!")
    return ignored


async def _receive(stream: AsyncIterator[bytes], file: Path, limit: int) -> tuple[str, str, int]:
    """Write a request's body to ``file``, or nothing if it is longer than ``limit`` or cut off; (sha256, md5, size)."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    try:
        with file.open("wb") as target:
            async for piece in stream:
                size += len(piece)
                if size > limit:
                    raise HubError(422, f"the upload is longer than the {limit} bytes that were promised")
                sha256.update(piece)
                md5.update(piece)
                target.write(piece)
    except BaseException:
        file.unlink()
        raise
    return sha256.hexdigest(), md5.hexdigest(), size


def _new_store(repo: Repository, kind: str) -> Path:
    # Every token gets its own store, because hf_xet locks a store as long as its process lives.
    store = repo.folder / kind / secrets.token_hex(8)
    store.mkdir(parents=True)
    return store


def _xet_token(store: Path) -> Response:
    url, expires = f"local://{store}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "local", "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"casUrl": url, "accessToken": "local", "exp": expires}, headers=headers)


def take_from_xet(repo: Repository, wanted: set[str]) -> None:
    """Turn each ``local://`` store that holds a ``wanted`` sha256 into plain, verified objects.

    Raises:
        HubError: if a store is damaged.
    """
    for store in (repo.folder / "xet").glob("*"):
        held = {sha256: file for shard in store.rglob("shards/*.mdb") for sha256, file in _xet_files(shard)}
        if not wanted & held.keys():
            continue
        import hf_xet

        # A copy of the store is read, because the uploading client still holds the lock on the store's index.
        with tempfile.TemporaryDirectory(dir=repo.folder) as copy:
            _copy_store(store, copy)
            shutil.rmtree(store)
            try:
                with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                    for sha256, (xet_hash, size) in held.items():
                        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{copy}/{sha256}")
            except RuntimeError as error:
                raise HubError(422, f"the upload by Xet cannot be put together: {error}") from error
            for sha256, (xet_hash, size) in held.items():
                repo.adopt(Path(copy, sha256), sha256, size)
                repo.xet[sha256] = xet_hash


def _copy_store(source: Path | str, target: Path | str) -> None:
    def copy(file: str, to: str) -> None:
        shutil.copyfile(file, to) if file.endswith(".redb") else os.link(file, to)

    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=copy)


def _xet_files(shard: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """The files in a Xet metadata shard: (sha256, (Xet hash, size)).

    The layout is in the Xet protocol's specification, "File info section": a header of 48 bytes; for each file a
    sequence of 48-byte records (hash, flags and number of segments; the segments; their verification, if flagged; the
    sha256, if flagged); and a record of ones at the end.
    """

    def digest(record: bytes) -> str:  # hashes are little-endian words
        return "".join(record[i : i + 8][::-1].hex() for i in range(0, 32, 8))

    records = memoryview(shard.read_bytes()[48:])
    at = 0
    while bytes(records[at : at + 32]) != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", records, at + 32)
        size = sum(struct.unpack_from("<I", records, at + 48 * (i + 1) + 36)[0] for i in range(segments))
        xet_hash = digest(bytes(records[at : at + 32]))
        at += 48 * (1 + segments * (2 if flags & 1 << 31 else 1))
        if flags & 1 << 30:
            yield digest(bytes(records[at : at + 32])), (xet_hash, size)
            at += 48
