"""Before a request is read: its key, a place in the queue, the size and the seconds of its body."""

import asyncio
import hmac
from collections.abc import Sequence

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vora.serve.api.errors import ApiError, timed_out
from vora.serve.api.metrics import Metrics
from vora.serve.limits import Limits

OPEN = ("/health",)  # what needs no key, for those who watch whether the server lives


class Gate:
    """An ASGI app around another, which then receives whole bodies within the limits only."""

    def __init__(self, app: ASGIApp, limits: Limits, api_keys: Sequence[str], metrics: Metrics) -> None:
        self.app, self.limits, self.keys = app, limits, [key.encode() for key in api_keys]
        self.metrics = metrics
        self.num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["vora.begun"] = True
                self.metrics.requested(scope["path"], message["status"])
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except ConnectionError:  # the client has gone
            return

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ApiError where a request is not let in."""
        self._check_key(scope)
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        if self.num_requests >= self.limits.max_requests:
            raise ApiError(
                429, f"{self.num_requests} requests are being answered or wait, which is the limit: come again.",
                code="queue_full", headers={"Retry-After": str(self.limits.retry_seconds)},
            )  # fmt: skip
        self.num_requests += 1
        try:
            body = await self._read(Headers(scope=scope), receive)
            # whoever does not take what is sent holds a place no longer than that
            with anyio.move_on_after(2 * self.limits.request_seconds) as late:
                await self.app(scope, _replay(body, receive), send)
            if late.cancelled_caught and "vora.begun" not in scope:
                raise timed_out(self.limits.request_seconds)
        finally:
            self.num_requests -= 1

    def _check_key(self, scope: Scope) -> None:
        if not self.keys or scope["path"] in OPEN:
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # all are compared, in a time that says nothing of them
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self.keys]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(
                401, "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body; ApiError where it is too large or too slow."""
        limit = self.limits.max_body_bytes
        announced = headers.get("content-length", "")
        too_large = ApiError(413, f"The body is larger than the limit of {limit} bytes: send smaller or fewer images.")
        if announced.isdigit() and int(announced) > 2 * limit:
            raise too_large
        seconds = self.limits.body_seconds
        try:
            body = await asyncio.wait_for(_body(receive, limit), seconds)
        except asyncio.TimeoutError:
            message = f"The body took longer than the limit of {seconds:g} seconds to arrive."
            raise ApiError(408, message, code="timeout") from None
        if body is None:
            raise too_large
        return body


async def _body(receive: Receive, limit: int) -> bytes | None:
    """A body, None where it is too large; one up to twice the limit is read to its end, unkept, so that its sender
    hears why it is refused. ConnectionError where the client goes before its end."""
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= 2 * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    return b"".join(parts) if size <= limit else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then whatever else comes: that the client has gone."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
