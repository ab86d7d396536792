"""One repository on disk: files and commits with git's object ids."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Files = dict[str, dict[str, Any]]  # path -> {"oid": git id, "size": bytes, "sha256": of the content, "lfs", "xet"}
LFS_SUFFIXES = "7z arrow bin bz2 ckpt gz h5 joblib model msgpack npy npz onnx parquet pickle pkl pt pth safetensors tar"
GIT_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split())


class HubError(Exception):
    """A refusal: the status, the sentence for ``X-Error-Message``, and the other headers and fields of the answer."""

    def __init__(
        self, status: int, message: str, code: str | None = None, commit: str | None = None, **body: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        headers = {"X-Error-Message": message.encode("ascii", "replace").decode().replace("\n", " ")}
        self.headers = (
            headers | ({"X-Error-Code": code} if code else {}) | ({"X-Repo-Commit": commit} if commit else {})
        )


def git_oid(kind: str, content: bytes) -> str:
    """The git id of an object; ``kind`` is blob, tree or commit."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The pointer file that git stores in place of an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_entry(sha256: str, size: int, xet: str | None) -> dict[str, Any]:
    """The entry of an LFS object in `Files`; ``xet`` is its hash, if it came by Xet."""
    oid = git_oid("blob", pointer(sha256, size))
    return {"oid": oid, "size": size, "sha256": sha256, "lfs": True, "xet": xet}


def tree_oid(files: Files) -> str:
    """The git id of a folder with these files."""
    leaves: list[tuple[str, str, str]] = []  # (name by which git sorts, mode, id)
    folders: dict[str, Files] = {}
    for path, entry in files.items():
        head, slash, rest = path.partition("/")
        if slash:
            folders.setdefault(head, {})[rest] = entry
        else:
            leaves.append((head, "100644", entry["oid"]))
    leaves += [(f"{name}/", "40000", tree_oid(inside)) for name, inside in folders.items()]
    body = b"".join(f"{mode} {name.rstrip('/')}\0".encode() + bytes.fromhex(oid) for name, mode, oid in sorted(leaves))
    return git_oid("tree", body)


def below(files: Files, folder: str) -> Files:
    """The files below a folder, by path relative to it."""
    return {path[len(folder) + 1 :]: entry for path, entry in files.items() if path.startswith(f"{folder}/")}


def file_row(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The description of a file that the client reads."""
    row = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
    if entry["lfs"]:
        pointer_size = len(pointer(entry["sha256"], entry["size"]))
        row["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": pointer_size}
    if entry.get("xet"):
        row["xetHash"] = entry["xet"]
    return row


def folder_row(path: str, files: Files) -> dict[str, Any]:
    """The description of a folder that the client reads."""
    return {"type": "directory", "oid": tree_oid(below(files, path)), "size": 0, "path": path}


def folders_of(paths: Iterable[str]) -> set[str]:
    """All folders above these paths."""
    return {path[:i] for path in paths for i, letter in enumerate(path) if letter == "/"}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # the only form that the client reads


def _sha256_and_size(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


class Repository:
    """One repository on disk, in the layout described in `hf_archs.testing.hub`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kind, self.owner, self.name = folder.parts[-3:]
        self.id = f"{self.owner}/{self.name}"
        self.meta: dict[str, Any] = json.loads((folder / "repo.json").read_text())
        self.refs: dict[str, str] = self.meta["refs"]
        self.xet: dict[str, str] = self.meta.setdefault("xet", {})  # sha256 -> Xet hash, of what came by Xet

    @classmethod
    def create(cls, folder: Path, private: bool) -> Repository:
        """Create a repository with a first commit, whose ``.gitattributes`` names the LFS files."""
        for name in ("commits", "objects", "incoming"):
            (folder / name).mkdir(parents=True)
        meta = {"private": private, "created": _now(), "refs": {}, "discussions": []}
        (folder / "repo.json").write_text(json.dumps(meta))
        repo = cls(folder)
        files = {".gitattributes": repo.store(GIT_ATTRIBUTES.encode())}
        repo.commit("refs/heads/main", None, files, "initial commit", "", repo.owner)
        return repo

    def save(self) -> None:
        """Write ``repo.json`` atomically."""
        new = self.folder / "repo.json.new"
        new.write_text(json.dumps(self.meta, indent=1))
        new.replace(self.folder / "repo.json")

    def object(self, sha256: str) -> Path:
        """The file for the content of this sha256, whether or not it exists."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HubError(400, f"not a sha256: {sha256!r}")
        return self.folder / "objects" / sha256

    def store(self, content: bytes) -> dict[str, Any]:
        """Store a small file and return its entry."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.object(sha256).write_bytes(content)
        return {"oid": git_oid("blob", content), "size": len(content), "sha256": sha256, "lfs": False}

    def adopt(self, file: Path, sha256: str, size: int, found: tuple[str, int] | None = None) -> None:
        """Move an uploaded ``file`` to the objects. A file of another sha256 or size is deleted and refused."""
        found = found or _sha256_and_size(file)
        if found != (sha256, size):
            file.unlink()
            raise HubError(422, f"the upload has sha256 {found[0]} and {found[1]} bytes, not {sha256} and {size}")
        file.replace(self.object(sha256))

    def commit(self, ref: str, parent: str | None, files: Files, title: str, message: str, author: str) -> str:
        """Write a commit with these files, move ``ref`` to it and return its id."""
        stamp = f"{author} <{author}@localhost> {int(time.time())} +0000"
        parents = f"parent {parent}\n" if parent else ""
        text = f"tree {tree_oid(files)}\n{parents}author {stamp}\ncommitter {stamp}\n\n{title}\n\n{message}\n"
        oid = git_oid("commit", text.encode())
        record: dict[str, Any] = {"oid": oid, "parent": parent, "title": title, "message": message, "author": author}
        record |= {"date": _now(), "files": dict(sorted(files.items()))}
        (self.folder / "commits" / f"{oid}.json").write_text(json.dumps(record, indent=1))
        self.refs[ref] = oid
        self.save()
        return oid

    def ref_of(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request; None for any other revision."""
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
        """The commit of a revision and its ancestors, newest first."""
        oid: str | None = revision
        while oid:
            commit = self.at(oid)
            yield commit
            oid = commit["parent"]

    def open_discussion(self, title: str, author: str, pull_request: bool) -> dict[str, Any]:
        """Add a discussion or a pull request; the caller saves."""
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
