"""The base of all tasks: rows to examples, predictions to scores, scores to metrics.

How predictions come about (`vora.eval.scoring.predict`) and where rows lie (`vora.eval.rows`) a task need not know.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from vora.data.columns import LEAD_COLUMNS
from vora.eval.metrics.intervals import share
from vora.eval.rows import Example, Row, Rows, SkippedRows


@dataclass
class Task:
    """The base of all tasks."""

    prompt: str | None = None  # what a row asks stands at `{}`; None: the task's own, that of `vora.data.prompts`
    labels: Sequence[str] | None = None  # the classes, where the data does not name all
    max_samples: int | None = None  # the first so many
    seed: int = 0  # of what is drawn
    name: ClassVar[str] = ""
    max_new_tokens: ClassVar[int] = 16
    generates = True  # predictions have `generated`, a free answer; the probe may switch it off
    num_beams: ClassVar[int] = 1  # of that answer's search; 1: each token the likeliest
    chooses: ClassVar[bool] = False  # predictions have `chosen`, the likeliest candidate
    by_image: ClassVar[bool] = True  # examples of one image are drawn together
    default_prompt: ClassVar[str] = "{}"

    def __post_init__(self) -> None:
        self.prompt = self.prompt or self.default_prompt
        if self.prompt.count("{}") != self.default_prompt.count("{}"):
            wanted = "exactly one {}, where the row's text goes" if "{}" in self.default_prompt else "no {}"
            raise ValueError(f"The prompt {self.prompt!r} is to have {wanted}.")

    def prompt_for(self, text: str = "") -> str:
        """The question to one example."""
        return str(self.prompt).replace("{}", text)

    def examples(self, rows: Rows, skipped: SkippedRows) -> list[Example]:
        """All examples of `rows`; rows that are none are added to `skipped`."""
        return list(islice(self.each(rows, skipped), self.max_samples))

    def each(self, rows: Rows, skipped: SkippedRows) -> Iterator[Example]:
        """The examples row by row, however many."""
        for row in rows.read(skipped):
            if lead := [column for column in LEAD_COLUMNS if column in row.values]:
                skipped.add(row.name, f"Its column {lead[0]!r} says what comes before, with which no task asks.")
                continue
            try:
                found = list(self.of_row(row, skipped))
            except ValueError as error:
                skipped.add(row.name, error)
                continue
            yield from found

    def of_row(self, row: Row, skipped: SkippedRows) -> Iterable[Example]:
        """The examples of a row, ValueError if it has none; single questions that are none are added to `skipped`."""
        raise NotImplementedError

    def score(self, examples: Sequence[Example], predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Scores of each example. A score may depend on the other examples, as CIDEr-D does."""
        return [self.score_one(example, prediction) for example, prediction in zip(examples, predictions)]

    def score_one(self, example: Example, prediction: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def metrics(self, examples: Sequence[Example], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """{metric: {"value", "interval"}}; here the mean of each score."""
        groups = [example.group for example in examples]
        names = scores[0] if scores else ()
        return {name: share([one[name] for one in scores], groups, self.seed) for name in names}
