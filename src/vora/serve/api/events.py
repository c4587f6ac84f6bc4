"""An answer as it is sent: whole, or as events of a stream."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.types import Receive

from vora.serve.answer import Answer
from vora.serve.api.errors import ApiError, internal, refused, timed_out
from vora.serve.api.metrics import Metrics
from vora.serve.api.schemas import ChatCompletion, ChatRequest, Choice, ReplyMessage, Usage
from vora.serve.engine import RefusedError


class Reply:
    """One answer to one request: its pieces, counted, with an end to its patience."""

    def __init__(
        self, request: ChatRequest, answer: Answer, receive: Receive, metrics: Metrics, began: float, seconds: float
    ) -> None:
        self.request, self.answer, self.receive, self.metrics = request, answer, receive, metrics
        self.began, self.seconds = began, seconds  # by `time.monotonic`, and how long it may take from there
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._stream = self._pieces()
        self._first: str | None = None

    async def begin(self) -> None:
        """Wait for the first piece of a stream, so that what is refused has its status; ApiError where it is."""
        self._first = await anext(self._stream, None)
        if self._first is None:
            self._check_ended()

    def _check_ended(self) -> None:
        if self.answer.finish_reason is None:
            raise ApiError(499, "The client has gone.", code="cancelled")

    async def whole(self) -> ChatCompletion:
        """ApiError where it breaks off."""
        text = "".join([piece async for piece in self._stream])
        self._check_ended()
        assert self.answer.finish_reason is not None
        choice = Choice(message=ReplyMessage(content=text), finish_reason=self.answer.finish_reason)
        return ChatCompletion(
            id=self.id, created=self.created, model=self.request.model, choices=[choice], usage=self._usage()
        )

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events; where the answer breaks off, the last says why."""
        options = self.request.stream_options
        with_usage = bool(options and options.include_usage)
        try:
            yield self._event({"role": "assistant", "content": ""}, with_usage)
            if self._first is not None:
                yield self._event({"content": self._first}, with_usage)
            async with aclosing(self._stream) as pieces:
                async for piece in pieces:
                    yield self._event({"content": piece}, with_usage)
            if self.answer.finish_reason is None:  # nobody listens
                return
            yield self._event({}, with_usage, self.answer.finish_reason)
            if with_usage:
                yield _line(self._head() | {"choices": [], "usage": self._usage().model_dump()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _line(error.body)

    async def _pieces(self) -> AsyncGenerator[str, None]:
        """What is said, until the time is over or nobody listens."""
        outcome, said = "cancelled", False
        watch = asyncio.create_task(self._close_when_gone())
        try:
            async with aclosing(self.answer.pieces(self.began + self.seconds - time.monotonic())) as pieces:
                async for piece in pieces:
                    if not said:
                        self.metrics.first_piece.observe(time.monotonic() - self.began)
                        said = True
                    yield piece
            outcome = self.answer.finish_reason or outcome
        except asyncio.TimeoutError:
            outcome = "timeout"
            raise timed_out(self.seconds) from None
        except Exception as error:
            outcome = "error"
            raise refused(error) if isinstance(error, RefusedError) else internal(error) from None
        finally:
            watch.cancel()
            self.answer.close()
            self.metrics.answered(outcome, self.answer, time.monotonic() - self.began)

    async def _close_when_gone(self) -> None:
        """A client that has gone leaves the batch, also while it waits for its first piece."""
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.answer.close()

    def _usage(self) -> Usage:
        prompt, said = self.answer.num_prompt_tokens, self.answer.num_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.request.model,
        }  # fmt: skip

    def _event(self, delta: dict[str, str], with_usage: bool, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _line(self._head() | {"choices": [choice]} | ({"usage": None} if with_usage else {}))


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
