"""An embedded Hub: the Hugging Face Hub's protocol on loopback, as the real ``huggingface_hub`` client speaks it.

Test equipment. It lets a push and a pull run through the unchanged client with no account and no network, and it
checks what it is given: every object's sha256 and size, every part of a multipart upload, the parent of a commit,
the token behind each request. Use it inside a process::

    with EmbeddedHub() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("alice/tiny")
        subprocess.run(command, env=os.environ | hub.environment(home))  # transformers reads HF_ENDPOINT when imported

or beside one: ``python -m hf_archs.testing.hub --root DIR --port 0`` prints its endpoint on the first line (with
``--until-eof`` it ends with whoever holds the pipe to its standard input).

On disk a repository is one folder, ``<root>/<models|datasets|spaces>/<owner>/<name>``: ``repo.json`` (visibility, refs,
discussions), ``commits/<oid>.json`` (one commit with its whole file list) and ``objects/<sha256>`` (all content).
Object ids of files, folders and commits are git's own.

The client has two ways to upload a large file and the server cannot choose between them: with ``hf_xet`` installed it
uses Xet unless ``HF_HUB_DISABLE_XET=1`` is set or the content is an open file. For Xet this Hub hands out the folder of
a ``local://`` store, which ``hf_xet`` knows for tests, and turns what lies there into plain objects at the commit.
Downloads are always plain HTTP, because no file is announced with an ``X-Xet-Hash``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fnmatch
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

# token -> (user, role); "read" may look at the user's own repositories, "write" may change them
USERS = {"hf_write": ("alice", "write"), "hf_read": ("alice", "read"), "hf_other": ("bob", "write")}

KINDS = ("models", "datasets", "spaces")
MULTIPART_THRESHOLD = 64 * 2**20  # bytes; larger LFS objects arrive in parts of this size
LARGE_FILE = 10 * 2**20  # bytes; above it a file is LFS whatever its name
LFS_SUFFIXES = "7z arrow bin bz2 ckpt gz h5 joblib model msgpack npy npz onnx parquet pickle pkl pt pth safetensors tar"
GIT_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split())

Files = dict[str, dict[str, Any]]  # path -> {"oid": git id, "size": bytes, "sha256": of the content, "lfs": bool}


class HubError(Exception):
    """A refusal: the status, the sentence for ``X-Error-Message`` and what else the client reads."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **body: Any):
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        headers = {"X-Error-Message": message.encode("ascii", "replace").decode().replace("\n", " ")}
        self.headers = (
            headers | ({"X-Error-Code": code} if code else {}) | ({"X-Repo-Commit": commit} if commit else {})
        )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # the one form that the client reads


