"""Sources to an endless, seeded stream of packed rows, whose position is part of every checkpoint.

Samples are made in chunks of a fixed number, which workers take in turns; rows are packed from them, in order, by the
process that trains. So neither the samples nor the rows depend on the number of workers, and a position is the place
of the next sample and of the few that wait for a row. The price: each worker of each process reads all blocks, and
decodes the images of its own samples alone.

    source rows --(order)--> chunks of samples --(workers)--> samples in order --(packing)--> rows --> batches
"""

import hashlib
import json
import math
import random
from dataclasses import astuple
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vora.data.augment import augmented
from vora.data.order import Mixture, SourceOrder
from vora.data.packing import (
    collate_sequences,
    cut_after_images,
    kept_places,
    label_weights,
    next_sequence,
    places,
    sample_of_record,
    text_to_keep,
)
from vora.data.schema import without_images

CHUNK_SAMPLES = 32
FIRST_SAMPLES = 16  # by which a source is known to have text without images
WAITING = 48  # samples among which rows are filled; more would pack tighter and read further ahead


class SampleMaker:
    """Rows of sources to samples for packing.

    Args:
        sources: list of `Source`s.
        processor: a `VoraProcessor`.
        sequence_length: T; longer samples are bad.
        questions_per_image: conversations drawn per record and epoch; None for all.
        image_tokens: (fewest, most); each record's budget is drawn anew between them in each epoch, its logarithm
            evenly, so that one model serves many resolutions. None: the processor's own budget.
        blind: leave the images out of each record.
        text_kl_weight: of text without images nothing is to be predicted: it is there to be kept as it was
            (`vora.distill.text_kl`), cut where a row ends.
        augment: per source None or the arguments of `vora.data.augment.augmented`; drawn anew in each epoch.
    """

    def __init__(
        self,
        sources,
        processor,
        sequence_length,
        questions_per_image=None,
        image_tokens=None,
        augment=None,
        text_only=False,
        text_kl_weight=False,
        seed=0,
    ):
        self.sources, self.processor, self.sequence_length = sources, processor, sequence_length
        self.questions_per_image, self.image_tokens, self.seed = questions_per_image, image_tokens, seed
        self.augment, self.text_only = augment or [None] * len(sources), text_only
        self.text_kl_weight = text_kl_weight
        self.orders = [SourceOrder(source.block_sizes, (seed, number)) for number, source in enumerate(sources)]
        self._open = [(None, {}) for _ in sources]

    def draw(self, source, number, distill_only=False):
        """The sample that is drawn from a source as the `number`-th.

        Args:
            distill_only: cut after the images, with nothing to predict; None where there are none, but text to keep.

        Returns:
            (name, sample of `share_prefixes`, or None, or the ValueError that says why it is bad).
        """
        epoch, group, block, offset = self.orders[source].draw(number)
        rows = self._rows(source, (epoch, group), block)
        rng = random.Random(f"{self.seed}/{source}/{number}")
        most = 1 if distill_only else self.questions_per_image
        try:
            record = self.sources[source].record(block, offset, rows)
            if self.augment[source] and not self.text_only:
                record = augmented(record, rng, **self.augment[source])
            sample = self.sample_of(record, rng, most)
        except Exception as error:
            sample = as_bad(error)
        if distill_only and isinstance(sample, dict):
            if "pixel_values" in sample:
                sample = cut_after_images(sample, self.processor.image_token_id)
            elif not self.text_kl_weight:
                sample = None
        return self.sources[source].row_name(block, offset), sample

    def _rows(self, source, group, block):
        """A block's rows; those of the group at hand stay in memory."""
        if self._open[source][0] != group:
            self._open[source] = (group, {})
        blocks = self._open[source][1]
        if block not in blocks:
            blocks[block] = self.sources[source].read_block(block)
        return blocks[block]

    def sample_of(self, record, rng, max_conversations):
        """One record as a sample for packing, with some of its conversations (None: all).

        Raises:
            ValueError: an image cannot be read, it teaches nothing, or it is longer than a row.
        """
        if self.text_only:
            record = without_images(record)
        conversations = record.conversations
        if max_conversations is not None and len(conversations) > max_conversations:
            conversations = rng.sample(conversations, max_conversations)
        sample = sample_of_record(record, self.processor, conversations, **self.draw_budget(rng))
        if self.text_kl_weight and "pixel_values" not in sample:
            return text_to_keep(sample, self.sequence_length)
        if len(sample["input_ids"]) > self.sequence_length:
            raise ValueError(
                f"Its {len(sample['input_ids'])} tokens exceed the {self.sequence_length} of a sequence: raise "
                "data.sequence_length, or lower data.questions_per_image or model.max_image_tokens."
            )
        return sample

    def draw_budget(self, rng):
        """The image processor's arguments for one record: at most n tokens an image, at least half as many."""
        if self.image_tokens is None:
            return {}
        least, most = self.image_tokens
        drawn = round(math.exp(rng.uniform(math.log(least), math.log(most))))
        return {"min_image_tokens": max(1, drawn // 2), "max_image_tokens": drawn}


def as_bad(error):
    """What says that a sample is bad. Data brings errors of any kind, from chat templates and tokenizers too; only
    what says something of the machine ends a run."""
    if isinstance(error, MemoryError):
        raise error
    return error if type(error) is ValueError else ValueError(f"{type(error).__name__}: {error}")


class Chunks(IterableDataset):
    """The samples of one rank in chunks, from a position on; in a worker, its share of the chunks.

    Yields (chunk number of the rank, its list of (name, sample or None or ValueError), as `_packed_for_travel` makes
    it). Chunk k of rank r is chunk k R + r of all R ranks.
    """

    def __init__(self, maker, mixture, first_chunk, distill_only, rank, num_ranks):
        self.maker, self.mixture, self.first_chunk = maker, mixture, first_chunk
        self.distill_only, self.rank, self.num_ranks = distill_only, rank, num_ranks

    def __iter__(self):
        worker = get_worker_info()
        start, step = (self.first_chunk, 1) if worker is None else (self.first_chunk + worker.id, worker.num_workers)
        place = (start * self.num_ranks + self.rank) * CHUNK_SAMPLES
        counts = self.mixture.counts(place)
        for number in count(start, step):
            sources = self.mixture.sources(place, CHUNK_SAMPLES)
            yield number, _packed_for_travel(self._samples(sources, counts.copy()))
            for first in range(place, place + step * self.num_ranks * CHUNK_SAMPLES, CHUNK_SAMPLES):
                counts += np.bincount(self.mixture.sources(first, CHUNK_SAMPLES), minlength=len(counts))
            place += step * self.num_ranks * CHUNK_SAMPLES

    def _samples(self, sources, counts):
        samples = []
        for source in sources.tolist():
            samples.append(self.maker.draw(source, int(counts[source]), self.distill_only))
            counts[source] += 1
        return samples


def _packed_for_travel(samples):
    """All patches of a chunk in one tensor: between processes it goes through shared memory."""
    patches = [
        sample.pop("pixel_values") for _, sample in samples if isinstance(sample, dict) and "pixel_values" in sample
    ]
    return samples, torch.from_numpy(np.concatenate(patches)) if patches else None


def _unpacked(samples, patches):
    """Each sample gets its own patches back."""
    first = 0
    for _, sample in samples:
        if isinstance(sample, dict) and "image_grid_thw" in sample:
            last = first + int(sample["image_grid_thw"].prod(-1).sum())
            sample["pixel_values"], first = patches[first:last].numpy(), last
    return samples


def _is_text(sample):
    return isinstance(sample, dict) and "pixel_values" not in sample


class PackedSequences:
    """Rows of whole samples, endlessly, the same for the same seed, also after a restart from a `state_dict`.

    A bad sample is written to `bad_samples.jsonl` with its cause and skipped; too many stop the run.

    Args:
        sources: list of `Source`s.
        processor: a `VoraProcessor`.
        sequence_length: T, tokens of a row.
        weights: share of the samples that comes from each source; by default, their numbers of rows.
        distill_only_sequences: so many rows at the start hold images alone, with nothing to predict, to distill from.
        bad_samples: path of the file that names bad samples.
        max_bad_share: stop when more than this share of the samples read (taken as a thousand at first) is bad.
        num_workers: processes that read and decode; 0 does it in this one.
        rank, num_ranks: which part of all chunks is read.
        answer_balance: how much answers of few tokens count, see `vora.data.packing.label_weights`.
        sample_options: further arguments of `SampleMaker`.

    Raises:
        ValueError: as many weights as sources are needed.
    """

    def __init__(
        self,
        sources,
        processor,
        sequence_length,
        weights=None,
        distill_only_sequences=0,
        seed=0,
        bad_samples=None,
        max_bad_share=0.1,
        num_workers=0,
        rank=0,
        num_ranks=1,
        answer_balance=0.0,
        **sample_options,
    ):
        sizes = [len(source) for source in sources]
        weights = sizes if weights is None else weights
        if len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights for {len(sources)} sources: give one each, or none.")
        self.maker = SampleMaker(sources, processor, sequence_length, seed=seed, **sample_options)
        self.weights, self.mixture = weights, Mixture(weights, seed)
        self.sequence_length, self.distill_only_sequences = sequence_length, distill_only_sequences
        self.answer_balance = answer_balance
        self.bad_samples, self.max_bad_share = bad_samples and Path(bad_samples), max_bad_share
        self.num_workers, self.rank, self.num_ranks = num_workers, rank, num_ranks
        self.num_read, self.num_bad, self._named, self._named_to = 0, 0, set(), 0
        if self.bad_samples is not None and self.bad_samples.exists():
            text = self.bad_samples.read_text()  # a killed run may have left its last line unfinished
            self.bad_samples.write_text(text[: text.rfind("\n") + 1])
        shares = np.array(weights) / sum(weights)
        self._longest_gap = 2 * int((np.array(sizes) / shares).max()) + CHUNK_SAMPLES
        images = processor.image_processor
        self.fingerprint = {
            "rows of the sources": sizes, "blocks of the sources": [_digest(source.block_sizes) for source in sources],
            "weights": [float(w) for w in weights], "seed": seed,
            "sequence_length": sequence_length, "questions_per_image": self.maker.questions_per_image,
            "image_tokens": self.maker.image_tokens and list(self.maker.image_tokens),
            "distill_only_sequences": distill_only_sequences, "processes": num_ranks,
            "patch_merge": images.patch_merge,
            "budget": [images.min_image_tokens, images.max_image_tokens],
            "augment": self.maker.augment, "text_only": self.maker.text_only or None,
            "text_kl_weight": self.maker.text_kl_weight or None,
            "prompts": [[list(asked) for asked in astuple(source.prompts)] for source in sources],
        }  # fmt: skip
        self._position = self._beginning(distill_only=distill_only_sequences > 0)

    def __iter__(self):
        """Rows from where the last one ended: lists of samples."""
        if self._position["distill_only"]:
            left = self.distill_only_sequences - self._position["num_rows"]
            yield from islice(self._rows(self._position), left)
            self._position = self._beginning(distill_only=False)
        yield from self._rows(self._position)

    def state_dict(self):
        """The position after the last row, as JSON."""
        return {**self._position, "num_read": self.num_read, "num_bad": self.num_bad, "data": self.fingerprint}

    def load_state_dict(self, state):
        """Go on where a run with the same data was.

        Raises:
            ValueError: the data or what is made of them is not the same; what differs is named.
        """
        state = dict(state)
        then = state.pop("data")
        for name, now in self.fingerprint.items():
            if then.get(name) != now:
                raise ValueError(
                    f"The checkpoint was made with other data: {name} was {then.get(name)} and is {now} now, so "
                    "samples would be lost or seen twice. Restore it, or start a new run from the weights."
                )
        self.num_read, self.num_bad = state.pop("num_read"), state.pop("num_bad")
        self._position = state

    def named_samples(self):
        """(name, sample) in the order of training from the beginning, bad ones left out; the position stays."""
        return self._samples_of(self.mixture, self.rank, self.num_ranks)

    def texts(self):
        """Samples of text alone, from the beginning and the same in each process; the position stays. They come from
        the sources that have some among their first samples, in these sources' proportions: no endless search for a
        text among images, and no image decoded for it. None where no source has."""
        have = [any(map(_is_text, self._first_of(source))) for source in range(len(self.maker.sources))]
        if any(have):
            weights = [weight * has for weight, has in zip(self.weights, have)]
            named = self._samples_of(Mixture(weights, self.maker.seed), 0, 1)
            yield from (sample for _, sample in named if _is_text(sample))

    def _first_of(self, source):
        return (self.maker.draw(source, number)[1] for number in range(FIRST_SAMPLES))

    def _samples_of(self, mixture, rank, num_ranks):
        for _, packed in Chunks(self.maker, mixture, 0, False, rank, num_ranks):
            yield from ((name, sample) for name, sample in _unpacked(*packed) if isinstance(sample, dict))

    def distill_sequences(self):
        """Rows of images alone from the beginning; the position stays."""
        return self._rows(self._beginning(distill_only=True), remember=False)

    def training_sequences(self):
        """Rows of samples from the beginning; the position stays."""
        return self._rows(self._beginning(distill_only=False), remember=False)

    @staticmethod
    def _beginning(distill_only):
        return {"distill_only": distill_only, "num_rows": 0, "next": [0, 0], "waiting": []}

    def _rows(self, position, remember=True):
        waiting = []
        for place, sample in self._samples(position, self.num_workers if remember else 0):
            waiting.append((place, sample))
            if len(waiting) < WAITING:
                continue
            fitting = range(len(waiting))
            if self.maker.text_kl_weight:  # its rows run twice, so nothing else is in them
                kinds = ["pixel_values" in sample for _, sample in waiting]
                fitting = [index for index in fitting if kinds[index] == kinds[0]]
            lengths = [len(waiting[index][1]["input_ids"]) for index in fitting]
            row = [fitting[place] for place in next_sequence(lengths, self.sequence_length)]
            samples = [waiting[i][1] for i in row]
            taken = set(row)
            waiting = [one for i, one in enumerate(waiting) if i not in taken]
            if remember:
                self._position = {
                    "distill_only": position["distill_only"],
                    "num_rows": self._position["num_rows"] + 1,
                    "next": [place[0], place[1] + 1],
                    "waiting": [list(place) for place, _ in waiting],
                }
            yield samples

    def _samples(self, position, num_workers):
        """((chunk, index), sample) of a position's waiting samples and of all from its next one on, in order."""
        waiting, following = {tuple(place) for place in position["waiting"]}, tuple(position["next"])
        first_chunk = min({following, *waiting})[0]
        chunks = Chunks(self.maker, self.mixture, first_chunk, position["distill_only"], self.rank, self.num_ranks)
        own = torch.Generator().manual_seed(0)  # a loader's draw from torch's own would shift a resumed run's dropout
        loader = DataLoader(
            chunks,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=as_it_is,
            worker_init_fn=_few_threads,
            generator=own,
        )
        num_fruitless = 0
        for number, packed in loader:
            for index, (name, sample) in enumerate(_unpacked(*packed)):
                place = (number, index)
                num_fruitless = 0 if self._teaches(sample, position["distill_only"]) else num_fruitless + 1
                if num_fruitless > self._longest_gap:
                    raise ValueError(self._fruitless(num_fruitless, position["distill_only"]))
                if place >= following:
                    self.num_read += 1
                    if isinstance(sample, ValueError):
                        self._report(name, sample)
                if isinstance(sample, dict) and (place >= following or place in waiting):
                    yield place, sample

    def _teaches(self, sample, distill_only):
        """Whether something can be learned from a sample, and not only kept."""
        return isinstance(sample, dict) and (
            "pixel_values" in sample or not (distill_only or self.maker.text_kl_weight)
        )

    def _fruitless(self, count, distill_only):
        if distill_only:
            return (
                f"None of the last {count} samples holds an image, but the first steps distill images alone: set "
                "teacher.distill_only_steps=0, or add a source with images."
            )
        if self.maker.text_kl_weight:
            return (
                f"None of the last {count} samples holds an image, and with lora.text_kl_weight text alone teaches "
                "nothing: add a source with images, or leave lora.text_kl_weight out."
            )
        return f"All of the last {count} samples are bad: bad_samples.jsonl of the run says why."

    def collate(self, rows):
        """Rows to a batch of `Objective.forward`."""
        tokenizer = self.maker.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batch = collate_sequences(rows, self.sequence_length, pad)
        processor = self.maker.processor
        if self.answer_balance:
            batch["label_weights"] = label_weights(batch, self.answer_balance)
        if self.maker.text_kl_weight:
            batch |= kept_places(rows, self.sequence_length)
            batch["distill_only"] = torch.tensor(self._position["distill_only"])
        return batch | places(batch, processor.image_token_id, processor.image_processor.patch_merge)

    def _named_since(self):
        """The records that the file of bad samples names since it was last read, by this process or another, in whole
        lines: one may be writing its last."""
        if not self.bad_samples.exists():
            return set()
        with self.bad_samples.open("rb") as file:
            file.seek(self._named_to)
            whole = file.read().rpartition(b"\n")[0]
        self._named_to += len(whole) + 1 if whole else 0
        return {json.loads(line)["record"] for line in whole.splitlines()}

    def _report(self, name, error):
        """Count a bad sample and name it, once; stop if there are too many."""
        self.num_bad += 1
        if self.bad_samples is not None and name not in self._named:
            self._named |= self._named_since()
            if name not in self._named:
                self._named.add(name)
                self.bad_samples.parent.mkdir(parents=True, exist_ok=True)
                with self.bad_samples.open("a") as file:
                    file.write(json.dumps({"record": name, "cause": str(error)}) + "\n")
        if self.num_bad > self.max_bad_share * max(self.num_read, 1000):
            raise ValueError(
                f"{self.num_bad} of the {self.num_read} samples read are bad, the last one {name}: {error} All are "
                f"named in {self.bad_samples}; mend or remove them, or raise data.max_bad_share."
            )


def _digest(block_sizes):
    """Of sizes of blocks, on which the order depends."""
    return hashlib.sha256(np.asarray(block_sizes, np.int64).tobytes()).hexdigest()[:16]


def as_it_is(item):
    """A DataLoader's `collate_fn` that leaves arrays arrays."""
    return item


def _few_threads(worker):
    torch.set_num_threads(1)


class PackedBatches:
    """What the Trainer takes as its dataloader: batches of so many rows, from where `rows` stands."""

    def __init__(self, rows, batch_rows):
        self.rows, self.batch_rows = rows, batch_rows

    def __iter__(self):
        rows = iter(self.rows)
        while True:
            yield self.rows.collate([next(rows) for _ in range(self.batch_rows)])
