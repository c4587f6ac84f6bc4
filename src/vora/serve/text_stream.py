"""Tokens to pieces of text, as they come."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer. A letter of several tokens comes when it is whole; what may be the beginning of a stop
    text waits until it is known."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.ids: list[int] = []
        self.start, self.read = 0, 0  # ids before `read` are in the text; those from `start` on show how words join
        self.waiting = ""
        self.stopped = False  # whether a stop text came

    def push(self, id: int) -> str:
        """What is certain now."""
        self.ids.append(id)
        before, text = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if text.endswith("\ufffd"):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return self._take(text[len(before) :])

    def flush(self) -> str:
        """The rest, where no more tokens come."""
        before, text = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        self.start = self.read = len(self.ids)
        certain = self._take(text[len(before) :])
        rest, self.waiting = self.waiting, ""
        return certain + ("" if self.stopped else rest)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _take(self, new: str) -> str:
        text = self.waiting + new
        places = [place for place in map(text.find, self.stop) if place >= 0]
        if places:
            self.stopped, self.waiting = True, ""
            return text[: min(places)]
        longest = max((overlap(text, stop) for stop in self.stop), default=0)
        certain = len(text) - longest
        self.waiting = text[certain:]
        return text[:certain]


def overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text are the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
