"""Whether a statement about an image is true, by which of the two words is likelier."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vora.data.answers import statement_of
from vora.data.prompts import DEFAULT_PROMPTS, TRUE_FALSE
from vora.eval.metrics.intervals import share
from vora.eval.rows import Example, Row, SkippedRows
from vora.eval.tasks.task import Task


class Statements(Task):
    """Statements as NLVR's."""

    name: ClassVar[str] = "statements"
    generates = False
    chooses: ClassVar[bool] = True
    by_image: ClassVar[bool] = False  # but those of one sentence
    default_prompt: ClassVar[str] = DEFAULT_PROMPTS.statement[0]

    def of_row(self, row: Row, skipped: SkippedRows) -> Iterator[Example]:
        found = statement_of(row.values)
        answer = TRUE_FALSE[0] if found.truth else TRUE_FALSE[1]
        image = str(row.number) if found.image is None else found.image
        # all that is said with one sentence is drawn together; the orderings of one image are of one kind
        yield Example(
            row.name,
            self.prompt_for(found.sentence),
            [answer],
            row.images,
            found.sentence,
            TRUE_FALSE,
            f"{image} {found.sentence}",
        )

    def score_one(self, example: Example, prediction: Mapping[str, Any]) -> dict[str, Any]:
        return {"accuracy": float(prediction["chosen"] == example.references[0])}

    def metrics(self, examples: Sequence[Example], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        right = [one["accuracy"] for one in scores]
        sentences = [example.group for example in examples]
        return {
            "accuracy": share(right, sentences, self.seed),
            # as NLVR has it: sentences that are judged rightly for every image they come with
            "consistency": self._all_right(right, sentences, sentences),
            # images that are judged rightly in every ordering of their boxes
            "ordering_consistency": self._all_right(right, [example.kind for example in examples], sentences),
        }

    def _all_right(self, right: Sequence[float], together: Sequence[Hashable], groups: Sequence[Hashable]) -> Any:
        worst: dict[Hashable, float] = {}
        for score, name in zip(right, together):
            worst[name] = min(score, worst.get(name, 1.0))
        group_of = dict(zip(together, groups))
        return share(list(worst.values()), [group_of[name] for name in worst], self.seed)
