"""llama.cpp as an engine: its server inside this process, on an export that is made for it and thrown away after.

llama.cpp generates the answers that come together side by side by itself. Images are brought to the size, or one of
the sizes, that the export takes; limits, key and errors are the API's, as before any engine.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import GenerationConfig

from vora.checkpoint.layout import read_info
from vora.checkpoint.load import load_model
from vora.export.gguf_files import GgufExport, check_quant, conversion_folder, write_export
from vora.export.prompts import in_whole_tokens, squared
from vora.export.runtimes import as_url, check_llama_cpp, llama_cpp_server
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import SPELT, VoraProcessor
from vora.serve.answer import Answer
from vora.serve.engine import ContextError, Message, RefusedError, refused_by_template, room_for
from vora.serve.limits import Limits

PLACE_OF_IMAGE = "<__media__>"  # what llama.cpp writes where an image stands
UNSEEN = "\u200b"  # a space of no width


class LlamaCppEngine:
    """An engine for the API; `processor` says which texts are control tokens."""

    name = "llama.cpp"

    def __init__(
        self, export: GgufExport, processor: VoraProcessor, context: int, limits: Limits,
        generation_config: GenerationConfig,
    ) -> None:  # fmt: skip
        self.processor, self.export, self.limits = processor, export, limits
        self.generation_config, self._tokenizing = generation_config, Lock()
        # those that a model was trained with stand in its template
        markers = "" if export.knows_markers else "".join(export.carrier.image_markers)
        self._num_marker_tokens = len(processor.ids_of(markers))
        self.context = min(context, limits.max_prompt_tokens + limits.max_tokens)
        self.server = llama_cpp_server(export, self.context, limits.max_batch_size)
        self._lock, self._num_requests = Lock(), 0

    def submit(
        self, messages: list[Message], *, max_new_tokens: int | None = 256, temperature: float = 0.0,
        top_p: float = 1.0, seed: int | None = None, stop: Sequence[str] = (),
    ) -> Answer:  # fmt: skip
        """As `Engine.submit`, but that a conversation is too long for the LLM is told where the answer is listened
        to."""
        self._check_length(messages)
        request: dict[str, Any] = {
            "messages": [self._message(message) for message in messages],
            "max_tokens": max_new_tokens or self.limits.max_tokens,
            "temperature": temperature, "top_p": top_p, "stop": list(stop),
            "seed": -1 if seed is None else seed % (2**32 - 1),  # the last of 32 bits means a new one each time
            # llama.cpp's own choices, which a request does not name
            "top_k": 0, "min_p": 0, "typical_p": 1, "samplers": ["penalties", "temperature", "top_p"],
            "repeat_penalty": self.generation_config.repetition_penalty or 1.0, "repeat_last_n": self.context,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        answer = Answer()
        Thread(target=self._work, args=(request, answer), daemon=True, name="vora-llama.cpp").start()
        return answer

    def _check_length(self, messages: list[Message]) -> None:
        """ContextError where a prompt is longer than the limit, its images as large as they may be and with the texts
        that llama.cpp puts around them."""
        try:
            with self._tokenizing:  # tokenizers are not made for several threads
                text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                length = len(self.processor.ids_of(str(text)))
        except TemplateError as error:
            raise refused_by_template(error) from None
        parts = chain.from_iterable(one["content"] for one in messages if not isinstance(one["content"], str))
        num_images = sum(part["type"] == "image" for part in parts)
        of_image = self.export.num_image_tokens - 1 + self._num_marker_tokens
        room_for(length + num_images * of_image, 1, None, self.limits.max_prompt_tokens, 1)

    def load(self) -> tuple[int, int]:
        """(requests that are being answered, requests that wait)"""
        running = min(self._num_requests, self.limits.max_batch_size)
        return running, self._num_requests - running

    def _work(self, request: dict[str, Any], answer: Answer) -> None:
        reason: list[str] = []

        def take(event: dict[str, Any]) -> bool:
            """Whether llama.cpp is to stop."""
            if "error" in event:
                answer.put(_error(event["error"]))
                return True
            if usage := event.get("usage"):
                answer.num_prompt_tokens, answer.num_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            for choice in event.get("choices", ()):
                answer.put(choice["delta"].get("content") or "")
                if choice["finish_reason"]:
                    reason.append(choice["finish_reason"])
            return answer.closed

        with self._lock:
            self._num_requests += 1
        try:
            self.server.handle_chat_completions(request, take)
        except Exception as error:
            answer.put(error)
        finally:
            with self._lock:
                self._num_requests -= 1
            answer.end("length" if reason == ["length"] else "stop")

    def _message(self, message: Message) -> Message:
        content, role = message["content"], message["role"]
        if isinstance(content, str):
            return {"role": role, "content": self._as_text(content, role)}
        parts: list[dict[str, Any]] = []
        for part in content:
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":  # llama.cpp puts a line break between
                part = {"type": "text", "text": parts.pop()["text"] + part["text"]}
            parts.append(part)
        return {"role": role, "content": [self._part(part, role) for part in parts]}

    def _part(self, part: dict[str, Any], role: str) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": self._as_text(part["text"], role)}
        return {"type": "image_url", "image_url": {"url": self._as_url(part["image"])}}

    def _as_text(self, text: str, role: str) -> str:
        """A text in which nothing is a control token: llama.cpp would read as such whatever looks like one, so that a
        space of no width parts it."""
        parted = self.processor._spelt(text, role).replace(SPELT, UNSEEN)
        return re.sub(re.escape(PLACE_OF_IMAGE), f"<{UNSEEN}{PLACE_OF_IMAGE[1:]}", parted)

    def _as_url(self, image: Image.Image) -> str:
        """An image at the size that llama.cpp leaves as it is, brought to it as our processor would."""
        size = self.export.image_size
        return as_url(in_whole_tokens(self.processor, image) if size is None else squared(self.processor, image, size))


def _error(found: dict[str, Any]) -> Exception:
    message = str(found.get("message"))
    if found.get("type") == "exceed_context_size_error":
        return ContextError(
            f"The conversation has {found.get('n_prompt_tokens')} tokens, but the context holds {found.get('n_ctx')}: "
            "start a new chat, or give fewer images."
        )
    return RefusedError(f"llama.cpp refuses the request: {message}")


@contextmanager
def llama_cpp_engine(model: str, limits: Limits, quant: str = "f16", **loading: Any) -> Iterator[LlamaCppEngine]:
    """Export a model of any kind of folder and serve it. ValueError where llama.cpp or its conversion are not
    installed, or the model does not fit."""
    check_llama_cpp()
    if loading.pop("unmerged", False):
        raise ValueError("llama.cpp has no LoRA for images alone: leave --unmerged out, or take --engine auto.")
    check_quant(quant)
    conversion_folder()
    info = read_info(model)
    loading["device"], loading["dtype"] = "cpu", torch.float32 if info.adapter else None
    loaded, processor = load_model(info, **loading)
    with TemporaryDirectory(prefix="vora-serve-") as scratch:
        export = write_export(loaded, processor, Path(scratch), "model", quant)
        context, generation_config = context_of(loaded), loaded.generation_config
        del loaded
        yield LlamaCppEngine(export, processor, context, limits, generation_config)


def context_of(model: VoraForConditionalGeneration) -> int:
    """Tokens that the LLM was made for."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096)
