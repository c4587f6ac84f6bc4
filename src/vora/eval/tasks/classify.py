"""One of many classes, chosen by likelihood and, separately, said freely."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vora.data.answers import class_of
from vora.data.prompts import DEFAULT_PROMPTS
from vora.eval.metrics.vqa import normalised
from vora.eval.rows import Example, Row, Rows, SkippedRows
from vora.eval.tasks.task import Task


class Classify(Task):
    """The class of an image."""

    name: ClassVar[str] = "classify"
    chooses: ClassVar[bool] = True
    default_prompt: ClassVar[str] = DEFAULT_PROMPTS.label[0]

    def examples(self, rows: Rows, skipped: SkippedRows) -> list[Example]:
        """Candidates are the classes of all rows, or `labels`; ValueError if there is but one. `max_samples` takes one
        of each class in turn, for files and folders are often sorted by class."""
        found = list(self.each(rows, skipped))
        known = self.labels or sorted({example.references[0] for example in found})
        candidates = tuple(dict.fromkeys(known))
        if len(candidates) == 1:
            raise ValueError(
                f"The {len(found)} examples have one class, {candidates[0]!r}, so that any model would be right: name "
                "all classes with --labels."
            )
        kept, count = [], Counter[str]()
        turns = []  # of each that is kept, how many of its class came before
        for example in found:
            if example.references[0] in candidates:
                example.candidates = candidates
                kept.append(example)
                turns.append(count[example.references[0]])
                count[example.references[0]] += 1
            else:
                cause = f"Its label {example.references[0]!r} is none of the {len(candidates)} classes."
                skipped.add(example.name, cause)
        first = sorted(range(len(kept)), key=turns.__getitem__)[: self.max_samples]
        return [kept[number] for number in sorted(first)]

    def of_row(self, row: Row, skipped: SkippedRows) -> Iterator[Example]:
        yield Example(row.name, self.prompt_for(), [class_of(row.values, self.labels)], row.images, row.number)

    def score_one(self, example: Example, prediction: Mapping[str, Any]) -> dict[str, Any]:
        right = example.references[0]
        return {
            "accuracy": float(prediction["chosen"] == right),
            "generated_accuracy": float(normalised(prediction["generated"]) == normalised(right)),
        }
