"""The server on loopback."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from hf_archs.testing.hub.routes import application

# token -> (user, role); "read" may look at the user's own repositories, "write" may change them
USERS = {"hf_write": ("alice", "write"), "hf_read": ("alice", "read"), "hf_other": ("bob", "write")}
MULTIPART_THRESHOLD = 64 * 2**20  # bytes; larger LFS objects arrive in parts of this size


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
        server: uvicorn's, whose ``should_exit`` ends it.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        users: Mapping[str, tuple[str, str]] = USERS,
        multipart_threshold: int = MULTIPART_THRESHOLD,
        port: int = 0,
    ) -> None:
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
        app = application(self.root, users, multipart_threshold)
        config = uvicorn.Config(
            app, lifespan="off", http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=2
        )
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve in this thread until the server is told to stop."""
        self.server.run(sockets=[self._socket])

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
        self.server.should_exit = True
        self._thread.join()
        self._socket.close()
        if self._temporary:
            self._temporary.cleanup()
