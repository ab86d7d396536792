"""Refusals, as the client reads them."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class HubError(Exception):
    """A refusal: the status, the sentence for ``X-Error-Message`` and what else the client reads."""

    def __init__(
        self, status: int, message: str, code: str | None = None, commit: str | None = None, **body: Any
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        headers = {"X-Error-Message": message.encode("ascii", "replace").decode().replace("\n", " ")}
        self.headers = (
            headers | ({"X-Error-Code": code} if code else {}) | ({"X-Repo-Commit": commit} if commit else {})
        )


async def refuse(request: Request, error: Exception) -> Response:
    """The answer to a `HubError`."""
    assert isinstance(error, HubError)
    return JSONResponse(error.body, error.status, error.headers)


async def gone(request: Request, error: Exception) -> Response:
    """The answer to a client that hung up."""
    return Response(status_code=499)  # nobody is there to read it


async def malformed(request: Request, error: Exception) -> Response:
    """The answer to a request without a field that it needs, or with a wrong value."""
    return await refuse(request, HubError(400, f"malformed request: {type(error).__name__}: {error}"))
