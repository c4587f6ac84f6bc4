"""Free answers to questions."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vora.data.answers import questions_of
from vora.data.turns import PLACE
from vora.eval.metrics.vqa import exact_accuracy, soft_accuracy
from vora.eval.rows import Example, Row, SkippedRows
from vora.eval.tasks.task import Task


class Vqa(Task):
    """Answers, right if they are people's: exactly, or as VQAv2 counts."""

    name: ClassVar[str] = "vqa"
    max_new_tokens: ClassVar[int] = 20

    def of_row(self, row: Row, skipped: SkippedRows) -> Iterator[Example]:
        for number, question in enumerate(questions_of(row.values)):
            name = f"{row.name}#{number}"
            if isinstance(question, ValueError):  # the others of its image are worth asking
                skipped.add(name, question)
                continue
            text = PLACE.sub("", question.text)  # images come first
            if not text.strip() or not question.answers:
                skipped.add(name, "It has no text or no answer.")
                continue
            answers = [" ".join(answer.split()) for answer in question.answers]
            yield Example(name, self.prompt_for(text), answers, row.images, row.number)

    def score_one(self, example: Example, prediction: Mapping[str, Any]) -> dict[str, Any]:
        answer = prediction["generated"]
        return {
            "exact_accuracy": exact_accuracy(answer, example.references),
            "vqa_accuracy": soft_accuracy(answer, example.references),
        }
