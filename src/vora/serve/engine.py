"""From messages to an answer, whoever asks: the terminal, the quickstart's report."""

from collections.abc import Generator
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeAlias

import torch
from transformers import AutoConfig, BatchFeature, PreTrainedModel, StoppingCriteriaList, TextIteratorStreamer

from vora.baselines.llava import kind_of_student
from vora.build.lora import merge_vision_lora
from vora.checkpoint.adapter import fetch_adapter, is_adapter, load_adapter, processor_of_adapter
from vora.model.configuration_vora import VoraConfig
from vora.model.processing_vora import VoraProcessor
from vora.model.segmented_sdpa import use_segmented_sdpa_on_cpu

Message: TypeAlias = dict[str, Any]  # {"role": ..., "content": text, or a list of typed parts}


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


class Engine:
    """The one road to an answer: messages in, pieces of text out as they are generated.

    Args:
        model, processor: from `load_model`.
    """

    def __init__(self, model: PreTrainedModel, processor: VoraProcessor) -> None:
        self.model, self.processor = model, processor

    def submit(
        self, messages: list[Message], *, max_new_tokens: int = 256, temperature: float = 0.0
    ) -> Generator[str, None, None]:
        """Answer the last of some messages; closing the iterator stops the model.

        Args:
            messages: as `VoraProcessor.apply_chat_template` takes them.
            temperature: 0 for greedy answers.

        Raises:
            ValueError: at once, before any piece: the conversation exceeds the LLM's context, or an image cannot be
                read.
        """
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
