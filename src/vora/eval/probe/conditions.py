"""What an image is replaced by, to see whether a model looks at it.

right     the image itself
other     that of another example of the set: each is used once, so all that is seen is seen as often
blank     its mean colour, at its size: as bright, for a model may do badly with white or black alone
shuffled  its own image tokens in another order: the same pixels, and nothing where it was
none      no image at all
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vora.eval.rows import Example, Images, SkippedRows
from vora.model.image_processing_vora import VoraImageProcessor
from vora.report.images import blank, shuffled

CONDITIONS = ("right", "other", "blank", "shuffled", "none")
SAME_IMAGE = 1_000_000  # as bad as so many shared facts
MOST_PASSES = 10  # over the images whose stand-in shares a fact with them


@dataclass
class ImageGroup:
    """An image (or several that belong together) and all that is asked about it."""

    key: str  # of its pixels
    images: Images
    examples: list[int] = field(default_factory=list)  # their numbers
    facts: set[tuple[str, str]] = field(default_factory=set)  # (prompt, answer) of all of them


def image_groups_of(examples: Sequence[Example], skipped: SkippedRows) -> tuple[list[Example], list[ImageGroup]]:
    """Examples by image, rows that hold the same pixels as one group: (the examples whose images can be read, their
    groups); the others are added to `skipped`."""
    groups: dict[str, ImageGroup] = {}
    kept: list[Example] = []
    key_of: dict[Images, str | None] = {}
    for example in examples:
        if example.images not in key_of:
            key_of[example.images] = None
            try:
                pixels = b"".join(repr(image.size).encode() + image.tobytes() for image in example.images())
                key_of[example.images] = hashlib.sha256(pixels).hexdigest()[:16]
            except ValueError as error:
                skipped.add(example.name, error)
        if key := key_of[example.images]:
            group = groups.setdefault(key, ImageGroup(key, example.images))
            group.examples.append(len(kept))
            group.facts |= {(example.prompt, str(reference).strip().lower()) for reference in example.references}
            kept.append(example)
    return kept, list(groups.values())


def other_groups(groups: Sequence[ImageGroup], seed: int = 0) -> list[int]:
    """For each group the number of another: a permutation in which none stays, drawn anew until as few as possible
    share a fact (a caption, a label, the answer to a question) with what stands in for them. ValueError of one image.
    """
    count = len(groups)
    if count < 2:
        raise ValueError(f"A probe needs at least 2 different images, and the data holds {count}: give more of it.")
    draw = np.random.default_rng(seed)
    order = draw.permutation(count)
    others = np.empty(count, int)
    others[order] = np.roll(order, 1)  # one circle: no image is its own neighbour

    def cost(number: int, other: int) -> int:
        return SAME_IMAGE if number == other else len(groups[number].facts & groups[other].facts)

    costs = np.array([cost(number, other) for number, other in enumerate(others)])
    for _ in range(MOST_PASSES):
        before, costly = costs.sum(), np.flatnonzero(costs)  # pairs change places wherever that costs less
        for number in costly:
            for partner in draw.permutation(count)[: max(256, 200_000 // len(costly))]:
                if not costs[number]:
                    break
                new = cost(int(number), others[partner]), cost(int(partner), others[number])
                if sum(new) < costs[number] + costs[partner]:
                    others[[number, partner]] = others[[partner, number]]
                    costs[[number, partner]] = new
        if costs.sum() == before:
            break
    return [int(other) for other in others]


def num_alike(groups: Sequence[ImageGroup], others: Sequence[int]) -> int:
    """Answers that are right for the other image too, as far as the data says so."""
    return sum(len(group.facts & groups[other].facts) for group, other in zip(groups, others))


@dataclass
class Substitutes:
    """Images, and what each is replaced by."""

    groups: Sequence[ImageGroup]
    others: Sequence[int]  # of `other_groups`
    image_processor: VoraImageProcessor  # of the model, whose grid it knows
    seed: int = 0

    def images(self, condition: str, number: int) -> Images:
        """What opens the images that are shown for a group."""
        group, other = self.groups[number], self.groups[self.others[number]]
        if condition == "blank":
            return lambda: [blank(image) for image in group.images()]
        if condition == "shuffled":
            seed = int(group.key, 16) ^ self.seed
            return lambda: [shuffled(image, self.image_processor, seed) for image in group.images()]
        return {"right": group.images, "other": other.images, "none": list}[condition]
