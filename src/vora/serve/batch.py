"""Answers generated side by side: it knows tokens only.

All rows end at the same place of one cache, with padding on their left. Rows that join bring the keys and values of
their prompts, which are read in one pass, packed so that none sees another; a row that leaves gives its place to the
last one.

Dims: R rows, N prompts, T tokens, C columns of the cache, H heads, W width of a head, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vora.model.attention import sliding_window
from vora.model.modeling_vora import CACHE, VoraForConditionalGeneration

SPARE = 64  # columns added at once
MOST_READ = 512  # tokens of prompts read in one pass: those who are being answered wait for it
KEPT = "rows_with_image"  # where a model with unmerged LoRA notes with a cache which of its rows have an image


def can_batch(model: VoraForConditionalGeneration) -> bool:
    """Whether all that a model keeps of a prompt are keys and values, which rows can join with, and no row's positions
    change with the length of another."""
    config = model.config.get_text_config()
    positions = getattr(config, "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (positions, *positions.values()) if isinstance(one, dict)}
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return layers <= {DynamicLayer, DynamicSlidingWindowLayer} and not kinds & {"dynamic", "longrope"}


def read_together(model: VoraForConditionalGeneration, prompts: Sequence[dict[str, Tensor]]) -> list[int]:
    """Which prompts join in one pass: the first, and as many after it as `MOST_READ` and a sliding window hold, all of
    them with an image or all without, since unmerged LoRA is on or off in a whole pass."""
    window = sliding_window(model.config)
    found: list[int] = []
    num_tokens, most = 0, min(MOST_READ, window or MOST_READ)
    for number, prompt in enumerate(prompts):
        length = prompt["input_ids"].shape[1]
        is_alike = ("pixel_values" in prompt) == ("pixel_values" in prompts[0])
        if not found or (is_alike and num_tokens + length <= most):
            found.append(number)
            num_tokens += length
    return found


def packed(prompts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Model inputs of prompts of one row each, one after the other in one sequence; a single one stays as it is."""
    if len(prompts) == 1:
        return prompts[0]
    ids = [prompt["input_ids"] for prompt in prompts]
    lengths = torch.tensor([one.shape[1] for one in ids])
    last = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
    inputs = {"input_ids": torch.cat(ids, 1), "seen_until": last[None]}
    inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    inputs = {name: tensor.to(ids[0].device) for name, tensor in inputs.items()}
    for name in ("pixel_values", "image_grid_thw"):
        if name in prompts[0]:
            inputs[name] = torch.cat([prompt[name] for prompt in prompts])
    return inputs


