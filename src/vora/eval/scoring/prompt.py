"""Examples to model inputs, in batches.

Dims: B rows, T tokens, P patches, N images.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from vora.eval.rows import Example
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

Item = TypeVar("Item")

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}  # of prompts, padding included
MOST_ROWS = {"cpu": 64, "cuda": 256}


@dataclass
class Prompt:
    """One example as model inputs, its images processed."""

    # input_ids int[T] and, with images, pixel_values float[P, C*p*p] and image_grid_thw int[N, 3]
    inputs: dict[str, Any]
    messages: list[dict[str, Any]]  # what it was made of, without the images' pixels, which would fill the memory
    answers: list[list[int]] = field(default_factory=list)  # tokens of each candidate; see `answer_ids`

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def image_inputs(self) -> dict[str, Any]:
        return {name: value for name, value in self.inputs.items() if name != "input_ids"}

    @cached_property
    def image_hash(self) -> str | None:
        """Of the pixels as the model reads them; None without images."""
        if not self.image_inputs:
            return None
        pixels = np.ascontiguousarray(self.inputs["pixel_values"])
        return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]

    def beginning(self, image_token_id: int) -> tuple[bytes, str | None, bytes]:
        """What is equal for prompts that begin with the same images: their tokens so far, pixels and grids."""
        ids, grids = self.inputs["input_ids"], np.asarray(self.inputs.get("image_grid_thw", ()))
        length = int(np.flatnonzero(ids == image_token_id).max(initial=-1)) + 1
        return ids[:length].tobytes(), self.image_hash, grids.tobytes()


def prompt_of(processor: VoraProcessor, example: Example) -> Prompt:
    """An example's `Prompt`: its images, then its text, as a user says them. ValueError if an image cannot be read."""
    images = example.images()
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": example.prompt}]
    return prompt_of_messages(processor, [{"role": "user", "content": content if images else example.prompt}])


def prompt_of_messages(processor: VoraProcessor, messages: list[dict[str, Any]]) -> Prompt:
    """A conversation that waits for its answer as a `Prompt`."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    kept = {"input_ids": np.array(inputs["input_ids"][0])}
    kept |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    return Prompt(kept, [message | {"content": _without_pixels(message["content"])} for message in messages])


def _without_pixels(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {"type": "image", "image": ""} for part in content]


def batches(
    lengths: Sequence[int], device: torch.device, extra: int = 0, most: Mapping[str, int] | None = None
) -> Iterator[list[int]]:
    """Indices in batches of about equal cost, the longest first, so that memory runs out at once or never. Prompts
    have `lengths` and will get `extra` tokens; a batch has at `most` so many on each kind of device, with padding."""
    kind, longest = "cuda" if device.type == "cuda" else "cpu", 0
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = longest if batch else lengths[index] + extra
        if batch and (longest * (len(batch) + 1) > (most or TOKENS_PER_BATCH)[kind] or len(batch) == MOST_ROWS[kind]):
            yield batch
            batch, longest = [], lengths[index] + extra
        batch.append(index)
    if batch:
        yield batch


def in_parts(
    items: Iterable[Item], bytes_of: Callable[[Item], int], most: int, most_bytes: int
) -> Iterator[list[Item]]:
    """At most so many items at a time, and hardly more than so many bytes of them."""
    part: list[Item] = []
    num_bytes = 0
    for item in items:
        part.append(item)
        num_bytes += bytes_of(item)
        if len(part) == most or num_bytes > most_bytes:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def padded(prompts: Sequence[Prompt], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as one batch, padded on the left: input_ids, attention_mask int[B, T], and the images of all."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad_token_id)
    mask = np.zeros((len(prompts), longest), int)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt.inputs["input_ids"]
        mask[row, longest - len(prompt) :] = 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    images = [prompt.image_inputs for prompt in prompts if prompt.image_inputs]
    for name in images[0] if images else ():
        inputs[name] = torch.cat([one[name] for one in images])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def check_context_length(
    model: VoraForConditionalGeneration, length: int, cure: str = "lower --max-image-tokens"
) -> None:
    """Raise ValueError if prompt and answer exceed what the LLM holds."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(
            f"A prompt with its answer takes {length} tokens, but the LLM's context holds {limit}: {cure}."
        )


def check_log_probs(model: VoraForConditionalGeneration, log_probs: torch.Tensor) -> None:
    """Raise ValueError if log-probabilities are no numbers: all that is made of them would be wrong."""
    if count := int(torch.isnan(log_probs).sum()):
        raise ValueError(
            f"{count} of {log_probs.numel()} log-probabilities are no numbers: the model's logits are not finite in "
            f"{str(model.dtype).removeprefix('torch.')}. Save it in bfloat16 or float32, or, if it is, its weights "
            "are broken: go back to an earlier checkpoint."
        )
