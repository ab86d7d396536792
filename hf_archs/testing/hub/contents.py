"""Endpoints of the embedded Hub for repositories, their files at a revision, and the metadata of their cards."""

import contextlib
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from hf_archs.testing.hub.access import KINDS, Access
from hf_archs.testing.hub.repository import HubError, Repository, below, file_row, folder_row, folders_of


def card_metadata(card: str) -> dict[str, Any]:
    """The YAML block at the head of a card; empty if there is none. Raises `ValueError` if the Hub would refuse it."""
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


class Repositories(Access):
    """The endpoints for the account and for whole repositories."""

    async def whoami(self, request: Request) -> Response:
        """Return the account of the token."""
        user, role = self.caller(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
        return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    async def validate_yaml(self, request: Request) -> Response:
        """Check whether the Hub would accept a card."""
        try:
            metadata = card_metadata((await request.json())["content"])
        except ValueError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return JSONResponse({"errors": [], "warnings": [] if metadata else [warning]})

    async def _named(self, request: Request) -> tuple[dict[str, Any], Path, str]:
        """The body of a create or delete request, and the folder and the URL of the repository that it names."""
        body = await request.json()
        repo_id = f"{body.get('organization') or self.caller(request)[0]}/{body['name']}"
        kind = f"{body.get('type') or 'model'}s"
        if kind not in KINDS:
            raise HubError(400, f"Invalid repository type: {body['type']!r}")
        folder = self.root / kind / self.owner(request, repo_id).relative_to(self.root / "models")
        return body, folder, f"{request.base_url}{'' if kind == 'models' else f'{kind}/'}{repo_id}"

    async def create(self, request: Request) -> Response:
        """Create a repository."""
        body, folder, url = await self._named(request)
        if folder.exists():
            raise HubError(409, f"You already created this {folder.parts[-3][:-1]} repo", url=url)
        repo = Repository.create(folder, body.get("visibility") == "private")
        return JSONResponse({"url": url, "name": repo.id, "id": repo.id})

    async def delete(self, request: Request) -> Response:
        """Delete a repository with its contents."""
        _, folder, _ = await self._named(request)
        if not folder.exists():
            raise HubError(404, "Repository not found", "RepoNotFound")
        shutil.rmtree(folder)
        return Response("OK")


class Contents(Access):
    """The endpoints that read a repository."""

    def _info(self, repo: Repository, commit: dict[str, Any]) -> dict[str, Any]:
        def text_of(path: str) -> str:
            entry = commit["files"].get(path)
            return repo.object(entry["sha256"]).read_text("utf-8", "replace") if entry else ""

        card: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # a card with invalid metadata counts as a card without any
            card = card_metadata(text_of("README.md"))
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
        """Return the card's metadata and the file names of a repository at a revision."""
        repo = self.open(request)
        commit = self.commit_of(request, repo)
        info = self._info(repo, commit)
        if "blobs" in request.query_params:
            for sibling in info["siblings"]:
                row = file_row(sibling["rfilename"], commit["files"][sibling["rfilename"]])
                sibling |= {"size": row["size"], "blobId": row["oid"]}
                if "lfs" in row:
                    sibling["lfs"] = row["lfs"] | {"sha256": row["lfs"]["oid"]}
        return JSONResponse(info)

    async def tree(self, request: Request) -> Response:
        """List the files and folders in a folder."""
        repo = self.open(request)
        commit = self.commit_of(request, repo)
        files = commit["files"]
        folder = unquote(request.path_params.get("path", "")).strip("/")
        if folder and not below(files, folder):
            raise HubError(404, f"{folder} does not exist on {commit['oid']}", "EntryNotFound", commit["oid"])
        recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
        start = len(folder) + 1 if folder else 0

        def is_listed(path: str) -> bool:
            return path.startswith(f"{folder}/" if folder else "") and (recursive or "/" not in path[start:])

        folders = [folder_row(path, files) for path in sorted(folders_of(files)) if is_listed(path)]
        return JSONResponse(folders + [file_row(path, entry) for path, entry in files.items() if is_listed(path)])

    async def paths_info(self, request: Request) -> Response:
        """List the files and folders with these paths."""
        repo = self.open(request)
        files = self.commit_of(request, repo)["files"]
        paths = [path.rstrip("/") for path in parse_qs((await request.body()).decode()).get("paths", [])]
        rows = [file_row(path, files[path]) for path in paths if path in files]
        return JSONResponse(rows + [folder_row(path, files) for path in paths if below(files, path)])

    async def resolve(self, request: Request) -> Response:
        """Return the content of a file."""
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
        if entry.get("xet"):
            token = f"{request.base_url}api/{repo.kind}/{repo.id}/xet-read-token/{commit['oid']}"
            headers |= {"X-Xet-Hash": entry["xet"], "Link": f'<{token}>; rel="xet-auth"'}
        # FileResponse answers HEAD and Range. LFS files are served without a redirect, whose target would lack
        # X-Repo-Commit.
        file, name = repo.object(entry["sha256"]), path.rpartition("/")[2]
        return FileResponse(file, headers=headers, media_type="application/octet-stream", filename=name)
