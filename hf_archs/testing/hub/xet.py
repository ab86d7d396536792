"""The ``local://`` stores that Xet uploads into, as plain objects."""

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hf_archs.testing.hub.repository import Repository


def take_from_xet(repo: Repository, wanted: set[str]) -> None:
    """Turn the ``local://`` stores in which one of the ``wanted`` sha256 lies into plain, verified objects."""
    for store in (repo.folder / "xet").glob("*"):
        held = {sha256: file for shard in store.rglob("shards/*.mdb") for sha256, file in _xet_files(shard)}
        if not wanted & held.keys():
            continue
        import hf_xet

        # The uploading client still holds the lock on the store's index, so a copy of the store is read.
        with tempfile.TemporaryDirectory(dir=repo.folder) as copy:
            shutil.copytree(store, copy, dirs_exist_ok=True, copy_function=_copy_index_link_rest)
            shutil.rmtree(store)
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                for sha256, (xet_hash, size) in held.items():
                    group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{copy}/{sha256}")
            for sha256, (_, size) in held.items():
                repo.adopt(Path(copy, sha256), sha256, size)


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
