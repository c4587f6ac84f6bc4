"""What a model makes of references under each condition, and the metrics of that.

Dims: E examples, R references (each caption of an image is one; of other tasks each example has one).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vora.eval.metrics.intervals import Estimate, interval_of, mean, ratio, share
from vora.eval.probe.conditions import ImageGroup
from vora.eval.rows import Example

TIE = 1e-4  # nats; what a batch's padding may change


@dataclass
class ProbeScores:
    """What a model makes of references under each condition."""

    examples: np.ndarray  # int[R], the example that a reference belongs to
    log_probs: dict[str, np.ndarray]  # {condition: float[R]}
    num_tokens: np.ndarray  # int[R]
    task_scores: dict[str, dict[str, np.ndarray]]  # {name of a score: {condition: float[E]}}
    groups: list[int] = field(default_factory=list)  # of each example; those of one group are drawn together


def probe_metrics(scores: ProbeScores, seed: int = 0) -> dict[str, Estimate]:
    """The metrics of a probe; intervals are of draws of whole groups.

    `log_likelihood_with_C` nats per reference under condition C; `gain_over_C` how many more the right image brings,
    and `gain_over_C_per_token`; `right_beats_C` the share of references that it makes likelier, ties counting half;
    and of each of the task's scores its value `with_C` and its paired `drop` from the right image to C.
    """
    shown, of_references = list(scores.log_probs), [scores.groups[example] for example in scores.examples]
    found: dict[str, Estimate] = {}
    for condition in shown:
        found[f"log_likelihood_with_{condition}"] = mean(scores.log_probs[condition], of_references, seed)
    for condition in shown[1:]:
        gains = scores.log_probs["right"] - scores.log_probs[condition]
        sums = np.stack([gains, scores.num_tokens], 1)
        found[f"gain_over_{condition}"] = mean(gains, of_references, seed)
        found[f"gain_over_{condition}_per_token"] = interval_of(ratio, sums, of_references, seed)
        wins = np.where(np.abs(gains) < TIE, 0.5, gains > 0)
        value_of = mean if (wins == 0.5).all() else share  # a model that ignores images ties every time: no coins
        found[f"right_beats_{condition}"] = value_of(wins, of_references, seed)
    for name, values in scores.task_scores.items():
        for condition in shown:
            is_share = np.isin(values[condition], (0.0, 1.0)).all()
            found[f"{name}_with_{condition}"] = (share if is_share else mean)(values[condition], scores.groups, seed)
        for condition in shown[1:]:
            found[f"{name}_drop_{condition}"] = mean(values["right"] - values[condition], scores.groups, seed)
    return found


def drawn_together(examples: Sequence[Example], groups: Sequence[ImageGroup]) -> list[int]:
    """A number for each example; those of one image have the same, and those of one group of their task."""
    above = list(range(len(groups)))  # of each image one that it is drawn with, at the top itself

    def top(image: int) -> int:
        while above[image] != image:
            image = above[image]
        return image

    image_of = {example: number for number, group in enumerate(groups) for example in group.examples}
    first: dict[str, int] = {}
    for example, image in image_of.items():
        above[top(image)] = top(first.setdefault(str(examples[example].group), image))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(top(image_of[example]), len(numbers)) for example in range(len(examples))]
