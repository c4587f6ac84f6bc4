"""WUPS: how near sets of answers are to each other, as DAQUAR is scored (Malinowski and Fritz 2014, section 4)."""

import math
import re

from vora.eval.vqa_scores import normalised
from vora.eval.wordnet import nouns

THRESHOLDS = (0.9, 0.0)
EDGES = re.compile(r"^(?:an?|the)\s+|[.!?]+$")


def items_of(answer):
    """`A book, coffee_mug.` to ["book", "coffee mug"]."""
    items = (EDGES.sub("", " ".join(item.lower().replace("_", " ").split())) for item in answer.split(","))
    return [item for item in items if item]


def word_similarity(first, second, threshold):
    """Wu-Palmer similarity of two words, a tenth of it below the threshold; of words that are no nouns, equality."""
    if normalised(first) == normalised(second):  # never less than what is exact
        return 1.0
    similarity = nouns().similarity(first, second)
    return similarity if similarity >= threshold else 0.1 * similarity


def wups(answer, wanted, threshold):
    """Similarity of two answers in [0, 1], either of which may have several items.

    Each item is held against the nearest of the other set; their product over one set, and over the other, the
    smaller counts.
    """
    told, right = items_of(answer), items_of(wanted)
    if not told or not right:
        return float(told == right)
    return min(_covered(told, right, threshold), _covered(right, told, threshold))


def _covered(items, by, threshold):
    return math.prod(max(word_similarity(item, other, threshold) for other in by) for item in items)
