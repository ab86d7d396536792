"""The server on loopback, and the table of its endpoints."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hf_archs.testing.hub.commits import Commits, References
from hf_archs.testing.hub.contents import Contents, Repositories
from hf_archs.testing.hub.faults import Fault, faulty
from hf_archs.testing.hub.repository import HubError
from hf_archs.testing.hub.uploads import Uploads

# token -> (user, role); "read" may look at the user's own repositories, "write" may change them
USERS = {"hf_write": ("alice", "write"), "hf_read": ("alice", "read"), "hf_other": ("bob", "write")}
MULTIPART_THRESHOLD = 64 * 2**20  # bytes; larger LFS objects arrive in parts of this size


async def refuse(request: Request, error: Exception) -> Response:
    """The answer to a `HubError`."""
    assert isinstance(error, HubError)
    return JSONResponse(error.body, error.status, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """The answer to a client that hung up."""
    return Response(status_code=499)  # the client is gone and does not read it


async def malformed(request: Request, error: Exception) -> Response:
    """The answer to a request with a missing field or a wrong value."""
    return await refuse(request, HubError(400, f"malformed request: {type(error).__name__}: {error}"))


def application(
    root: Path, users: Mapping[str, tuple[str, str]], multipart_threshold: int, faults: list[Fault]
) -> ASGIApp:
    """The ASGI application of a Hub with the repositories below ``root``; see `EmbeddedHub` for the arguments."""
    repositories, contents, references = Repositories(root, users), Contents(root, users), References(root, users)
    uploads, commits = Uploads(root, users, multipart_threshold), Commits(root, users)
    api, repo, page = "/api/{kind}/{owner}/{name}", "{kind}/{owner}/{name}", "{owner}/{name}"
    table: list[tuple[str, str, Callable[[Request], Any]]] = [
        ("GET", "/api/whoami-v2", repositories.whoami),
        ("POST", "/api/validate-yaml", repositories.validate_yaml),
        ("POST", "/api/repos/create", repositories.create),
        ("DELETE", "/api/repos/delete", repositories.delete),
        ("PUT", "/lfs/{ticket}", uploads.upload),
        ("PUT", "/lfs/{ticket}/{part:int}", uploads.upload),
        ("POST", "/lfs/{ticket}", uploads.complete),
        ("GET", "/api/{kind}/{name}", contents.info),
        ("GET", api, contents.info),
        ("GET", f"{api}/revision/{{revision}}", contents.info),
        ("GET", f"{api}/tree/{{revision}}", contents.tree),
        ("GET", f"{api}/tree/{{revision}}/{{path:path}}", contents.tree),
        ("POST", f"{api}/paths-info/{{revision}}", contents.paths_info),
        ("GET", f"{api}/refs", references.list_refs),
        ("GET", f"{api}/commits/{{revision}}", references.commits),
        ("POST", f"{api}/branch/{{ref}}", references.create_branch),
        ("DELETE", f"{api}/branch/{{ref}}", references.delete_branch),
        ("POST", f"{api}/tag/{{revision}}", references.create_tag),
        ("DELETE", f"{api}/tag/{{ref}}", references.delete_tag),
        ("POST", f"{api}/discussions", references.discuss),
        ("GET", f"{api}/discussions/{{num:int}}", references.discussion),
        ("POST", f"{api}/preupload/{{revision}}", uploads.preupload),
        ("GET", f"{api}/xet-write-token/{{revision}}", uploads.xet_write_token),
        ("GET", f"{api}/xet-read-token/{{revision}}", uploads.xet_read_token),
        ("POST", f"{api}/commit/{{revision}}", commits.commit),
    ]
    for place in (repo, page):  # models have no prefix
        table += [
            ("GET", f"/{place}/resolve/{{revision}}/{{path:path}}", contents.resolve),
            ("POST", f"/{place}.git/info/lfs/objects/batch", uploads.lfs_batch),
            ("POST", f"/{place}.git/info/lfs/objects/verify", uploads.lfs_verify),
        ]
    table.append(("GET", "/{name}/resolve/{revision}/{path:path}", contents.resolve))
    starlette = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in table],
        exception_handlers={
            HubError: refuse,
            ClientDisconnect: gone,
            KeyError: malformed,
            ValueError: malformed,
        },
    )

    answer = faulty(starlette, faults)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Routing needs the undecoded path, where the slashes in a revision are %2F and no separators.
        await answer({**scope, "path": scope["raw_path"].decode("ascii")}, receive, send)

    return app


class EmbeddedHub:
    """A Hub on 127.0.0.1 during a ``with`` block, served from a thread of this process.

    Args:
        root: folder of the repositories, which is kept; None makes a temporary folder, which is deleted.
        users: token -> (user name, "read" or "write").
        multipart_threshold: bytes; a larger LFS object must be uploaded in parts of this size.
        port: port to listen on; 0 takes any free port.

    Attributes:
        endpoint: the URL for the client, ``http://127.0.0.1:<port>``.
        token: the first token that may write.
        server: the uvicorn server, which ends when its ``should_exit`` is set.
        faults: the faults of its answers, none at first; see `hf_archs.testing.hub.faults`.
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
        # The socket listens before the server runs, so that an early client waits in the backlog.
        self._socket = socket.create_server(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else an answer takes 40 ms
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.faults: list[Fault] = []
        app = application(self.root, users, multipart_threshold, self.faults)
        config = uvicorn.Config(
            app, lifespan="off", http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=2
        )
        self.server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve in this thread until the server is told to stop."""
        self.server.run(sockets=[self._socket])

    def environment(self, home: Path | str) -> dict[str, str]:
        """The environment variables that point the client of a new process to this Hub, with its caches in ``home``."""
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
