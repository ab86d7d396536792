"""The table of all endpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hf_archs.testing.hub.commits import Commits
from hf_archs.testing.hub.contents import Contents
from hf_archs.testing.hub.references import References
from hf_archs.testing.hub.refusal import HubError, gone, malformed, refuse
from hf_archs.testing.hub.repositories import Repositories
from hf_archs.testing.hub.uploads import Uploads


def application(root: Path, users: Mapping[str, tuple[str, str]], multipart_threshold: int) -> ASGIApp:
    """The Hub of the repositories below ``root``; for the arguments see `EmbeddedHub`."""
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
        ("GET", f"{api}/xet-write-token/{{revision}}", uploads.xet_token),
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

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Routing must see the path undecoded: a revision's slashes come as %2F and are no separators.
        await starlette({**scope, "path": scope["raw_path"].decode("ascii")}, receive, send)

    return app
