"""Commits, the references to them (branches, tags, pull requests), and discussions."""

import base64
import json
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_archs.testing.hub.access import Access
from hf_archs.testing.hub.repository import Files, HubError, Repository, folders_of, lfs_entry
from hf_archs.testing.hub.uploads import take_from_xet


class Commits(Access):
    """The endpoint for commits and for pull requests with changes."""

    async def commit(self, request: Request) -> Response:
        """Apply all lines of a commit, or none, and move the branch to it."""
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
        take_from_xet(repo, {line["value"]["oid"] for line in lines if line["key"] == "lfsFile"})
        for line in lines[1:]:
            _apply(repo, files, line["key"], line["value"])
        if clash := folders_of(files) & files.keys():
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

    def _page(self, request: Request, repo: Repository) -> str:
        return f"{request.base_url}{'' if repo.kind == 'models' else f'{repo.kind}/'}{repo.id}"


def _apply(repo: Repository, files: Files, key: str, value: dict[str, Any]) -> None:
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
        files[path] = lfs_entry(value["oid"], size, repo.xet.get(value["oid"]))
    elif key in ("deletedFile", "deletedFolder"):
        gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
        if not gone:
            kind = "file" if key == "deletedFile" else "folder"
            raise HubError(404, f"A {kind} with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"unknown operation in a commit: {key!r}")


def _checked_path(path: str) -> str:
    if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")) or "\0" in path:
        raise HubError(400, f"Invalid path in commit: {path!r}")
    return path


class References(Access):
    """The endpoints for references, history and discussions."""

    async def list_refs(self, request: Request) -> Response:
        """List all branches, tags and pull requests."""
        repo = self.open(request)

        def under(prefix: str) -> list[dict[str, str]]:
            found = {ref: oid for ref, oid in repo.refs.items() if ref.startswith(prefix)}
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in found.items()]

        answer = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
        return JSONResponse(answer | {"pullRequests": under("refs/pr/")})

    async def commits(self, request: Request) -> Response:
        """List the commits of a revision's history."""
        repo = self.open(request)
        history = repo.history(unquote(request.path_params["revision"]))
        rows = [
            {key: c[key] for key in ("title", "message", "date")} | {"id": c["oid"], "authors": [{"user": c["author"]}]}
            for c in history
        ]
        return JSONResponse(rows)

    def _create_ref(self, repo: Repository, ref: str, revision: str) -> Response:
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.at(revision)["oid"]
        repo.save()
        return JSONResponse({})

    def _delete_ref(self, repo: Repository, ref: str) -> Response:
        if ref not in repo.refs:
            raise HubError(404, f"Reference {ref} does not exist", "RevisionNotFound")
        if ref == "refs/heads/main":
            raise HubError(403, "Forbidden: cannot delete the main branch")
        del repo.refs[ref]
        repo.save()
        return JSONResponse({})

    async def create_branch(self, request: Request) -> Response:
        """Create a branch."""
        start = (await request.json()).get("startingPoint", "main")
        repo = self.open(request, "write")
        return self._create_ref(repo, f"refs/heads/{unquote(request.path_params['ref'])}", start)

    async def delete_branch(self, request: Request) -> Response:
        """Delete a branch."""
        return self._delete_ref(self.open(request, "write"), f"refs/heads/{unquote(request.path_params['ref'])}")

    async def create_tag(self, request: Request) -> Response:
        """Create a tag."""
        tag = (await request.json())["tag"]
        repo = self.open(request, "write")
        return self._create_ref(repo, f"refs/tags/{tag}", unquote(request.path_params["revision"]))

    async def delete_tag(self, request: Request) -> Response:
        """Delete a tag."""
        return self._delete_ref(self.open(request, "write"), f"refs/tags/{unquote(request.path_params['ref'])}")

    async def discuss(self, request: Request) -> Response:
        """Open a discussion or an empty pull request."""
        body = await request.json()
        repo = self.open(request, "propose")
        discussion = repo.open_discussion(body["title"], self.caller(request)[0] or "", body["pullRequest"])
        if discussion["isPullRequest"]:
            repo.refs[f"refs/pr/{discussion['num']}"] = repo.refs["refs/heads/main"]
        repo.save()
        return JSONResponse(discussion)

    async def discussion(self, request: Request) -> Response:
        """Return a discussion."""
        discussions = self.open(request).meta["discussions"]
        num = request.path_params["num"]
        if not 1 <= num <= len(discussions):
            raise HubError(404, f"no discussion {num}")
        return JSONResponse(discussions[num - 1])
