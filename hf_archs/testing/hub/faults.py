"""Faults of the embedded Hub, by which a test sees what a client makes of them.

A `Fault` in `EmbeddedHub.faults` is a middleware around the Hub's own application, for some requests and some times::

    hub.faults.append(Fault("GET", r"/resolve/.*safetensors", cut(1000), times=1))
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_archs.testing.hub.repository import HubError

Way = Callable[[ASGIApp], ASGIApp]


@dataclass
class Fault:
    """A fault in the answers to some requests.

    Attributes:
        method: HTTP method of the requests.
        path: regular expression that is searched in their paths, which are not decoded.
        way: the fault, one of the functions of this module.
        times: number of requests that it still hits; None for all.
        seen: number of requests that it has hit.
    """

    method: str
    path: str
    way: Way
    times: int | None = None
    seen: int = 0

    def hits(self, scope: Scope) -> bool:
        """Whether the request of ``scope`` is hit; it is counted."""
        here = scope["method"] == self.method and re.search(self.path, scope["path"])
        if not here or self.times == 0:
            return False
        self.times = self.times and self.times - 1
        self.seen += 1
        return True


def faulty(app: ASGIApp, faults: list[Fault]) -> ASGIApp:
    """``app`` with the first of ``faults`` that hits a request."""

    async def chosen(scope: Scope, receive: Receive, send: Send) -> None:
        fault = next((fault for fault in faults if fault.hits(scope)), None)
        await (app if fault is None else fault.way(app))(scope, receive, send)

    return chosen


def refused(status: int, message: str, code: str | None = None) -> Way:
    """Answer with an error, as the Hub words it; ``code`` is the ``X-Error-Code``."""
    return answered(Response(message, status, HubError(status, message, code).headers))


def answered(response: Response) -> Way:
    """Answer with ``response``, whatever was asked."""
    return lambda app: response


def cut(after: int) -> Way:
    """Hang up after ``after`` bytes of the request's body, or of the answer's."""

    def way(app: ASGIApp) -> ASGIApp:
        async def cut_off(scope: Scope, receive: Receive, send: Send) -> None:
            connection = receive.__self__.transport  # type: ignore[attr-defined]  # of uvicorn's request
            left = {"http.request": after, "http.response.body": after}

            def piece(message: Message) -> bytes:
                body = message.get("body", b"")[: left[message["type"]]]
                left[message["type"]] -= len(body)
                return body

            async def received() -> Message:
                message = await receive()
                if message["type"] == "http.request" and piece(message) != message["body"]:
                    connection.abort()
                    return {"type": "http.disconnect"}
                return message

            async def sent(message: Message) -> None:
                body = piece(message) if message["type"] in left else b""
                if body == message.get("body", b""):
                    await send(message)
                elif not connection.is_closing():
                    await send({**message, "body": body, "more_body": True})
                    connection.close()

            await app(scope, received, sent)

        return cut_off

    return way


def changed(change: Callable[[bytes], bytes]) -> Way:
    """Change each piece of the request's body, or without one the answer's, to ``change`` of it, of the same length."""

    def way(app: ASGIApp) -> ASGIApp:
        async def falsified(scope: Scope, receive: Receive, send: Send) -> None:
            def other(message: Message) -> Message:
                return {**message, "body": change(message["body"])} if message.get("body") else message

            async def received() -> Message:
                return other(await receive())

            async def sent(message: Message) -> None:
                await send(other(message) if scope["method"] == "GET" else message)

            await app(scope, received, sent)

        return falsified

    return way


def after(action: Callable[[], object]) -> Way:
    """Answer rightly, after ``action`` has changed something on the Hub."""

    def way(app: ASGIApp) -> ASGIApp:
        async def overtaken(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.to_thread(action)  # which may be a request of its own
            await app(scope, receive, send)

        return overtaken

    return way
