"""What the routes answer with."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio

from vora.serve.api.errors import ApiError, timed_out
from vora.serve.api.metrics import Metrics
from vora.serve.engine import AnyEngine
from vora.serve.limits import Limits

PREPARED = 2  # requests whose images are decoded at once: what memory they take at most


@dataclass
class Service:
    """An engine under a name, with its limits. `temperature` and `top_p` are of requests that give none."""

    engine: AnyEngine
    model: str
    limits: Limits = Limits()
    allow_urls: bool = False  # whether images at http(s) URLs are fetched
    temperature: float = 1.0
    top_p: float = 1.0
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.preparing = anyio.CapacityLimiter(PREPARED)
        self.threads = anyio.CapacityLimiter(PREPARED + 1)  # of which one is always free for text alone

    @asynccontextmanager
    async def turn_to_open(self, seconds: float) -> AsyncIterator[None]:
        """The turn of a request whose images are to be decoded; ApiError where it does not come in so many seconds."""
        with anyio.move_on_after(seconds) as scope:
            await self.preparing.acquire()
        if scope.cancelled_caught:
            raise timed_out(self.limits.request_seconds)
        try:
            yield
        finally:
            self.preparing.release()

    def check_model(self, name: str) -> None:
        """ApiError unless a request names the model that is served."""
        if name != self.model:
            message = f"The model {name[:200]!r} is not here; {self.model!r} is."
            raise ApiError(404, message, code="model_not_found", param="model")
