"""The account, its repositories, and whether a card's metadata is sound."""

import shutil
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_archs.testing.hub.access import KINDS, Access
from hf_archs.testing.hub.card import card_metadata
from hf_archs.testing.hub.refusal import HubError
from hf_archs.testing.hub.repository import Repository


class Repositories(Access):
    """The endpoints of the account and of whole repositories."""

    async def whoami(self, request: Request) -> Response:
        """The account of the token."""
        user, role = self.caller(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
        return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    async def validate_yaml(self, request: Request) -> Response:
        """Whether the Hub would take a card."""
        try:
            metadata = card_metadata((await request.json())["content"])
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
        """Make a repository."""
        body, folder, url = await self._named(request)
        if folder.exists():
            raise HubError(409, f"You already created this {folder.parts[-3][:-1]} repo", url=url)
        repo = Repository.create(folder, body.get("visibility") == "private")
        return JSONResponse({"url": url, "name": repo.id, "id": repo.id})

    async def delete(self, request: Request) -> Response:
        """Delete a repository with all that it holds."""
        _, folder, _ = await self._named(request)
        if not folder.exists():
            raise HubError(404, "Repository not found", "RepoNotFound")
        shutil.rmtree(folder)
        return Response("OK")
