"""The files of a commit, with git's object ids, and the rows in which the client reads them."""

import hashlib
from collections.abc import Iterable
from typing import Any

Files = dict[str, dict[str, Any]]  # path -> {"oid": git id, "size": bytes, "sha256": of the content, "lfs": bool}


def git_oid(kind: str, content: bytes) -> str:
    """Git's id of an object; ``kind`` is blob, tree or commit."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The file that git holds in place of an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def lfs_entry(sha256: str, size: int) -> dict[str, Any]:
    """The entry of an LFS object in `Files`."""
    return {"oid": git_oid("blob", pointer(sha256, size)), "size": size, "sha256": sha256, "lfs": True}


def tree_oid(files: Files) -> str:
    """Git's id of a folder with these files."""
    leaves: list[tuple[str, str, str]] = []  # (name that git sorts by, mode, id)
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
    """The files below a folder, by their paths in it."""
    return {path[len(folder) + 1 :]: entry for path, entry in files.items() if path.startswith(f"{folder}/")}


def file_row(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A file as the client reads it."""
    row = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
    if entry["lfs"]:
        pointer_size = len(pointer(entry["sha256"], entry["size"]))
        row["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": pointer_size}
    return row


def folder_row(path: str, files: Files) -> dict[str, Any]:
    """A folder as the client reads it."""
    return {"type": "directory", "oid": tree_oid(below(files, path)), "size": 0, "path": path}


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder above one of these paths."""
    return {path[:i] for path in paths for i, letter in enumerate(path) if letter == "/"}
