"""Sources to an endless, seeded stream of packed sequences, whose position is part of every checkpoint.

Samples are made in chunks of a fixed number, which workers take in turns; sequences are packed from them, in order, by
the process that trains. So neither depends on the number of workers, and a position is the place of the next sample
and of the few that wait for a sequence. The price: each worker of each process reads all blocks, and decodes the
images of its own samples alone.

    rows of sources --(order)--> chunks of samples --(workers)--> samples in order --(packing)--> sequences --> batches
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from vora.data import packing
from vora.data.bad_samples import BadSamples
from vora.data.order import Mixture
from vora.data.packing import Batch, PackedSequence, TokenSample
from vora.data.samples import CHUNK_SAMPLES, Chunks, SampleMaker, unpacked
from vora.data.source import Source
from vora.model.processing_vora import VoraProcessor

EPOCH_ROWS = 1024  # of which a process finds how many sequences an epoch has
COLUMNS_USED, IMAGES_OF_FOLDERS = "columns of the sources", "images of the folders"
ADDED = (COLUMNS_USED, IMAGES_OF_FOLDERS)  # which older checkpoints lack
WAITING = 48  # samples among which sequences are filled; more would pack tighter and read further ahead


class PackedSequences:
    """Sequences of whole samples, endlessly, the same for the same seed, also after a restart from a `state_dict`.

    Args:
        weights: share of the samples that comes from each source; by default, their numbers of rows.
        distill_only_sequences: so many at the start hold images alone, with nothing to predict, to distill from.
        bad_samples, max_bad_share: see `BadSamples`; bad ones are skipped.
        num_workers: processes that read and decode; 0 does it in this one.
        rank, num_ranks: which part of all chunks is read.
        answer_balance: see `vora.data.packing.label_weights`.
        branches: lay out what only distills by `vora.data.packing.images_in_branches`, where it can be.
        sample_options: further arguments of `SampleMaker`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: VoraProcessor,
        sequence_length: int,
        weights: Sequence[float] | None = None,
        distill_only_sequences: int = 0,
        seed: int = 0,
        bad_samples: Path | str | None = None,
        max_bad_share: float = 0.1,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        answer_balance: float = 0.0,
        branches: bool = False,
        **sample_options: Any,
    ) -> None:
        sizes = [len(source) for source in sources]
        weights = sizes if weights is None else weights
        if len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} sources: give one each, or none.")
        self.maker = SampleMaker(sources, processor, sequence_length, seed=seed, **sample_options)
        self.mixture, self.bad = Mixture(weights, seed), BadSamples(bad_samples, max_bad_share)
        self.sequence_length, self.distill_only_sequences = sequence_length, distill_only_sequences
        self.branches = branches
        self.answer_balance, self.num_workers, self.rank, self.num_ranks = answer_balance, num_workers, rank, num_ranks
        shares = np.array(weights) / sum(weights)
        self.num_rows = sum(sizes)
        self._longest_gap = 2 * int((np.array(sizes) / shares).max()) + CHUNK_SAMPLES
        images = processor.image_processor
        digests = [hashlib.sha256(source.block_sizes.tobytes()).hexdigest()[:16] for source in sources]
        self.fingerprint = {
            "rows of the sources": sizes, "blocks of the sources": digests,
            "weights": [float(w) for w in weights], "seed": seed,
            "sequence_length": sequence_length, "questions_per_image": self.maker.questions_per_image,
            "image_tokens": self.maker.image_tokens and list(self.maker.image_tokens),
            "distill_only_sequences": distill_only_sequences, "processes": num_ranks,
            "patch_merge": images.patch_merge, "budget": [images.min_image_tokens, images.max_image_tokens],
            "augment": self.maker.augment, "text_only": self.maker.text_only or None,
            "text_kl_weight": self.maker.text_kl_weight or None,
            "held_out": self.maker.held_out and asdict(self.maker.held_out),
            "prompts": [[list(prompts) for prompts in astuple(source.options.prompts)] for source in sources],
            COLUMNS_USED: [dict(source.options.columns) for source in sources],
            IMAGES_OF_FOLDERS: [source.digest for source in sources],
        }  # fmt: skip
        self._position = self._beginning(distill_only=distill_only_sequences > 0)
        self.max_images = 0  # of a sample that it gave, in one conversation; frames of a video are images

    def __iter__(self) -> Iterator[PackedSequence]:
        """Sequences from where the last one ended."""
        if self._position["distill_only"]:
            left = self.distill_only_sequences - self._position["num_sequences"]
            yield from islice(self._remembered(), left)
            self._position = self._beginning(distill_only=False)
        yield from self._remembered()

    @property
    def epoch(self) -> float:
        """How often the mixture has been read: as many samples as its sources have rows are once. Steps that only
        distill come before."""
        return 0.0 if self._position["distill_only"] else self._num_read(self._position) / self.num_rows

    def sequences_per_epoch(self) -> float:
        """How many sequences this process reads the mixture in once, counted on its first rows; its position stays."""
        counts, enough = (self.bad.num_read, self.bad.num_bad), min(self.num_rows, EPOCH_ROWS * self.num_ranks)
        positions = (position for _, position in self._sequences(self._beginning(distill_only=False), 0))
        position = next(position for position in positions if self._num_read(position) >= enough)
        self.bad.num_read, self.bad.num_bad = counts
        return position["num_sequences"] * self.num_rows / self._num_read(position)

    def _num_read(self, position: Mapping[str, Any]) -> int:
        """The rows that stand in the sequences up to a position, of all processes if they are as far."""
        chunk, index = position["next"]
        return (chunk * CHUNK_SAMPLES + index - len(position["waiting"])) * self.num_ranks

    @property
    def last_places(self) -> list[list[int]]:
        """[chunk, index] of each sample of the last sequence, which `name_of` names."""
        return self._position.get("last", [])

    def name_of(self, place: Sequence[int]) -> str:
        """What the sample at a place is called; nothing is read."""
        first = (place[0] * self.num_ranks + self.rank) * CHUNK_SAMPLES
        before = self.mixture.sources(first, place[1] + 1)
        source = int(before[-1])
        number = int(self.mixture.counts(first)[source] + (before[:-1] == source).sum())
        _, _, block, offset = self.maker.orders[source].draw(number)
        return self.maker.sources[source].row_name(block, offset)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last sequence, as JSON."""
        counts = {"num_read": self.bad.num_read, "num_bad": self.bad.num_bad}
        return {**self._position, **counts, "max_images": self.max_images, "data": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run with the same data was; ValueError, naming what differs, if they are not the same."""
        state = dict(state)
        then = state.pop("data")
        for name, now in self.fingerprint.items():
            if then.get(name) != now and (name in then or name not in ADDED):
                raise ValueError(
                    f"The checkpoint was made with other data: {name} was {then.get(name)} and is {now} now, so "
                    "samples would be lost or seen twice. Restore it (the run's recipe.yaml has it), or start a new "
                    "run from the weights: model.vora=THIS_RUN."
                )
        self.bad.num_read, self.bad.num_bad = state.pop("num_read"), state.pop("num_bad")
        self.max_images = state.pop("max_images", 0)  # which older checkpoints lack
        self._position = state

    def named_samples(self) -> Iterator[tuple[str, TokenSample]]:
        """(name, sample) in the order of training from the beginning, bad ones left out; the position stays."""
        chunks = Chunks(self.maker, self.mixture, False, self.rank, self.num_ranks)
        for _, chunk in map(chunks.__getitem__, count()):
            yield from ((name, sample) for name, sample in unpacked(chunk) if isinstance(sample, dict))

    def distill_sequences(self) -> Iterator[PackedSequence]:
        """Sequences of images alone from the beginning; the position stays."""
        return (sequence for sequence, _ in self._sequences(self._beginning(distill_only=True), 0))

    def training_sequences(self) -> Iterator[PackedSequence]:
        """Sequences of samples from the beginning; the position stays."""
        return (sequence for sequence, _ in self._sequences(self._beginning(distill_only=False), 0))

    def collate(self, sequences: Sequence[PackedSequence]) -> Batch:
        """Sequences to a batch of `Objective.forward`."""
        processor, length = self.maker.processor, self.sequence_length
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self.branches:
            row = packing.images_in_branches(sequences, length, processor.image_token_id, pad)
            if row is not None:
                return row
        batch = packing.collate_sequences(sequences, length, pad)
        if self.answer_balance:
            batch["label_weights"] = packing.label_weights(batch, self.answer_balance)
        if self.maker.text_kl_weight:
            batch |= packing.places_of_text(sequences, length)
            batch["distill_only"] = torch.tensor(self._position["distill_only"])
        return batch | packing.places(batch, processor.image_token_id, processor.image_processor.patch_merge)

    @staticmethod
    def _beginning(distill_only: bool) -> dict[str, Any]:
        return {"distill_only": distill_only, "num_sequences": 0, "next": [0, 0], "waiting": []}

    def _remembered(self) -> Iterator[PackedSequence]:
        for sequence, position in self._sequences(self._position, self.num_workers):
            self._position = position
            self.max_images = max(self.max_images, *map(packing.num_images, sequence))
            yield sequence

    def _sequences(
        self, position: dict[str, Any], num_workers: int
    ) -> Iterator[tuple[PackedSequence, dict[str, Any]]]:
        """Sequences from a position on, each with the position after it."""
        waiting: list[tuple[tuple[int, int], TokenSample]] = []
        for place, sample in self._samples(position, num_workers):
            waiting.append((place, sample))
            if len(waiting) < WAITING:
                continue
            fitting = waiting
            if self.maker.text_kl_weight:  # its sequences run twice, so nothing else is in them
                is_image = "pixel_values" in waiting[0][1]
                fitting = [one for one in waiting if ("pixel_values" in one[1]) == is_image]
            lengths = [len(sample["input_ids"]) for _, sample in fitting]
            chosen = packing.next_sequence(lengths, self.sequence_length)
            taken = {fitting[index][0] for index in chosen}
            samples = [sample for place, sample in waiting if place in taken]
            waiting = [one for one in waiting if one[0] not in taken]
            position = {
                "distill_only": position["distill_only"],
                "num_sequences": position["num_sequences"] + 1,
                "next": [place[0], place[1] + 1],
                "waiting": [list(place) for place, _ in waiting],
                "last": sorted(map(list, taken)),
            }
            yield samples, position

    def _samples(self, position: dict[str, Any], num_workers: int) -> Iterator[tuple[tuple[int, int], TokenSample]]:
        """((chunk, index), sample) of a position's waiting samples and of all from its next one on, in order."""
        waiting, following = {tuple(place) for place in position["waiting"]}, tuple(position["next"])
        first_chunk, distill_only = min({following, *waiting})[0], position["distill_only"]
        loader = DataLoader(
            Chunks(self.maker, self.mixture, distill_only, self.rank, self.num_ranks),
            batch_size=None,
            sampler=count(first_chunk),
            num_workers=num_workers,
            collate_fn=as_it_is,
            generator=torch.Generator().manual_seed(0),  # torch's own would shift a resumed run's dropout
        )
        only_images_teach, num_fruitless = distill_only or self.maker.text_kl_weight, 0
        cause = ""
        for number, chunk in loader:
            for place, (name, sample) in zip(product([number], range(CHUNK_SAMPLES)), unpacked(chunk)):
                teaches = isinstance(sample, dict) and ("pixel_values" in sample or not only_images_teach)
                num_fruitless = 0 if teaches else num_fruitless + 1
                cause = f" The last: {sample}" if isinstance(sample, ValueError) else cause
                if num_fruitless > self._longest_gap:
                    raise ValueError(self._fruitless(num_fruitless, distill_only) + cause)
                if place >= following:
                    self.bad.num_read += 1
                    if isinstance(sample, ValueError):
                        self.bad.add(name, sample)
                if isinstance(sample, dict) and (place >= following or place in waiting):
                    yield place, sample

    def _fruitless(self, count: int, distill_only: bool) -> str:
        if not (distill_only or self.maker.text_kl_weight):
            held = "" if self.maker.held_out is None else " or held out"
            return f"All of the last {count} samples are bad{held} (bad_samples.jsonl)."
        why, cure = "with lora.text_kl_weight text alone teaches nothing", "leave lora.text_kl_weight out"
        if distill_only:
            why, cure = "the first steps distill images alone", "set teacher.distill_only_steps=0"
        return f"None of the last {count} samples holds an image, but {why}: {cure}, or add a source with images."


def as_it_is(item: Any) -> Any:
    """A DataLoader's `collate_fn` that leaves arrays arrays."""
    return item
