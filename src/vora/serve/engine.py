"""A conversation with a model about images."""

from threading import Event, Thread

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from vora.model.fetch_image import fetch_image
from vora.model.image_processing_vora import is_video


class Chat:
    """Keeps the conversation; images go before the text of the turn they are given with.

    Args:
        model, processor: from `vora.checkpoint.load_model`.
        max_new_tokens: at most so many per answer.
        temperature: 0 for greedy answers.
    """

    def __init__(self, model, processor, max_new_tokens=256, temperature=0.0):
        self.model, self.processor = model, processor
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.messages = []

    def ask(self, text, images=()):
        """Stream the answer to a question, piece by piece.

        Args:
            text: the question.
            images: paths, PIL images or `Video`s that come with it; of URLs fetch the images first.

        Raises:
            ValueError: an image cannot be read, or the conversation exceeds the LLM's context.
        """
        content = [
            {"type": "video", "video": image} if is_video(image) else {"type": "image", "image": fetch_image(image)}
            for image in images
        ]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        inputs = self._inputs([*self.messages, turn])
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure, pieces = [], []

        stop = Event()

        def given_up(ids, scores, **kwargs):
            return torch.full((len(ids),), stop.is_set(), device=ids.device)

        def generate():
            options = {"max_new_tokens": self.max_new_tokens, "stopping_criteria": StoppingCriteriaList([given_up])}
            try:
                self.model.generate(**inputs, **sampling, **options, streamer=streamer)
            except Exception as error:  # raised again where the caller can see it
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:  # whoever listens has gone: the next token is the last
            stop.set()
            thread.join()
        if failure:
            raise failure[0]
        self.messages += [turn, {"role": "assistant", "content": "".join(pieces).strip()}]

    def _inputs(self, messages):
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if limit and length + self.max_new_tokens > limit:
            raise ValueError(
                f"The conversation has {length} tokens and the answer may take {self.max_new_tokens} more, but the "
                f"LLM's context holds {limit}: start a new chat, or give fewer or smaller images."
            )
        return inputs.to(self.model.device)
