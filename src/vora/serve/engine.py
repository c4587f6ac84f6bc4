"""From messages to an answer, whoever asks: the terminal, the quickstart's report."""

from collections.abc import Generator
from threading import Event, Thread
from typing import Any, TypeAlias

import torch
from transformers import BatchFeature, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer

from vora.model.processing_vora import VoraProcessor

Message: TypeAlias = dict[str, Any]  # {"role": ..., "content": text, or a list of typed parts}


class Engine:
    """The one road to an answer: messages in, pieces of text out as they are generated; see `load_model`."""

    def __init__(self, model: PreTrainedModel, processor: VoraProcessor) -> None:
        self.model, self.processor = model, processor

    def submit(
        self, messages: list[Message], *, max_new_tokens: int = 256, temperature: float = 0.0
    ) -> Generator[str, None, None]:
        """Answer the last of some messages, as `VoraProcessor.apply_chat_template` takes them; closing the iterator
        stops the model. Temperature 0 is greedy. ValueError, before any piece, if the conversation exceeds the LLM's
        context, or an image cannot be read."""
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if limit and length + max_new_tokens > limit:
            raise ValueError(
                f"The conversation has {length} tokens and the answer may take {max_new_tokens} more, but the "
                f"LLM's context holds {limit}: start a new chat, or give fewer or smaller images."
            )
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return self._stream(inputs.to(self.model.device), max_new_tokens=max_new_tokens, **sampling)

    def _stream(self, inputs: BatchFeature, **options: Any) -> Generator[str, None, None]:
        """Generate in a thread of its own and yield what it says."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failure = Event(), []

        def stopped(ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        def generate() -> None:
            criteria = StoppingCriteriaList([stopped])
            try:
                self.model.generate(**inputs, **options, stopping_criteria=criteria, streamer=streamer)
            except Exception as error:  # raised again where the caller can see it
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # the listener may have gone: then the next token is the last
            stop.set()
            thread.join()
        if failure:
            raise failure[0]
