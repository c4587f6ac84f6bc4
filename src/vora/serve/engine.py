"""From messages to an answer, whoever asks: the terminal, the web page, the API, the quickstart's report.

Requests that wait are generated together. Before each step those join for whom there is a place, so that nobody waits
for a longer answer to end; an error in a row ends that row alone.
"""

import atexit
import weakref
from collections import deque
from collections.abc import Sequence
from threading import Lock, Thread
from typing import Any, Protocol, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import BatchFeature, LogitsProcessorList

from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor
from vora.serve.answer import Answer
from vora.serve.batch import Batch, can_batch, read_together
from vora.serve.sampling import Sampling, draw, penalties
from vora.serve.text_stream import TextStream

Message: TypeAlias = dict[str, Any]  # {"role": ..., "content": text, or a list of typed parts}


class RefusedError(ValueError):
    """What is asked cannot be answered, as told; the fault is the request's."""


class ContextError(RefusedError):
    """The conversation, or the conversation and its answer, are longer than they may be."""


class AnyEngine(Protocol):
    """What the API asks of an engine."""

    name: str

    def submit(
        self, messages: list[Message], *, max_new_tokens: int | None = 256, temperature: float = 0.0,
        top_p: float = 1.0, seed: int | None = None, stop: Sequence[str] = (),
    ) -> Answer: ...  # fmt: skip

    def load(self) -> tuple[int, int]: ...


