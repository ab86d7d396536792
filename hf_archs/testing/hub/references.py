"""Branches, tags, history, discussions and pull requests."""

from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hf_archs.testing.hub.access import Access
from hf_archs.testing.hub.refusal import HubError
from hf_archs.testing.hub.repository import Repository


class References(Access):
    """The endpoints of the names of commits, and of discussions."""

    async def list_refs(self, request: Request) -> Response:
        """All branches, tags and pull requests."""
        repo = self.open(request)

        def under(prefix: str) -> list[dict[str, str]]:
            found = {ref: oid for ref, oid in repo.refs.items() if ref.startswith(prefix)}
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in found.items()]

        answer = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
        return JSONResponse(answer | {"pullRequests": under("refs/pr/")})

    async def commits(self, request: Request) -> Response:
        """The history of a revision."""
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
        """Make a branch."""
        start = (await request.json()).get("startingPoint", "main")
        repo = self.open(request, "write")
        return self._create_ref(repo, f"refs/heads/{unquote(request.path_params['ref'])}", start)

    async def delete_branch(self, request: Request) -> Response:
        """Delete a branch."""
        return self._delete_ref(self.open(request, "write"), f"refs/heads/{unquote(request.path_params['ref'])}")

    async def create_tag(self, request: Request) -> Response:
        """Make a tag."""
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
        """One discussion."""
        discussions = self.open(request).meta["discussions"]
        num = request.path_params["num"]
        if not 1 <= num <= len(discussions):
            raise HubError(404, f"no discussion {num}")
        return JSONResponse(discussions[num - 1])
