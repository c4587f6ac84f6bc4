"""An answer on its way: pieces of text go in at the engine's thread, and come out wherever it is listened to."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from queue import SimpleQueue
from threading import Event
from typing import Literal

FinishReason = Literal["stop", "length"]


class Answer(Iterator[str]):
    """Pieces of text, to be read once: by `for`, or in an event loop by `pieces`. Closing it stops the model."""

    def __init__(self, num_prompt_tokens: int = 0) -> None:
        self.num_prompt_tokens, self.num_tokens = num_prompt_tokens, 0
        self.finish_reason: FinishReason | None = None  # why it ended; None while it goes on, or where it was closed
        self._items: SimpleQueue[str | Exception | None] = SimpleQueue()  # None is the end
        self._closed = Event()
        self._wake: Callable[[], object] = bool  # called after each piece; bool() does nothing

    # for those who listen

    def __next__(self) -> str:
        if self._closed.is_set() and self._items.empty():
            raise StopIteration
        item = self._items.get()
        if isinstance(item, str):
            return item
        self._closed.set()
        if item is None:
            raise StopIteration
        raise item

    async def pieces(self, seconds: float | None = None) -> AsyncGenerator[str, None]:
        """The same in an event loop; asyncio.TimeoutError where the answer takes longer. The end closes it."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        end = None if seconds is None else loop.time() + seconds
        self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        try:
            while True:
                ready.clear()  # before looking: what comes after that sets it again
                while not self._items.empty():
                    try:
                        piece = next(self)
                    except StopIteration:
                        return
                    yield piece
                if self._closed.is_set():
                    return
                await asyncio.wait_for(ready.wait(), None if end is None else end - loop.time())
        finally:
            self._wake = bool
            self.close()

    def close(self) -> None:
        """Nobody listens any more: the model stops before its next token."""
        self._closed.set()
        self._notify()

    # for engines

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def put(self, item: str | Exception) -> None:
        """A piece, or what broke the answer off, which is raised where it is listened to."""
        if item != "":
            self._items.put(item)
            self._notify()

    def end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._items.put(None)
        self._notify()

    def _notify(self) -> None:
        try:
            self._wake()
        except RuntimeError:  # the event loop has gone
            self._closed.set()
