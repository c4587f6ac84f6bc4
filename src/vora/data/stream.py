"""Records to an endless, seeded stream of packed rows."""

import json
import random
from itertools import islice
from pathlib import Path

from torch.utils.data import IterableDataset

from vora.data.packing import collate_rows, fill_rows, image_only, sample_of_record

CARRIED = 48  # samples among which rows are filled; more would pack tighter and read further ahead


class PackedRows(IterableDataset):
    """Yields rows of whole samples, epoch after epoch, the same for the same seed.

    A bad record is written to `bad_samples.jsonl` with its cause and skipped; too many stop the run.

    Args:
        sources: list of sequences of `Record`s, mixed in one shuffled order per epoch.
        processor: a `VoraProcessor`.
        row_tokens: T, tokens of a row.
        questions_per_image: conversations drawn per record and epoch; None for all.
        image_only_rows: so many rows at the start hold pictures alone, with nothing to predict, to distill from.
        bad_samples: path of the file that names bad records.
        max_bad_share: stop when more than this share of the records is bad.
    """

    def __init__(
        self,
        sources,
        processor,
        row_tokens,
        questions_per_image=None,
        image_only_rows=0,
        seed=0,
        bad_samples=None,
        max_bad_share=0.1,
    ):
        self.sources, self.processor, self.row_tokens = sources, processor, row_tokens
        self.questions_per_image, self.image_only_rows, self.seed = questions_per_image, image_only_rows, seed
        self.bad_samples, self.max_bad_share = bad_samples and Path(bad_samples), max_bad_share
        self.bad = set()
        self.addresses = [(s, i) for s, source in enumerate(sources) for i in range(len(source))]
        if not self.addresses:
            raise ValueError("The sources hold 0 records: an empty dataset cannot be trained on.")

    def __iter__(self):
        yield from islice(self.picture_rows(), self.image_only_rows)
        yield from self.sample_rows()

    def picture_rows(self):
        """Rows of pictures alone."""
        samples = self.samples(conversations_per_record=1)
        pictures = (image_only(s, self.processor.image_token_id) for s in samples if "pixel_values" in s)
        return self.packed(pictures)

    def sample_rows(self):
        """Rows of pictures with their conversations, and of text."""
        return self.packed(self.samples(self.questions_per_image))

    def packed(self, samples):
        """Samples to rows, each of which is filled from the last few samples read."""
        carried = []
        for sample in samples:
            carried.append(sample)
            if len(carried) < CARRIED:
                continue
            row = fill_rows([len(sample["input_ids"]) for sample in carried], self.row_tokens)[0]
            yield [carried[i] for i in row]
            carried = [sample for i, sample in enumerate(carried) if i not in set(row)]

    def samples(self, conversations_per_record):
        """An endless stream of samples, one per record and epoch."""
        num_read = epoch = 0
        while True:
            rng = random.Random(f"{self.seed}/{epoch}")
            for source, index in rng.sample(self.addresses, len(self.addresses)):
                if (source, index) in self.bad:
                    continue
                record, num_read = self.sources[source][index], num_read + 1
                try:
                    yield self.sample_of(record, rng, conversations_per_record)
                except ValueError as error:
                    self.bad.add((source, index))
                    self._report(record, error)
                    limit = min(max(3, self.max_bad_share * len(self.addresses)), len(self.addresses) - 1)
                    if len(self.bad) > limit:
                        raise ValueError(
                            f"{len(self.bad)} of {num_read} records are bad, the last one {record.name}: {error} "
                            f"All are named in {self.bad_samples}; mend or remove them."
                        ) from None
            epoch += 1

    def sample_of(self, record, rng, max_conversations):
        """One record as a sample for packing, with some of its conversations (None: all).

        Raises:
            ValueError: its image cannot be read, it teaches nothing, or it is longer than a row.
        """
        conversations = record.conversations
        if max_conversations is not None and len(conversations) > max_conversations:
            conversations = rng.sample(conversations, max_conversations)
        sample = sample_of_record(record, self.processor, conversations)
        if len(sample["input_ids"]) > self.row_tokens:
            raise ValueError(
                f"Its {len(sample['input_ids'])} tokens exceed the {self.row_tokens} of a row: raise data.row_tokens, "
                "or lower data.questions_per_image."
            )
        return sample

    def collate(self, rows):
        """Rows to a batch of `VisionLearner.forward`."""
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return collate_rows(rows, self.row_tokens, pad)

    def _report(self, record, error):
        """Name a bad record, once, also when a resumed run meets it again."""
        if self.bad_samples is None:
            return
        line = json.dumps({"record": record.name, "cause": str(error)})
        if not self.bad_samples.exists() or line not in self.bad_samples.read_text().splitlines():
            with self.bad_samples.open("a") as file:
                file.write(line + "\n")
