"""What an image is replaced by, to see whether a model looks at it.

right     the image itself
other     that of another example of the set: each is used once, so all that is seen is seen as often
blank     its mean colour, at its size: as many image tokens, as bright an image, and nothing on it. White or black
          would be an image unlike all others, and a model may do badly for that alone.
shuffled  its own image tokens in another order: the same pixels, and nothing where it was
none      no image at all
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vora.model.image_processing_vora import on_black_square

CONDITIONS = ("right", "other", "blank", "shuffled", "none")
SAME_IMAGE = 1_000_000  # as bad as so many shared facts
MOST_PASSES = 10  # over the images whose stand-in shares a fact with them


@dataclass
class ImageGroup:
    """An image (or several that belong together) and all that is asked about it.

    Args:
        key: of its pixels.
        images: opens it.
        examples: numbers of the examples about it.
        facts: (prompt, answer) of all of them.
    """

    key: str
    images: object
    examples: list = field(default_factory=list)
    facts: set = field(default_factory=set)


def image_groups_of(examples, bad):
    """Examples by image; rows that hold the same pixels are one scene.

    Returns:
        (the examples whose images can be read, list of `ImageGroup`s); the others are added to `bad`.
    """
    scenes, kept, key_of = {}, [], {}
    for example in examples:
        if example.images not in key_of:
            try:
                key_of[example.images] = _key_of(example.images())
            except ValueError as error:
                key_of[example.images] = None
                bad.add(example.name, error)
        key = key_of[example.images]
        if key is None:
            continue
        scene = scenes.setdefault(key, ImageGroup(key, example.images))
        scene.examples.append(len(kept))
        scene.facts |= {(example.prompt, str(reference).strip().lower()) for reference in example.references}
        kept.append(example)
    return kept, list(scenes.values())


def _key_of(images):
    found = hashlib.sha256()
    for image in images:
        found.update(repr(image.size).encode() + image.tobytes())
    return found.hexdigest()[:16]


def other_groups(scenes, seed=0):
    """For each scene the number of another: a permutation in which none stays, drawn anew until as few as possible
    share a fact (a caption, a label, the answer to a question) with what stands in for them.

    Raises:
        ValueError: there is but one image.
    """
    count = len(scenes)
    if count < 2:
        raise ValueError(f"A probe needs at least 2 different images, and the data holds {count}: give more of it.")
    draw = np.random.default_rng(seed)
    order = draw.permutation(count)
    others = np.empty(count, int)
    others[order] = np.roll(order, 1)  # one circle: nobody is his own neighbour

    def cost(number, other):
        return SAME_IMAGE if number == other else len(scenes[number].facts & scenes[other].facts)

    # pairs change places wherever that costs less
    costs = np.array([cost(number, other) for number, other in enumerate(others)])
    for _ in range(MOST_PASSES):
        before, dear = costs.sum(), np.flatnonzero(costs)
        for number in dear:
            for partner in draw.permutation(count)[: max(256, 200_000 // len(dear))]:
                if not costs[number]:
                    break
                new = cost(number, others[partner]), cost(partner, others[number])
                if sum(new) < costs[number] + costs[partner]:
                    others[[number, partner]] = others[[partner, number]]
                    costs[[number, partner]] = new
        if costs.sum() == before:
            break
    return [int(other) for other in others]


def num_alike(scenes, others):
    """Answers that are right for the other image too, as far as the data says so."""
    return sum(len(scene.facts & scenes[other].facts) for scene, other in zip(scenes, others))


def images_under(condition, scene, other, image_processor, seed=0):
    """What opens the images that are shown.

    Args:
        scene, other: `ImageGroup`s.
        image_processor: of the model, for its grid.
    """
    if condition == "blank":
        return lambda: [blank(image) for image in scene.images()]
    if condition == "shuffled":
        number = int(scene.key, 16) ^ seed
        return lambda: [shuffled(image, image_processor, number) for image in scene.images()]
    return {"right": scene.images, "other": other.images, "none": list}[condition]


def blank(image):
    """An image's mean colour, at its size."""
    colour = np.asarray(image).reshape(-1, 3).mean(0).round().astype(int)
    return Image.new("RGB", image.size, tuple(colour.tolist()))


def shuffled(image, image_processor, seed):
    """An image at the size at which the model reads it, its image tokens (squares of the grid) in another order."""
    budget = image_processor.min_image_tokens, image_processor.max_image_tokens
    rows, columns = image_processor.patch_grid(image.height, image.width, *budget)
    if image_processor.pad_to_square:
        image = on_black_square(image)
    side, merge = image_processor.patch_size, image_processor.patch_merge
    size = columns * side, rows * side
    if image.size != size:
        image = image.resize(size, image_processor.resample)
    rows, columns, side = rows // merge, columns // merge, side * merge
    squares = np.asarray(image).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    draw, order = np.random.default_rng(seed), np.arange(len(squares))
    while len(squares) > 1 and (order == np.arange(len(squares))).all():
        order = draw.permutation(len(squares))
    grid = squares[order].reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return Image.fromarray(grid.reshape(rows * side, columns * side, 3))
