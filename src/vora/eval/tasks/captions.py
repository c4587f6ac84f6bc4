"""Captions held against people's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vora.data.answers import captions_of
from vora.data.prompts import DEFAULT_PROMPTS
from vora.eval.metrics.captions import bleu_4, bleu_counts, cider_d
from vora.eval.metrics.intervals import interval_of, mean
from vora.eval.rows import Example, Row, Rows, SkippedRows
from vora.eval.tasks.task import Task


class Captions(Task):
    """Captions, scored by CIDEr-D and BLEU-4."""

    name: ClassVar[str] = "captions"
    max_new_tokens: ClassVar[int] = 40
    num_beams: ClassVar[int] = 3
    default_prompt: ClassVar[str] = DEFAULT_PROMPTS.caption[0]

    def examples(self, rows: Rows, skipped: SkippedRows) -> list[Example]:
        """As of all tasks; rows of one image, as where each caption has its own, are one example."""
        found: dict[Any, Example] = {}
        for example in self.each(rows, skipped):
            if example.group not in found and len(found) == self.max_samples:
                continue  # further captions of the first may follow
            first = found.setdefault(example.group, example)
            if first is not example:
                first.references += example.references
        return list(found.values())

    def of_row(self, row: Row, skipped: SkippedRows) -> Iterator[Example]:
        captions = [" ".join(caption.split()) for caption in captions_of(row.values)]
        yield Example(row.name, self.prompt_for(), captions, row.images, row.image_key())

    def score(self, examples: Sequence[Example], predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        captions, references = [one["generated"] for one in predictions], [example.references for example in examples]
        return [
            {"cider_d": float(score), "bleu_counts": bleu_counts(*pair)}
            for score, *pair in zip(cider_d(captions, references), captions, references)
        ]

    def metrics(self, examples: Sequence[Example], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """CIDEr-D's interval is that of a mean over images, n-grams' weights being fixed; BLEU's of the corpus. Of
        one image there is no CIDEr-D: what its words weigh is counted over others."""
        groups, counts = [example.group for example in examples], [one["bleu_counts"] for one in scores]
        values = [one["cider_d"] for one in scores] if len(scores) > 1 else []
        return {"cider_d": mean(values, groups, self.seed), "bleu_4": interval_of(bleu_4, counts, groups, self.seed)}
