"""All that a probe asks: each image as it is shown, with the questions that are read beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vora.data.schema import Sample
from vora.data.turns import question_and_answer
from vora.eval.probe.conditions import Substitutes
from vora.eval.rows import Example, Images

MOST_REQUESTS = 64  # of an image in one pass

Request = tuple[int, int, str]  # number of the example and of its reference, condition


@dataclass
class ImageCondition:
    """One image as it is shown, and all that is asked about it."""

    name: str
    images: Images
    requests: list[Request]

    def parts(self) -> list["ImageCondition"]:
        """The same in parts of at most `MOST_REQUESTS`."""
        starts = range(0, len(self.requests), MOST_REQUESTS)
        return [replace(self, requests=self.requests[start : start + MOST_REQUESTS]) for start in starts]


def record_of(shown: ImageCondition, examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> Sample:
    """An image under a condition as a record; `answers` are the references of each example."""
    conversations = [
        question_and_answer(examples[example].prompt, answers[example][reference])
        for example, reference, _ in shown.requests
    ]
    row = examples[shown.requests[0][0]].name
    return Sample(f"{row} and what else is asked of its image", shown.images(), conversations)


def image_conditions(
    conditions: Sequence[str], answers: Sequence[Sequence[str]], substitutes: Substitutes
) -> list[ImageCondition]:
    """All that is to be read. An image stands once for what is asked of it rightly and, as another one, wrongly."""
    own = [
        [(example, reference) for example in group.examples for reference in range(len(answers[example]))]
        for group in substitutes.groups
    ]
    shown_for = {other: number for number, other in enumerate(substitutes.others)}
    found, without = [], []
    for number, group in enumerate(substitutes.groups):
        for condition in conditions:
            requests = [(*pair, condition) for pair in own[number]]
            if condition == "none":
                without += requests
            elif condition != "other":  # which stands beside what is right for that image
                if condition == "right":
                    requests += [(*pair, "other") for pair in own[shown_for[number]]]
                opens = substitutes.images(condition, number)
                found += ImageCondition(f"{group.key}, {condition}", opens, requests).parts()
    return found + ImageCondition("no image", list, without).parts()


def examples_under(conditions: Sequence[str], examples: Sequence[Example], substitutes: Substitutes) -> list[Example]:
    """Examples under each condition in turn: E of the first, E of the next."""
    group_of = {example: number for number, group in enumerate(substitutes.groups) for example in group.examples}
    found = []
    for condition in conditions:
        opens = [substitutes.images(condition, number) for number in range(len(substitutes.groups))]
        found += [
            replace(example, name=f"{example.name}, {condition}", images=opens[group_of[number]])
            for number, example in enumerate(examples)
        ]
    return found
