"""A conversation with a model about images."""

from pathlib import Path
from threading import Event, Thread

import torch
from transformers import AutoConfig, StoppingCriteriaList, TextIteratorStreamer

from vora.baselines.llava import kind_of_student
from vora.build.lora import merge_vision_lora
from vora.checkpoint.adapter import fetch_adapter, is_adapter, load_adapter, processor_of_adapter
from vora.model.configuration_vora import VoraConfig
from vora.model.fetch_image import fetch_image
from vora.model.image_processing_vora import is_video
from vora.model.processing_vora import VoraProcessor
from vora.model.segmented_sdpa import use_segmented_sdpa_on_cpu


def load_model(name, min_image_tokens=None, max_image_tokens=None):
    """A VoRA model by folder or hub id, on the GPU if there is one.

    Args:
        min_image_tokens, max_image_tokens: budget per image, if not the model's own.

    Returns:
        (model in eval mode, processor).

    Raises:
        ValueError: nothing is there, or something that has no eyes.
    """
    name = fetch_adapter(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        cure = (
            f"merge it first: vora merge {name} -o OUT" if (Path(name) / "recipe.yaml").exists() else "check the path"
        )
        raise ValueError(f"{name} holds no config.json, so it is no saved model: {cure}.")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"Cannot load model {name}: {str(error).splitlines()[0]}") from None
    if not isinstance(config, VoraConfig):
        raise ValueError(
            f"{name} is a {config.model_type} model and has no eyes: train them with `vora train`, or name a VoRA "
            "model."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    without_llm = is_adapter(name)
    model = merge_vision_lora(load_adapter(name)) if without_llm else kind_of_student(name).from_pretrained(name)
    model = model.to(device).eval()
    use_segmented_sdpa_on_cpu(model, device)
    try:
        processor = None if without_llm else VoraProcessor.from_pretrained(name)
    except (OSError, ValueError, TypeError):
        raise ValueError(
            f"{name} has no tokenizer, so it cannot be asked anything: import it again with an --llm folder that has "
            "its LLM's tokenizer files."
        ) from None
    processor = processor or processor_of_adapter(name)
    processor.image_processor.set_budget(min_image_tokens, max_image_tokens)
    processor.end_turns_of(model)
    return model, processor


class Chat:
    """Keeps the conversation; images go before the text of the turn they are given with.

    Args:
        model, processor: from `load_model`.
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
