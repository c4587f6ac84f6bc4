"""What a run is measured on while it trains: the losses on samples that it never trains on, and whether it looks.

Nothing here draws from a random generator that training uses, and no module is in training mode, so that a run with
validation takes the very steps that it takes without.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch

from vora.data.bad_samples import BadSamples
from vora.data.held_out import HeldOut, key_of_image
from vora.data.packing import Batch, TokenSample, next_sequence
from vora.data.samples import as_bad
from vora.data.schema import Sample
from vora.data.source import Source
from vora.data.stream import WAITING, PackedSequences
from vora.distill.label_loss import label_losses
from vora.distill.objective import LOSSES, Objective

LOOKS = "right_beats_other"  # as `vora eval --task probe` calls it
TIE = 1e-4  # nats; what a batch's padding may change
Numbered: TypeAlias = list[tuple[int, TokenSample]]
Sums: TypeAlias = dict[str, tuple[float, float]]


@dataclass(eq=False)
class Validation:
    """Samples to measure on, made into sequences as those of the training are; `vora.train.trainer` takes it as its
    `eval_dataset`. ValueError where a probe is asked for and no two images differ."""

    samples: Sequence[Sample]
    sequences: PackedSequences  # of the training, of which only settings are used
    bad: BadSamples
    sequences_per_batch: int
    probe_samples: int = 0

    def __post_init__(self) -> None:
        self.pairs = right_and_other(self.samples, self.probe_samples)
        if self.probe_samples and not self.pairs:
            raise ValueError(
                f"No two of {len(self.samples)} validation samples have different images and answers, so a probe has "
                "nothing to compare: set data.validation.probe_samples=0, or give more samples with images."
            )

    def sums(self, objective: Objective, to_device: Callable[[Batch], dict[str, Any]]) -> Sums:
        """{name: (sum, over how many)} of this process's part: each loss over what it is a mean of, and `LOOKS`."""
        found = dict.fromkeys((*LOSSES, LOOKS), (0.0, 0.0))
        for _, batch in self._batches(self._tokenized(enumerate(self.samples))):
            counts = _counts(batch)
            losses = objective(**to_device(batch))
            for name in [name for name in LOSSES if name in losses]:
                total, count = found[name]
                found[name] = total + float(losses[name]) * counts[name], count + counts[name]
        wins = self._wins(objective, to_device)
        return found | {LOOKS: (float(sum(wins)), float(len(wins)))}

    def _wins(self, objective: Objective, to_device: Callable[[Batch], dict[str, Any]]) -> list[float]:
        """Of each pair whether the right image makes the answer likelier: 1 or 0, a tie one half."""
        losses: dict[int, float] = {}
        tokens = self._tokenized(enumerate(one for pair in self.pairs for one in pair), num_per_group=2)
        for numbered, batch in self._batches(tokens):
            sizes = [int((sample["targets"] != -100).sum()) for _, sample in numbered]
            each = losses_of_labels(objective, to_device(batch)).split(sizes)
            losses |= {number: float(part.double().sum()) for (number, _), part in zip(numbered, each)}
        gains = [losses[n + 1] - losses[n] for n in range(0, 2 * len(self.pairs), 2) if {n, n + 1} <= losses.keys()]
        return [0.5 if abs(gain) < TIE else float(gain > 0) for gain in gains]

    def _tokenized(
        self, samples: Iterable[tuple[int, Sample]], num_per_group: int = 1
    ) -> Iterator[tuple[int, TokenSample]]:
        """This process's samples as tokens, groups whole and of one budget of tokens; bad ones are named."""
        maker, sequences = self.sequences.maker, self.sequences
        for number, sample in samples:
            group = number // num_per_group
            if group % sequences.num_ranks != sequences.rank:
                continue
            self.bad.num_read += 1
            try:
                yield number, maker.tokenized(sample, random.Random(f"validation/{group}"), maker.questions_per_image)
            except Exception as error:
                self.bad.add(sample.name, as_bad(error))

    def _batches(self, samples: Iterator[tuple[int, TokenSample]]) -> Iterator[tuple[Numbered, Batch]]:
        """All samples in batches of packed sequences: (numbers and samples in the order of their labels, batch)."""
        length, of_text = self.sequences.sequence_length, self.sequences.maker.text_kl_weight
        while group := list(islice(samples, WAITING)):
            kinds = [[one for one in group if ("pixel_values" in one[1]) is seen] for seen in (True, False)]
            packed = [one for kind in (kinds if of_text else [group]) for one in pack(kind, length)]
            for first in range(0, len(packed), self.sequences_per_batch):
                some = packed[first : first + self.sequences_per_batch]
                batch = self.sequences.collate([[sample for _, sample in sequence] for sequence in some])
                batch["distill_only"] = torch.tensor(False)  # all blocks, also of a batch of text to keep
                yield [one for sequence in some for one in sequence], batch


