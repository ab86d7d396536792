"""The caller of a request, the repository in its URL, and the right to use it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request

from hf_archs.testing.hub.repository import HubError, Repository

KINDS = ("models", "datasets", "spaces")


class Access:
    """Base class of all endpoints. No endpoint awaits between reading and saving a repository, so two requests cannot
    interleave there."""

    def __init__(self, root: Path, users: Mapping[str, tuple[str, str]]) -> None:
        self.root = root.resolve()
        self.users = users

    def caller(self, request: Request) -> tuple[str | None, str]:
        """The (user, role) of the request's token; (None, "none") without a token."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token] if token else (None, "none")

    def folder(self, kind: str, repo_id: str) -> Path | None:
        """The folder of a repository, whether or not it exists; None for an invalid id."""
        owner, _, name = repo_id.partition("/")
        fits = kind in KINDS and all(re.fullmatch(r"(?!\.)[\w.-]{1,96}", part) for part in (owner, name))
        return self.root / kind / owner / name if fits else None

    def open(self, request: Request, need: str = "read") -> Repository:
        """The repository in the URL, if the caller may ``read`` it, ``propose`` a change or ``write``, as needed."""
        place = request.path_params
        kind, repo_id = place.get("kind", "models"), "/".join(place[k] for k in ("owner", "name") if k in place)
        user, role = self.caller(request)
        folder = self.folder(unquote(kind), unquote(repo_id))
        repo = Repository(folder) if folder and (folder / "repo.json").exists() else None
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
        """The folder of a repository, if the caller may create or delete it."""
        user, role = self.caller(request)
        folder = self.folder("models", repo_id)
        if folder is None:
            raise HubError(400, f"Invalid repository id: {repo_id!r}")
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write" or folder.parts[-2] != user:
            raise HubError(403, f"Forbidden: no right to create or delete under the namespace {folder.parts[-2]!r}")
        return folder

    def commit_of(self, request: Request, repo: Repository) -> dict[str, Any]:
        """The commit at the revision in the URL, by default main."""
        return repo.at(unquote(request.path_params.get("revision", "main")))