def _git_oid(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _lfs_entry(sha256: str, size: int) -> dict[str, Any]:
    return {"oid": _git_oid("blob", _pointer(sha256, size)), "size": size, "sha256": sha256, "lfs": True}


def _tree_oid(files: Files) -> str:
    leaves: list[tuple[str, str, str]] = []  # (name that git sorts by, mode, id)
    folders: dict[str, Files] = {}
    for path, entry in files.items():
        head, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(head, {})[rest] = entry
        else:
            leaves.append((head, "100644", entry["oid"]))
    leaves += [(f"{name}/", "40000", _tree_oid(inside)) for name, inside in folders.items()]
    body = b"".join(f"{mode} {name.rstrip('/')}\0".encode() + bytes.fromhex(oid) for name, mode, oid in sorted(leaves))
    return _git_oid("tree", body)


def _below(files: Files, folder: str) -> Files:
    return {path[len(folder) + 1 :]: entry for path, entry in files.items() if path.startswith(f"{folder}/")}


def _file_row(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    row = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
    if entry["lfs"]:
        pointer_size = len(_pointer(entry["sha256"], entry["size"]))
        row["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": pointer_size}
    return row


def _folder_row(path: str, files: Files) -> dict[str, Any]:
    return {"type": "directory", "oid": _tree_oid(_below(files, path)), "size": 0, "path": path}


def _folders(paths: Iterable[str]) -> set[str]:
    return {path[:i] for path in paths for i, letter in enumerate(path) if letter == "/"}


def _sha256_and_size(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


class _Repository:
    """One repository on disk; see this module's docstring for the layout."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.kind, self.owner, self.name = folder.parts[-3:]
        self.id = f"{self.owner}/{self.name}"
        self.meta: dict[str, Any] = json.loads((folder / "repo.json").read_text())
        self.refs: dict[str, str] = self.meta["refs"]

    @classmethod
    def create(cls, folder: Path, private: bool) -> _Repository:
        for name in ("commits", "objects", "incoming"):
            (folder / name).mkdir(parents=True)
        meta = {"private": private, "created": _now(), "refs": {}, "discussions": []}
        (folder / "repo.json").write_text(json.dumps(meta))
        repo = cls(folder)
        files = {".gitattributes": repo.store(GIT_ATTRIBUTES.encode())}
        repo.commit("refs/heads/main", None, files, "initial commit", "", repo.owner)
        return repo

    def save(self) -> None:
        new = self.folder / "repo.json.new"
        new.write_text(json.dumps(self.meta, indent=1))
        new.replace(self.folder / "repo.json")

    def object(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HubError(400, f"not a sha256: {sha256!r}")
        return self.folder / "objects" / sha256

    def store(self, content: bytes) -> dict[str, Any]:
        """Keep a small file and return its entry."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.object(sha256).write_bytes(content)
        return {"oid": _git_oid("blob", content), "size": len(content), "sha256": sha256, "lfs": False}

    def adopt(self, file: Path, sha256: str, size: int, found: tuple[str, int] | None = None) -> None:
        """Move an uploaded ``file`` to the objects, or delete it and refuse where it is not what was promised."""
        found = found or _sha256_and_size(file)
        if found != (sha256, size):
            file.unlink()
            raise HubError(422, f"the upload has sha256 {found[0]} and {found[1]} bytes, not {sha256} and {size}")
        file.replace(self.object(sha256))

    def commit(self, ref: str, parent: str | None, files: Files, title: str, message: str, author: str) -> str:
        """Write a commit with these files, move ``ref`` to it and return its id."""
        stamp = f"{author} <{author}@localhost> {int(time.time())} +0000"
        parents = f"parent {parent}\n" if parent else ""
        text = f"tree {_tree_oid(files)}\n{parents}author {stamp}\ncommitter {stamp}\n\n{title}\n\n{message}\n"
        oid = _git_oid("commit", text.encode())
        record: dict[str, Any] = {"oid": oid, "parent": parent, "title": title, "message": message, "author": author}
        record |= {"date": _now(), "files": dict(sorted(files.items()))}
        (self.folder / "commits" / f"{oid}.json").write_text(json.dumps(record, indent=1))
        self.refs[ref] = oid
        self.save()
        return oid

    def ref_of(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None for anything else."""
        candidates = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((ref for ref in candidates if ref in self.refs), None)

    def at(self, revision: str) -> dict[str, Any]:
        """The commit that a branch, a tag, a full ref or a commit id names."""
        ref = self.ref_of(revision)
        file = self.folder / "commits" / f"{self.refs[ref] if ref else revision}.json"
        if not ref and not (re.fullmatch("[0-9a-f]{40}", revision) and file.exists()):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return json.loads(file.read_text())

    def history(self, revision: str) -> Iterator[dict[str, Any]]:
        oid: str | None = revision
        while oid:
            commit = self.at(oid)
            yield commit
            oid = commit["parent"]

    def open_discussion(self, title: str, author: str, pull_request: bool) -> dict[str, Any]:
        discussion = {
            "num": len(self.meta["discussions"]) + 1,
            "title": title,
            "author": {"name": author},
            "createdAt": _now(),
            "status": "draft" if pull_request else "open",
            "repo": {"name": self.id, "type": self.kind[:-1]},
            "isPullRequest": pull_request,
            "events": [],
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
        }
        self.meta["discussions"].append(discussion)
        return discussion

    def take_from_xet(self, wanted: set[str]) -> None:
        """Turn the ``local://`` stores in which one of the ``wanted`` sha256 lies into plain, verified objects."""
        for store in (self.folder / "xet").glob("*"):
            held = {sha256: file for shard in store.rglob("shards/*.mdb") for sha256, file in _xet_files(shard)}
            if not wanted & held.keys():
                continue
            import hf_xet

            # The uploading client still holds the lock on the store's index, so a copy of the store is read.
            with tempfile.TemporaryDirectory(dir=self.folder) as copy:
                shutil.copytree(store, copy, dirs_exist_ok=True, copy_function=_copy_index_link_rest)
                shutil.rmtree(store)
                with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                    for sha256, (xet_hash, size) in held.items():
                        group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{copy}/{sha256}")
                for sha256, (_, size) in held.items():
                    self.adopt(Path(copy, sha256), sha256, size)


def _copy_index_link_rest(source: str, target: str) -> None:
    shutil.copyfile(source, target) if source.endswith(".redb") else os.link(source, target)


def _xet_files(shard: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    """The files that a Xet metadata shard describes: (sha256, (Xet hash, size)).

    The layout is that of the Xet protocol's specification, "File info section": after a header of 48 bytes, one
    sequence of 48-byte records a file (hash, flags and number of segments; the segments; their verification where
    the flag says so; the sha256 where the flag says so), and a record of ones at the end.
    """

    def digest(record: bytes) -> str:  # hashes are written as little-endian words
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


@dataclass
class _Upload:
    """What was promised for one LFS object; its ticket in the URL is the permission, as with a signed URL."""

    repo: _Repository
    sha256: str
    size: int
    chunk: int  # bytes of a part; 0 where the object comes whole
    etags: list[str | None]  # of the parts that have arrived


def _matches(path: str, pattern: str) -> bool:
    """Whether a line of ``.gitignore`` or ``.gitattributes`` names ``path`` or a folder above it."""
    pattern = pattern.strip().rstrip("/")
    levels = [path, *_folders([path])]
    if "/" not in pattern:
        levels = [level.rpartition("/")[2] for level in levels]
    return any(fnmatch.fnmatchcase(level, pattern.lstrip("/")) for level in levels)


def _is_ignored(path: str, gitignore: str) -> bool:
    ignored = False
    for line in gitignore.splitlines():  # the last line that matches decides
        if line.strip() and not line.startswith("#") and _matches(path, line.removeprefix("!")):
            ignored = not line.startswith("!")
    return ignored


def _card_metadata(card: str) -> dict[str, Any]:
    """The YAML block at a card's head, empty where there is none; ValueError for one that the Hub would refuse."""
    block = re.match(r"\s*---\r?\n(.*?\n)??---\s*(\n|$)", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1] or "") if block else None
    except yaml.YAMLError as error:
        raise ValueError(f"YAML: {error}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("the metadata must be a mapping")
    texts, lists = (
        ("pipeline_tag", "library_name"),
        ("license", "language", "tags", "datasets", "base_model", "metrics"),
    )
    for key, value in (metadata or {}).items():
        if key in texts and not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string')
        values = value if isinstance(value, list) and key != "license" else [value]
        if key in lists and not all(isinstance(item, str) for item in values):
            raise ValueError(f'"{key}" must be a string' + ("" if key == "license" else " or a list of strings"))
    return metadata or {}


def _checked_path(path: str) -> str:
    if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")) or "\0" in path:
        raise HubError(400, f"Invalid path in commit: {path!r}")
    return path


class _Hub:
    """The endpoints. None awaits anything between reading a repository and saving it, so they cannot interleave."""

    def __init__(self, root: Path, users: Mapping[str, tuple[str, str]], multipart_threshold: int):
        self.root = root.resolve()
        self.users = users
        self.multipart_threshold = multipart_threshold
        self.uploads: dict[str, _Upload] = {}

    def app(self) -> ASGIApp:
        api, repo, page = "/api/{kind}/{owner}/{name}", "{kind}/{owner}/{name}", "{owner}/{name}"
        table: list[tuple[str, str, Callable[[Request], Any]]] = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("POST", "/api/repos/create", self.create),
            ("DELETE", "/api/repos/delete", self.delete),
            ("PUT", "/lfs/{ticket}", self.upload),
            ("PUT", "/lfs/{ticket}/{part:int}", self.upload),
            ("POST", "/lfs/{ticket}", self.complete),
            ("GET", "/api/{kind}/{name}", self.info),
            ("GET", api, self.info),
            ("GET", f"{api}/revision/{{revision}}", self.info),
            ("GET", f"{api}/tree/{{revision}}", self.tree),
            ("GET", f"{api}/tree/{{revision}}/{{path:path}}", self.tree),
            ("POST", f"{api}/paths-info/{{revision}}", self.paths_info),
            ("GET", f"{api}/refs", self.list_refs),
            ("GET", f"{api}/commits/{{revision}}", self.commits),
            ("POST", f"{api}/branch/{{ref}}", self.create_branch),
            ("DELETE", f"{api}/branch/{{ref}}", self.delete_branch),
            ("POST", f"{api}/tag/{{revision}}", self.create_tag),
            ("DELETE", f"{api}/tag/{{ref}}", self.delete_tag),
            ("POST", f"{api}/discussions", self.discuss),
            ("GET", f"{api}/discussions/{{num:int}}", self.discussion),
            ("POST", f"{api}/preupload/{{revision}}", self.preupload),
            ("GET", f"{api}/xet-write-token/{{revision}}", self.xet_token),
            ("POST", f"{api}/commit/{{revision}}", self.commit),
        ]
        for place in (repo, page):  # models have no prefix
            table += [
                ("GET", f"/{place}/resolve/{{revision}}/{{path:path}}", self.resolve),
                ("POST", f"/{place}.git/info/lfs/objects/batch", self.lfs_batch),
                ("POST", f"/{place}.git/info/lfs/objects/verify", self.lfs_verify),
            ]
        table.append(("GET", "/{name}/resolve/{revision}/{path:path}", self.resolve))
        starlette = Starlette(
            routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in table],
            exception_handlers={
                HubError: _refuse,
                ClientDisconnect: _gone,
                KeyError: _malformed,
                ValueError: _malformed,
            },
        )

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            # Routing must see the path undecoded: a revision's slashes come as %2F and are no separators.
            await starlette({**scope, "path": scope["raw_path"].decode("ascii")}, receive, send)

        return app

    # Who asks, and for what

    def caller(self, request: Request) -> tuple[str | None, str]:
        """(user, role) of the request's token; (None, "none") without one."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token] if token else (None, "none")

    def folder(self, kind: str, repo_id: str) -> Path | None:
        """Where a repository lies or would lie; None for an id that cannot be one."""
        owner, _, name = repo_id.partition("/")
        fits = kind in KINDS and all(re.fullmatch(r"(?!\.)[\w.-]{1,96}", part) for part in (owner, name))
        return self.root / kind / owner / name if fits else None

    def open(self, request: Request, need: str = "read") -> _Repository:
        """The repository of the URL, for a caller who may ``read`` it, ``propose`` a change or ``write``."""
        place = request.path_params
        kind, repo_id = place.get("kind", "models"), "/".join(place[k] for k in ("owner", "name") if k in place)
        user, role = self.caller(request)
        folder = self.folder(unquote(kind), unquote(repo_id))
        repo = _Repository(folder) if folder and (folder / "repo.json").exists() else None
        if repo is None or (repo.meta["private"] and user != repo.owner):
            if user is None:  # an outsider cannot tell a private repository from a missing one
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if need != "read" and user is None:
            raise HubError(401, "Invalid username or password.")
        if need != "read" and role != "write":
            raise HubError(403, "Forbidden: this token may only read")
        if need == "write" and user != repo.owner:
            raise HubError(403, f"Forbidden: {user} may not write to {repo.id}")
        return repo

    def owner(self, request: Request, repo_id: str) -> Path:
        """The folder of a repository that the caller owns and may create or delete."""
        user, role = self.caller(request)
        folder = self.folder("models", repo_id)
        if folder is None:
            raise HubError(400, f"Invalid repository id: {repo_id!r}")
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or folder.parts[-2] != user:
            raise HubError(403, f"Forbidden: no right to create or delete under the namespace {folder.parts[-2]!r}")
        return folder

    def commit_of(self, request: Request, repo: _Repository) -> dict[str, Any]:
        return repo.at(unquote(request.path_params.get("revision", "main")))

    # The account and its repositories

    async def whoami(self, request: Request) -> Response:
        user, role = self.caller(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
        return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    async def validate_yaml(self, request: Request) -> Response:
        try:
            metadata = _card_metadata((await request.json())["content"])
        except ValueError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return JSONResponse({"errors": [], "warnings": [] if metadata else [warning]})

    async def _named(self, request: Request) -> tuple[dict[str, Any], Path, str]:
        """(body, folder, URL) of the repository in the body of a create or delete."""
        body = await request.json()
        repo_id = f"{body.get('organization') or self.caller(request)[0]}/{body['name']}"
        kind = f"{body.get('type') or 'model'}s"
        if kind not in KINDS:
            raise HubError(400, f"Invalid repository type: {body['type']!r}")
        folder = self.root / kind / self.owner(request, repo_id).relative_to(self.root / "models")
        return body, folder, f"{request.base_url}{'' if kind == 'models' else f'{kind}/'}{repo_id}"

    async def create(self, request: Request) -> Response:
        body, folder, url = await self._named(request)
        if folder.exists():
            raise HubError(409, f"You already created this {folder.parts[-3][:-1]} repo", url=url)
        repo = _Repository.create(folder, body.get("visibility") == "private")
        return JSONResponse({"url": url, "name": repo.id, "id": repo.id})

    async def delete(self, request: Request) -> Response:
        _, folder, _ = await self._named(request)
        if not folder.exists():
            raise HubError(404, "Repository not found", "RepoNotFound")
        shutil.rmtree(folder)
        return Response("OK")

    # What a repository holds

    def _info(self, repo: _Repository, commit: dict[str, Any]) -> dict[str, Any]:
        def text_of(path: str) -> str:
            entry = commit["files"].get(path)
            return repo.object(entry["sha256"]).read_text("utf-8", "replace") if entry else ""

        card: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # a card that the Hub cannot read is shown without its metadata
            card = _card_metadata(text_of("README.md"))
        tags = card.get("tags") or []
        return {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.owner,
            "sha": commit["oid"],
            "createdAt": repo.meta["created"],
            "lastModified": commit["date"],
            "private": repo.meta["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags if isinstance(tags, list) else [tags],
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in commit["files"]],
        }

    async def info(self, request: Request) -> Response:
        repo = self.open(request)
        commit = self.commit_of(request, repo)
        info = self._info(repo, commit)
        if "blobs" in request.query_params:
            for sibling in info["siblings"]:
                row = _file_row(sibling["rfilename"], commit["files"][sibling["rfilename"]])
                sibling |= {"size": row["size"], "blobId": row["oid"]}
                if "lfs" in row:
                    sibling["lfs"] = row["lfs"] | {"sha256": row["lfs"]["oid"]}
        return JSONResponse(info)

    async def tree(self, request: Request) -> Response:
        repo = self.open(request)
        commit = self.commit_of(request, repo)
        files = commit["files"]
        folder = unquote(request.path_params.get("path", "")).strip("/")
        if folder and not _below(files, folder):
            raise HubError(404, f"{folder} does not exist on {commit['oid']}", "EntryNotFound", commit["oid"])
        recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
        start = len(folder) + 1 if folder else 0

        def is_listed(path: str) -> bool:
            return path.startswith(f"{folder}/" if folder else "") and (recursive or "/" not in path[start:])

        folders = [_folder_row(path, files) for path in sorted(_folders(files)) if is_listed(path)]
        return JSONResponse(folders + [_file_row(path, entry) for path, entry in files.items() if is_listed(path)])

    async def paths_info(self, request: Request) -> Response:
        repo = self.open(request)
        files = self.commit_of(request, repo)["files"]
        paths = [path.rstrip("/") for path in parse_qs((await request.body()).decode()).get("paths", [])]
        rows = [_file_row(path, files[path]) for path in paths if path in files]
        return JSONResponse(rows + [_folder_row(path, files) for path in paths if _below(files, path)])

    async def resolve(self, request: Request) -> Response:
        repo = self.open(request)
        commit = self.commit_of(request, repo)
        path = unquote(request.path_params["path"])
        entry = commit["files"].get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit["oid"])
        headers = {"X-Repo-Commit": commit["oid"], "ETag": f'"{entry["oid"]}"'}
        if entry["lfs"]:
            headers["ETag"] = headers["X-Linked-Etag"] = f'"{entry["sha256"]}"'
            headers["X-Linked-Size"] = str(entry["size"])
        # FileResponse answers HEAD and Range; an LFS file is served here and not by a redirect, after which the
        # client would look for X-Repo-Commit in vain
        file, name = repo.object(entry["sha256"]), path.rpartition("/")[2]
        return FileResponse(file, headers=headers, media_type="application/octet-stream", filename=name)

    # Commits, branches, tags

    async def list_refs(self, request: Request) -> Response:
        repo = self.open(request)

        def under(prefix: str) -> list[dict[str, str]]:
            found = {ref: oid for ref, oid in repo.refs.items() if ref.startswith(prefix)}
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in found.items()]

        answer = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
        return JSONResponse(answer | {"pullRequests": under("refs/pr/")})

    async def commits(self, request: Request) -> Response:
        repo = self.open(request)
        history = repo.history(unquote(request.path_params["revision"]))
        rows = [
            {key: c[key] for key in ("title", "message", "date")} | {"id": c["oid"], "authors": [{"user": c["author"]}]}
            for c in history
        ]
        return JSONResponse(rows)

    def _create_ref(self, repo: _Repository, ref: str, revision: str) -> Response:
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.at(revision)["oid"]
        repo.save()
        return JSONResponse({})

    def _delete_ref(self, repo: _Repository, ref: str) -> Response:
        if ref not in repo.refs:
            raise HubError(404, f"Reference {ref} does not exist", "RevisionNotFound")
        if ref == "refs/heads/main":
            raise HubError(403, "Forbidden: cannot delete the main branch")
        del repo.refs[ref]
        repo.save()
        return JSONResponse({})

    async def create_branch(self, request: Request) -> Response:
        start = (await request.json()).get("startingPoint", "main")
        repo = self.open(request, "write")
        return self._create_ref(repo, f"refs/heads/{unquote(request.path_params['ref'])}", start)

    async def delete_branch(self, request: Request) -> Response:
        return self._delete_ref(self.open(request, "write"), f"refs/heads/{unquote(request.path_params['ref'])}")

    async def create_tag(self, request: Request) -> Response:
        tag = (await request.json())["tag"]
        repo = self.open(request, "write")
        return self._create_ref(repo, f"refs/tags/{tag}", unquote(request.path_params["revision"]))

    async def delete_tag(self, request: Request) -> Response:
        return self._delete_ref(self.open(request, "write"), f"refs/tags/{unquote(request.path_params['ref'])}")

    async def discuss(self, request: Request) -> Response:
        body = await request.json()
        repo = self.open(request, "propose")
        discussion = repo.open_discussion(body["title"], self.caller(request)[0] or "", body["pullRequest"])
        if discussion["isPullRequest"]:
            repo.refs[f"refs/pr/{discussion['num']}"] = repo.refs["refs/heads/main"]
        repo.save()
        return JSONResponse(discussion)

    async def discussion(self, request: Request) -> Response:
        discussions = self.open(request).meta["discussions"]
        num = request.path_params["num"]
        if not 1 <= num <= len(discussions):
            raise HubError(404, f"no discussion {num}")
        return JSONResponse(discussions[num - 1])

    # Uploads

    async def preupload(self, request: Request) -> Response:
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
            if path in files:  # lets the client leave out what has not changed
                row["oid"] = files[path]["sha256" if files[path]["lfs"] else "oid"]
            return row

        return JSONResponse({"files": [answer(file) for file in body["files"]]})

    async def xet_token(self, request: Request) -> Response:
        repo = self.open(request, "propose" if "create_pr" in request.query_params else "write")
        # A folder of its own for every upload, because hf_xet locks a store for as long as its process lives.
        url, expires = f"local://{repo.folder}/xet/{secrets.token_hex(8)}", int(time.time()) + 3600
        Path(url.removeprefix("local://")).mkdir(parents=True)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "local", "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"casUrl": url, "accessToken": "local", "exp": expires}, headers=headers)

    async def lfs_batch(self, request: Request) -> Response:
        body = await request.json()
        # an upload for a pull request carries no ref, and may come from anyone who can open one
        repo = self.open(request, "write" if "ref" in body else "propose")
        return JSONResponse({"objects": [self._instruct(request, repo, promised) for promised in body["objects"]]})

    def _instruct(self, request: Request, repo: _Repository, promised: dict[str, Any]) -> dict[str, Any]:
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
        """One whole object, or one part of it."""
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
        repo = self.open(request, "propose")
        body = await request.json()
        file = repo.object(body["oid"])
        if not file.exists() or file.stat().st_size != body["size"]:
            raise HubError(404, f"no object {body['oid']} of {body['size']} bytes")
        return JSONResponse({})

    async def commit(self, request: Request) -> Response:
        proposed = "create_pr" in request.query_params
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        repo = self.open(request, "propose" if proposed else "write")
        user, revision = self.caller(request)[0] or "", unquote(request.path_params["revision"])
        head = repo.at(revision)
        if not lines or lines[0]["key"] != "header":
            raise HubError(400, "a commit begins with its header")
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent and not head["oid"].startswith(parent.lower()):
            raise HubError(412, f"A commit has happened since: {revision} is at {head['oid']}, not {parent}")
        ref = repo.ref_of(revision)
        if not proposed and (ref is None or ref.startswith("refs/tags/")):
            raise HubError(400, f"can only commit to a branch or a pull request, and {revision!r} is neither")
        files = dict(head["files"])
        repo.take_from_xet({line["value"]["oid"] for line in lines if line["key"] == "lfsFile"})
        for line in lines[1:]:
            _apply(repo, files, line["key"], line["value"])
        if clash := _folders(files) & files.keys():
            raise HubError(400, f"{min(clash)} would be both a file and a folder")
        answer = {}
        title, message = header["summary"], header.get("description", "")
        if proposed:
            num = repo.open_discussion(title, user, True)["num"]
            ref = f"refs/pr/{num}"
            answer["pullRequestUrl"] = f"{self._page(request, repo)}/discussions/{num}"
        oid = repo.commit(str(ref), head["oid"], files, title, message, user)
        url = f"{self._page(request, repo)}/commit/{oid}"
        return JSONResponse(answer | {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _page(self, request: Request, repo: _Repository) -> str:
        return f"{request.base_url}{'' if repo.kind == 'models' else f'{repo.kind}/'}{repo.id}"


def _apply(repo: _Repository, files: Files, key: str, value: dict[str, Any]) -> None:
    """Apply one line of a commit to ``files``."""
    path = _checked_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
    if key == "file":
        if value.get("encoding", "utf-8") == "base64":
            content = base64.b64decode(value["content"], validate=True)
        else:
            content = value["content"].encode()
        files[path] = repo.store(content)
    elif key == "lfsFile":
        file = repo.object(value["oid"])
        if not file.exists():
            raise HubError(400, f"{path} points to the LFS object {value['oid']}, which was never uploaded")
        size = file.stat().st_size
        if value.get("size", size) != size:
            raise HubError(400, f"{path} is said to have {value['size']} bytes, and has {size}")
        files[path] = _lfs_entry(value["oid"], size)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
        if not gone:
            what = "file" if key == "deletedFile" else "folder"
            raise HubError(404, f"A {what} with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"unknown operation in a commit: {key!r}")


async def _receive(stream: AsyncIterator[bytes], file: Path, limit: int) -> tuple[str, str, int]:
    """Write a request's body to ``file``; (sha256, md5, size). Nothing is left of one above ``limit`` or cut short."""
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


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return JSONResponse(error.body, error.status, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


async def _malformed(request: Request, error: Exception) -> Response:
    return await _refuse(request, HubError(400, f"malformed request: {type(error).__name__}: {error}"))


class EmbeddedHub:
    """A Hub on 127.0.0.1 for as long as the ``with`` block lasts, served from a thread of this process.

    Args:
        root: where the repositories lie, kept afterwards; a temporary folder, deleted afterwards, without it.
        users: token -> (user name, "read" or "write").
        multipart_threshold: bytes; an LFS object above it must be uploaded in parts of this size.
        port: 0 for any free one.

    Attributes:
        endpoint: the URL to give to the client, ``http://127.0.0.1:<port>``.
        token: the first of the tokens that may write.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        users: Mapping[str, tuple[str, str]] = USERS,
        multipart_threshold: int = MULTIPART_THRESHOLD,
        port: int = 0,
    ):
        for token, (_, role) in users.items():
            if role not in ("read", "write"):
                raise ValueError(f"the role of {token!r} is {role!r}; allowed are read, write")
        if multipart_threshold < 1:
            raise ValueError(f"multipart_threshold is {multipart_threshold}; it must be at least 1")
        self._temporary = tempfile.TemporaryDirectory(prefix="hf-archs-hub-") if root is None else None
        self.root = Path(self._temporary.name if self._temporary else str(root))
        self.token = next((token for token, (_, role) in users.items() if role == "write"), "")
        # Listening before the server runs: a client that comes early waits in the backlog.
        self._socket = socket.create_server(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # 40 ms an answer without it
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app = _Hub(self.root, users, multipart_threshold).app()
        config = uvicorn.Config(
            app, lifespan="off", http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=2
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve in this thread until the server is told to stop."""
        self._server.run(sockets=[self._socket])

    def environment(self, home: Path | str) -> dict[str, str]:
        """The variables that point a new process's client to this Hub, with its caches under ``home``."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_XET_CACHE": str(Path(home) / "xet"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> EmbeddedHub:
        self._thread = threading.Thread(target=self.run, name="embedded-hub", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        if self._temporary:
            self._temporary.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an embedded Hub on 127.0.0.1; its endpoint is the first line.")
    parser.add_argument("--root", type=Path, required=True, help="the folder of the repositories")
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes any free port")
    parser.add_argument(
        "--until-eof", action="store_true", help="stop when standard input ends, as it does with whoever holds its pipe"
    )
    options = parser.parse_args()
    hub = EmbeddedHub(options.root, port=options.port)
    print(hub.endpoint, flush=True)
    if options.until_eof:
        threading.Thread(target=_stop_at_end_of_input, args=(hub._server,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        hub.run()


def _stop_at_end_of_input(server: uvicorn.Server) -> None:
    sys.stdin.read()
    server.should_exit = True


if __name__ == "__main__":
    main()
