"""Prompts read once, for all that goes on from them: a free answer, its beams, candidates.

Prompts to one image stand behind it in one packed sequence, where all that they begin with alike is read once, and all
of them but their last tokens, with which whatever goes on begins.

Dims: B prompts, K tokens of the longest but its last, R packed sequences, T their tokens, H heads, W their width.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vora.data.packing import TokenSample, collate_sequences, share_prefixes
from vora.eval.scoring.prompt import Prompt
from vora.model.attention import sliding_window
from vora.model.modeling_vora import CACHE, VoraForConditionalGeneration


@dataclass
class ReadPrompts:
    """What a model keeps of a batch of prompts."""

    model: VoraForConditionalGeneration
    layers: list[tuple[Tensor, Tensor]]  # keys and values float[R, H, T, W]
    rows: Tensor  # int[B], the packed sequence of each prompt
    places: Tensor  # int[B, K] of its tokens there, padded on the left
    mask: Tensor  # int[B, K], 0 at padding

    def cache(self, prompts: Sequence[int] | Tensor) -> DynamicCache:
        """A row for each of these prompts, by its number; a prompt may come several times."""
        found = DynamicCache(config=self.model.config.get_text_config())
        rows, places = self.rows[prompts][:, None], self.places[prompts]
        for number, layer in enumerate(self.layers):
            keys, values = (states.transpose(1, 2)[rows, places].transpose(1, 2) for states in layer)
            found.update(keys, values, number)
        return found


def has_unmerged_lora(model: VoraForConditionalGeneration) -> bool:
    """Whether LoRA lies beside a model's weights, as `load_model(..., unmerged=True)` has it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def can_share(model: VoraForConditionalGeneration, prompts: Sequence[Prompt], extra: int = 0) -> bool:
    """Whether what a model keeps of prompts can be parted and shared: none, with `extra` tokens, fills a sliding
    window, no layer keeps a state of all that came before, and no LoRA lies beside the weights: whether it is on is
    kept with the cache that was read."""
    if has_unmerged_lora(model):
        return False
    layers = DynamicCache(config=model.config.get_text_config()).layers
    lengths, window = [len(prompt) for prompt in prompts], sliding_window(model.config) or float("inf")
    return {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer} and (
        1 < min(lengths) and max(lengths) + extra < window
    )


@torch.inference_mode()
def read_prompts(model: VoraForConditionalGeneration, prompts: Sequence[Prompt]) -> ReadPrompts:
    """One pass over prompts of which `can_share` is True."""
    of_image: defaultdict[Any, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        # what stands in the last place but one is not shared: where that is of the image, the prompt stands alone
        is_alone = prompt.inputs["input_ids"][-2] == model.config.image_token_id
        of_image[prompt.beginning(model.config.image_token_id), number if is_alone else None].append(number)
    window = sliding_window(model.config) or float("inf")
    packed = [row for numbers in of_image.values() for row in _packed(prompts, numbers, window)]
    longest = max(len(sample["input_ids"]) for _, sample in packed)
    batch: dict[str, Any] = {**collate_sequences([[sample] for _, sample in packed], longest, 0)}
    inputs = {name: batch[name].to(model.device) for name in batch if name not in ("targets", "num_samples")}
    cache = getattr(model.model(**inputs, use_cache=True), CACHE)
    rows, width = np.zeros(len(prompts), int), max(map(len, prompts)) - 1
    places, mask = np.zeros((2, len(prompts), width), int)
    for row, (numbers, sample) in enumerate(packed):
        at = np.arange(len(sample["input_ids"]))
        for number, end in zip(numbers, sample["ends"]):
            path = at[(at <= end) & (end <= sample["seen_until"])]
            rows[number], places[number, width - len(path) :], mask[number, width - len(path) :] = row, path, 1
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return ReadPrompts(model, layers, *(torch.from_numpy(array).to(model.device) for array in (rows, places, mask)))


def _packed(prompts: Sequence[Prompt], numbers: list[int], window: float) -> list[tuple[list[int], TokenSample]]:
    """(numbers, packed sequence) of prompts that begin alike, in parts that do not fill a sliding window."""
    samples = [prompts[number].inputs for number in numbers]
    labels = [np.append(np.full(len(one["input_ids"]) - 1, -100), one["input_ids"][-1]) for one in samples]
    arrays = [{name: np.asarray(value) for name, value in one.items()} for one in samples]
    sample = share_prefixes([one | {"labels": wanted} for one, wanted in zip(arrays, labels)])
    if len(sample["input_ids"]) < window or len(numbers) == 1:
        return [(numbers, sample)]
    half = len(numbers) // 2
    return [*_packed(prompts, numbers[:half], window), *_packed(prompts, numbers[half:], window)]