class Engine:
    """The one road to an answer: messages in, pieces of text out as they are generated; see `load_model`."""

    name = "transformers"

    def __init__(
        self, model: VoraForConditionalGeneration, processor: VoraProcessor, *, max_batch_size: int = 16,
        max_prompt_tokens: int | None = None, max_new_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """`max_new_tokens` is of answers for which no number is given; None: whatever the context holds."""
        self.model, self.processor = model, processor
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self.max_batch_size = max_batch_size if can_batch(model) else 1
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._lock, self._preparing = Lock(), Lock()
        self._worker: Thread | None = None
        self._is_working = False
        atexit.register(_end, weakref.ref(self))

    def submit(
        self, messages: list[Message], *, max_new_tokens: int | None = 256, temperature: float = 0.0,
        top_p: float = 1.0, seed: int | None = None, stop: Sequence[str] = (),
    ) -> Answer:  # fmt: skip
        """Answer the last of some messages, as `VoraProcessor.apply_chat_template` takes them; closing the answer
        stops it. See `Sampling`. ValueError, before any piece, if an image cannot be read; ContextError if the
        conversation is too long for the LLM."""
        inputs = self._prepared(messages)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        room = room_for(length, max_new_tokens, limit, self.max_prompt_tokens, self.max_new_tokens)
        sampling = Sampling(room, temperature, top_p, seed, tuple(stop))
        against = penalties(self.model.generation_config)
        row = _Row(dict(inputs.to(self.model.device)), sampling, self.processor, self._ends(), against)
        with self._lock:
            self._waiting.append(row)
            if not self._is_working:  # it ends when there is nothing to do
                self._is_working = True
                self._worker = Thread(target=self._work, daemon=True, name="vora-engine")
                self._worker.start()
        return row.answer

    def _prepared(self, messages: list[Message]) -> BatchFeature:
        try:
            with self._preparing:  # tokenizers are not made for several threads
                return self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
        except TemplateError as error:  # which may raise what it likes, such as at a system's turn
            raise refused_by_template(error) from None

    def load(self) -> tuple[int, int]:
        """(requests that are being answered, requests that wait)"""
        return len(self._rows), len(self._waiting)

    def _ends(self) -> set[int]:
        known = self.model.generation_config.eos_token_id
        ends = {self.processor.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        return ends - {None}

    def _take(self) -> "list[_Row] | None":
        """Who joins now; None, and the thread is to end, where nobody is left."""
        with self._lock:
            waiting = [row for row in self._waiting if not row.answer.closed]
            first = waiting[: self.max_batch_size - len(self._rows)]
            joining = [first[number] for number in read_together(self.model, [row.inputs for row in first])]
            self._waiting = deque(row for row in waiting if row not in joining)
            if not (waiting or self._rows):
                self._is_working = False
                return None
            return joining

    def _work(self) -> None:
        try:
            self._answer()
        except Exception as error:  # of no single row
            with self._lock:
                for row in (*self._rows, *self._waiting):
                    row.answer.put(error)
                self._rows.clear()
                self._waiting.clear()
                self._is_working = False

    @torch.inference_mode()
    def _answer(self) -> None:
        batch, rows = Batch(self.model), self._rows
        suppressed = self._suppressed()
        while (joining := self._take()) is not None:
            read = self._read(batch, joining)
            ended = [row for row, one in read if not row.go_on(one.masked_fill_(suppressed, -torch.inf))]
            for number in reversed(range(len(rows))):
                if rows[number].answer.closed or rows[number] in ended:
                    self._leave(batch, number)
            if not rows:
                continue
            try:
                logits = batch.step([row.token for row in rows]).masked_fill_(suppressed, -torch.inf)
            except Exception as error:  # of all of them, such as memory that ran out
                for row in rows:
                    row.answer.put(error)
                rows.clear()
                batch = Batch(self.model)
                continue
            going_on = [row.go_on(one) for row, one in zip(rows, logits)]
            for number in reversed(range(len(rows))):
                if not going_on[number]:
                    self._leave(batch, number)

    def _read(self, batch: Batch, joining: "list[_Row]") -> "list[tuple[_Row, Tensor]]":
        """Let rows join; those that did, each with float[V] logits of its first token."""
        if not joining:
            return []
        try:
            logits = batch.join([row.inputs for row in joining])
        except Exception as error:
            if len(joining) > 1:  # whose prompt it was shows when each is read alone
                return [found for row in joining for found in self._read(batch, [row])]
            joining[0].answer.put(error)
            return []
        if len(joining) > 1 and not logits.isfinite().all():  # what is no number in one spoils those after it
            for number in reversed(range(len(self._rows), len(self._rows) + len(joining))):
                batch.leave(number)
            return [found for row in joining for found in self._read(batch, [row])]
        for row in joining:
            row.inputs = {}
        self._rows += joining
        return list(zip(joining, logits))

    def _leave(self, batch: Batch, number: int) -> None:
        batch.leave(number)
        last = self._rows.pop()
        if number < len(self._rows):
            self._rows[number] = last

    def _suppressed(self) -> Tensor:
        """bool[V], the tokens that are never generated, the image token among them."""
        ids = {self.model.config.image_token_id, *(self.model.generation_config.suppress_tokens or [])}
        found = torch.zeros(self.model.lm_head.out_features, dtype=torch.bool, device=self.model.device)
        found[[id for id in ids if 0 <= id < len(found)]] = True  # a config may name others, as transformers has it
        return found


def _end(engine_of: "weakref.ref[Engine]") -> None:
    """Before the interpreter goes: a thread that still lets go of tensors then would abort the process."""
    engine = engine_of()
    if engine is None or engine._worker is None:
        return
    with engine._lock:
        for row in (*engine._waiting, *engine._rows):
            row.answer.close()
    engine._worker.join(10)


class _Row:
    """A request and what has become of it."""

    def __init__(
        self, inputs: dict[str, Tensor], sampling: Sampling, processor: VoraProcessor, ends: set[int],
        penalties: LogitsProcessorList,
    ) -> None:  # fmt: skip
        self.inputs, self.sampling, self.ends = inputs, sampling, ends
        self.penalties, self.ids = penalties, inputs["input_ids"]
        self.answer = Answer(inputs["input_ids"].shape[1])
        self.text, self.generator = TextStream(processor.tokenizer, sampling.stop), sampling.generator()
        self.token = -1  # the last

    def go_on(self, logits: Tensor) -> bool:
        """Take the next token by float[V]; whether there is one more to come."""
        answer, piece = self.answer, ""
        try:
            if self.penalties:
                logits = self.penalties(self.ids, logits[None])[0]
            self.token = draw(logits, self.sampling, self.generator)
            if self.penalties:
                self.ids = torch.cat([self.ids, self.ids.new_tensor([[self.token]])], 1)
            answer.num_tokens += 1
            if is_end := self.token in self.ends:
                piece = self.text.flush()
            else:
                piece = self.text.push(self.token)
            is_last = not is_end and not self.text.stopped and answer.num_tokens == self.sampling.max_new_tokens
            if is_last:
                piece += self.text.flush()
        except Exception as error:
            answer.put(error)
            return False
        answer.put(piece)
        if is_end or self.text.stopped or is_last:
            answer.end("stop" if is_end or self.text.stopped else "length")
            return False
        return not answer.closed


def refused_by_template(error: TemplateError) -> RefusedError:
    return RefusedError(f"The model's chat template refuses the conversation: {error}")


def room_for(
    length: int, wanted: int | None, context: int | None, max_prompt_tokens: int | None, default: int | None
) -> int:
    """Tokens that the answer to a prompt of so many may have: as many as are wanted, else the default, else what the
    context holds. ContextError where the prompt is too long, or the context holds less than is wanted."""
    if max_prompt_tokens and length > max_prompt_tokens:
        raise ContextError(
            f"The conversation has {length} tokens, more than the limit of {max_prompt_tokens}: give less text, or "
            "fewer or smaller images."
        )
    left = context - length if context else wanted or default or length
    if left < (wanted or 1):
        raise ContextError(
            f"The conversation has {length} tokens and the answer may take {wanted or 1} more, but the "
            f"LLM's context holds {context}: start a new chat, or give fewer or smaller images."
        )
    return wanted or min(left, default or left)
