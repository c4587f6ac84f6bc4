"""Rows of sources to samples of tokens, in chunks that workers take in turns."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset

from vora.data.augment import augmented
from vora.data.held_out import HeldOut
from vora.data.order import Mixture, SourceOrder
from vora.data.packing import TokenSample, cut_after_images, tokenize_sample, without_targets
from vora.data.schema import Sample, without_images
from vora.data.source import Source
from vora.model.processing_vora import VoraProcessor

CHUNK_SAMPLES = 32

# a sample's name, and the sample, None where there is nothing to distill from or it is held out, or why it is bad
Drawn: TypeAlias = tuple[str, TokenSample | ValueError | None]
Chunk: TypeAlias = tuple[list[Drawn], torch.Tensor | None]


@dataclass(eq=False)
class SampleMaker:
    """Rows of sources to samples for packing."""

    sources: Sequence[Source]
    processor: VoraProcessor
    sequence_length: int  # T; longer samples are bad
    questions_per_image: int | None = None  # conversations drawn per row and epoch; None for all
    # (fewest, most): each row's budget is drawn anew between them in each epoch, its logarithm evenly, so that one
    # model serves many resolutions; None: the processor's own budget
    image_tokens: tuple[int, int] | None = None
    # per source None or the arguments of `vora.data.augment.augmented`, drawn anew in each epoch
    augment: Sequence[Mapping[str, Any] | None] | None = None
    text_only: bool = False  # leave the images out of each sample
    # of text without images nothing is to be predicted: it is there to be kept as it was (`vora.distill.text_kl`), cut
    # where a packed sequence ends
    text_kl_weight: bool = False
    seed: int = 0
    held_out: HeldOut | None = None  # what is not drawn

    def __post_init__(self) -> None:
        self.augment = self.augment or [None] * len(self.sources)
        self.orders = [
            SourceOrder(source.block_sizes, (self.seed, number)) for number, source in enumerate(self.sources)
        ]
        self._open: list[tuple[Any, dict[int, Any]]] = [(None, {}) for _ in self.sources]

    def draw(self, source: int, number: int, distill_only: bool = False) -> Drawn:
        """The sample that is drawn from a source as the `number`-th; if `distill_only`, cut after the images, with
        nothing to predict, and None where there are none, but text to keep. None also where it is held out."""
        epoch, group, block, offset = self.orders[source].draw(number)
        rows = self._rows(source, (epoch, group), block)
        rng = random.Random(f"{self.seed}/{source}/{number}")
        found: TokenSample | ValueError | None
        try:
            sample = self.sources[source].item(block, offset, rows)
            if self.held_out is not None and self.held_out.holds(sample) is not False:
                return self.sources[source].row_name(block, offset), None
            if (changes := self.augment and self.augment[source]) and not self.text_only:
                sample = augmented(sample, rng, **changes)
            found = self.tokenized(sample, rng, 1 if distill_only else self.questions_per_image)
            if distill_only and "pixel_values" in found:
                found = cut_after_images(found, self.processor.image_token_id)
            elif distill_only and not self.text_kl_weight:
                found = None
        except Exception as error:
            found = as_bad(error)
        return self.sources[source].row_name(block, offset), found

    def _rows(self, source: int, group: tuple[int, int], block: int) -> Any:
        """A block's rows; those of the group at hand stay in memory."""
        if self._open[source][0] != group:
            self._open[source] = (group, {})
        blocks = self._open[source][1]
        if block not in blocks:
            blocks[block] = self.sources[source].read_block(block)
        return blocks[block]

    def tokenized(self, sample: Sample, rng: random.Random, max_conversations: int | None) -> TokenSample:
        """A sample as tokens for packing, with some of its conversations (None: all); ValueError if an image cannot be
        read, it teaches nothing, or it is longer than a packed sequence."""
        if self.text_only:
            sample = without_images(sample)
        conversations, budget = sample.conversations, {}
        if max_conversations is not None and len(conversations) > max_conversations:
            conversations = rng.sample(conversations, max_conversations)
        if self.image_tokens is not None:
            most = round(math.exp(rng.uniform(*map(math.log, self.image_tokens))))
            budget = {"min_image_tokens": max(1, most // 2), "max_image_tokens": most}
        found = tokenize_sample(sample, self.processor, conversations, **budget)
        if self.text_kl_weight and "pixel_values" not in found:
            return without_targets(found, self.sequence_length)
        if len(found["input_ids"]) > self.sequence_length:
            raise ValueError(
                f"Its {len(found['input_ids'])} tokens exceed the {self.sequence_length} of a packed sequence: raise "
                "data.sequence_length, or lower data.questions_per_image or model.max_image_tokens."
            )
        return found


def as_bad(error: Exception) -> ValueError:
    """What says that a sample is bad. Data brings errors of any kind, from chat templates and tokenizers too; only
    what says something of the machine ends a run."""
    if isinstance(error, MemoryError):
        raise error
    return error if type(error) is ValueError else ValueError(f"{type(error).__name__}: {error}")


@dataclass(eq=False)
class Chunks(Dataset):
    """The samples of one rank in chunks: chunk k of rank r is chunk k R + r of all R ranks. All patches of a chunk are
    in one tensor: between processes it goes through shared memory. `unpacked` gives them back."""

    maker: SampleMaker
    mixture: Mixture
    distill_only: bool
    rank: int
    num_ranks: int

    def __getitem__(self, number: int) -> tuple[int, Chunk]:
        place = (number * self.num_ranks + self.rank) * CHUNK_SAMPLES
        next_of, samples = self.mixture.counts(place).copy(), []
        for source in self.mixture.sources(place, CHUNK_SAMPLES).tolist():
            samples.append(self.maker.draw(source, int(next_of[source]), self.distill_only))
            next_of[source] += 1
        patches = [one.pop("pixel_values") for _, one in samples if isinstance(one, dict) and "pixel_values" in one]
        return number, (samples, torch.from_numpy(np.concatenate(patches)) if patches else None)


def unpacked(chunk: Chunk) -> list[Drawn]:
    """The samples of a chunk, each with its own patches."""
    samples, patches = chunk
    first = 0
    for _, sample in samples:
        if isinstance(sample, dict) and "image_grid_thw" in sample and patches is not None:
            last = first + int(sample["image_grid_thw"].prod(-1).sum())
            sample["pixel_values"], first = patches[first:last].numpy(), last
    return samples