class _Layer(DynamicLayer):
    """Keys and values of all rows, float[R, H, C, W], of which `batch` says which rows and columns are in use."""

    def __init__(self, batch: "Batch", keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.batch, self.keys, self.values, self.is_initialized = batch, keys, values, True

    def get_seq_length(self) -> int:
        return self.batch.end - self.batch.start

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, new = len(self.batch.lengths), self.batch.end + key_states.shape[2]
        assert self.keys is not None and self.values is not None
        self.keys[:rows, :, self.batch.end : new] = key_states
        self.values[:rows, :, self.batch.end : new] = value_states
        return self.keys[:rows, :, self.batch.start : new], self.values[:rows, :, self.batch.start : new]


class Batch:
    """The rows that are being generated. Where `can_batch` is False it holds one row at most."""

    def __init__(self, model: VoraForConditionalGeneration) -> None:
        self.model, self.is_shared = model, can_batch(model)
        self.lengths: list[int] = []  # tokens of each row
        self.with_image: list[bool | None] = []  # of each row, as `KEPT` has it; None where nothing is noted
        self.start = self.end = 0  # columns in use
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)  # [R, C]

    def join(self, prompts: Sequence[dict[str, Tensor]]) -> Tensor:
        """Read prompts of one row each, the last rows from now on; float[N, V], the logits of their first tokens. See
        `read_together` for which; ValueError where they exceed the sliding window."""
        cache = DynamicCache() if self.is_shared else DynamicCache(config=self.model.config.get_text_config())
        lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
        last = torch.tensor(lengths).cumsum(0).to(self.model.device) - 1
        outputs = self.model(**packed(prompts), **{CACHE: cache}, use_cache=True, logits_to_keep=last)
        if self.is_shared:
            self._add(cache, lengths)
        else:
            self.cache = cache
        self.lengths += lengths
        self.with_image += getattr(cache, KEPT, [None]) * len(prompts)
        return outputs.logits[0].float()

    def step(self, tokens: list[int]) -> Tensor:
        """Each row goes on by a token; float[R, V], the logits of the next ones."""
        device, rows = self.model.device, len(self.lengths)
        inputs: dict[str, Any] = {"input_ids": torch.tensor(tokens, device=device)[:, None]}
        inputs["position_ids"] = torch.tensor(self.lengths, device=device)[:, None]
        if self.is_shared:
            if self.end == self.mask.shape[1]:
                self._resize(rows, self.end - self.start)
            self.mask[:rows, self.end] = 1
            inputs["attention_mask"] = self.mask[:rows, self.start : self.end + 1]
            if None not in self.with_image:
                setattr(self.cache, KEPT, list(self.with_image))
        logits = self.model(**inputs, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1).logits
        self.lengths, self.end = [length + 1 for length in self.lengths], self.end + 1
        return logits[:, -1].float()

    def leave(self, row: int) -> None:
        """A row ends; the last one takes its place, and its number."""
        last, with_image = self.lengths.pop(), self.with_image.pop()
        if row < len(self.lengths):
            self.lengths[row], self.with_image[row] = last, with_image
            columns = slice(self.start, self.end)
            for states in (*self._states(), self.mask[:, None]):
                states[row, :, columns] = states[len(self.lengths), :, columns]
        if not self.lengths:  # memory goes back
            self.__init__(self.model)  # type: ignore[misc]
            return
        self.mask[len(self.lengths)] = 0
        self.start = self.end - max(self.lengths)

    def _states(self) -> list[Tensor]:
        return [states for layer in self.cache.layers for states in (layer.keys, layer.values)]

    def _add(self, cache: DynamicCache, lengths: list[int]) -> None:
        """Put keys and values of packed prompts behind the last row."""
        if self.cache is None:
            self.cache = DynamicCache()
            empty = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in cache.layers]
            self.cache.layers = [_Layer(self, keys, values) for keys, values in empty]
        row, longest = len(self.lengths), max(lengths)
        num_rows = row + len(lengths)
        if num_rows > len(self.mask) or longest > self.end:
            self._resize(max(num_rows, min(2 * row, row + 8)), max(longest, self.end - self.start))
        new = [states.split(lengths, 2) for layer in cache.layers for states in (layer.keys, layer.values)]
        for number, length in enumerate(lengths, row):
            first = self.end - length
            for states, added in zip(self._states(), new):
                states[number, :, :first] = 0  # what another row left, were it no number, would spoil what is masked
                states[number, :, first : self.end] = added[number - row][0]
            self.mask[number], self.mask[number, first : self.end] = 0, 1
        self.start = min(self.start, self.end - longest)

    def _resize(self, num_rows: int, length: int) -> None:
        """Room for so many rows of so many tokens, and for some more of them; what is in use stays."""
        used, columns = slice(self.start, self.end), slice(length - (self.end - self.start), length)
        rows, num_rows = len(self.lengths), max(num_rows, len(self.mask))

        def moved(states: Tensor) -> Tensor:
            found = states.new_zeros(num_rows, states.shape[1], length + SPARE, *states.shape[3:])
            found[:rows, :, columns] = states[:rows, :, used]
            return found

        # all of it before any takes its place, for memory may run out on the way
        kept = [(moved(layer.keys), moved(layer.values)) for layer in self.cache.layers]
        mask = moved(self.mask[:, None])[:, 0]
        for layer, (keys, values) in zip(self.cache.layers, kept):
            layer.keys, layer.values = keys, values
        self.mask, self.start, self.end = mask, columns.start, length