def validation_samples(
    sources: Sequence[Source], max_samples: int, seed: int, held_out: HeldOut | None, bad: BadSamples
) -> list[Sample]:
    """At most so many samples, of each source by its number of rows: those that are held out, or, with None, any.
    ValueError where there is none."""
    found: list[Sample] = []
    ends = np.cumsum([len(source) for source in sources])
    for number, (source, end) in enumerate(zip(sources, ends)):
        wanted = round(max_samples * end / ends[-1]) - len(found)
        found += islice(_rows(source, (seed, number), held_out, bad), max(0, wanted))
    if not found:
        share = "data.validation.sources" if held_out is None else f"data.validation.share {held_out.share:g}"
        raise ValueError(
            f"{share} of {ends[-1]} rows leaves 0 samples to measure: raise it, or give data.validation.sources of "
            "rows that can be read."
        )
    return found


def _rows(source: Source, seed: tuple[int, int], held_out: HeldOut | None, bad: BadSamples) -> Iterator[Sample]:
    """The rows of a source that are to be measured and can be used, each once, its blocks shuffled."""
    for block in np.random.default_rng(seed).permutation(len(source.block_sizes)).tolist():
        rows = source.read_block(block)
        for offset in range(source.block_sizes[block]):
            bad.num_read += 1
            try:
                sample = source.item(block, offset, rows)
                is_wanted = held_out is None or held_out.holds(sample)
            except Exception as error:
                bad.add(source.row_name(block, offset), as_bad(error))
                continue
            if is_wanted:
                yield sample


def right_and_other(samples: Sequence[Sample], most: int) -> list[tuple[Sample, Sample]]:
    """Of at most so many samples with images one conversation each, and the same beside the images of the next sample
    with as many others, of which it is not said too."""
    seeing = list(islice((sample for sample in samples if sample.images), most))
    keys, pairs = [list(map(key_of_image, sample.images)) for sample in seeing], []
    for number, sample in enumerate(seeing):
        conversation = random.Random(f"probe/{number}").choice(sample.conversations)
        for step in range(1, len(seeing)):
            place = (number + step) % len(seeing)
            other = seeing[place]
            alike = {*keys[number]} & {*keys[place]} or conversation in other.conversations
            if len(other.images) == len(sample.images) and not alike:
                right = replace(sample, conversations=[conversation])
                pairs.append((right, replace(right, images=other.images, allow_urls=other.allow_urls)))
                break
    return pairs


def losses_of_labels(objective: Objective, batch: dict[str, Any]) -> torch.Tensor:
    """The loss at each label of a batch, float[L], row by row."""
    names = ("input_ids", "position_ids", "seen_until", "pixel_values", "image_grid_thw", "image_numbers")
    inputs = {name: batch[name] for name in names if name in batch}
    hidden_states = objective.vora.model(**inputs, use_cache=False).last_hidden_state
    return label_losses(objective.vora, hidden_states, batch["targets"], batch["label_places"])


def pack(samples: Numbered, sequence_length: int) -> Iterator[Numbered]:
    """Some samples in as few sequences as may be."""
    while samples:
        chosen = next_sequence([len(sample["input_ids"]) for _, sample in samples], sequence_length)
        yield [samples[index] for index in chosen]
        samples = [one for index, one in enumerate(samples) if index not in chosen]


def _counts(batch: Batch) -> dict[str, float]:
    """Of how many, or of what weight, each loss of a batch is a mean."""
    return {
        "lm_loss": len(batch["label_places"]),
        "answer_loss": float(batch["label_weights"].sum()) if "label_weights" in batch else 0.0,
        "distill_loss": len(batch["image_places"]) if "image_places" in batch else 0,
        "text_loss": len(batch["text_places"]) if "text_places" in batch else 0,
    }
