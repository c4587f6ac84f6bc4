"""A probe's figures in words, by a rule that looks at one of them, the share of references that the right image makes
likelier than another one of the set does (chance: one half), and at its 95 % interval:

* "It looks" where all of the interval lies above one half; "but little" where the share itself is below 60 %.
* "It does not look" where all of it lies below 60 %, and one half or less is possible.
* "Too few examples to tell" otherwise, and of fewer than 10 images (those drawn together count once) always.

Blank, shuffled and missing images decide nothing: a model may do badly with one only because it never saw the like.
"""

import math
from collections.abc import Sequence

from vora.eval.metrics.intervals import Estimate, in_words, numbers

CHANCE, LITTLE, FEWEST_GROUPS = 0.5, 0.6, 10


def verdict_of(
    metrics: dict[str, Estimate], scores: Sequence[str], num_groups: int, num_references: int
) -> tuple[bool | None, str]:
    """What a probe's metrics say: (True, False or None, the verdict). `scores` are names of the task's scores in the
    metrics; of images, those that are drawn together count as one group."""
    beats, gain = metrics["right_beats_other"], metrics["gain_over_other"]
    value, low, high = numbers(beats)
    found = (
        f"the right image makes the right answer likelier than another image of the set does in "
        f"{100 * value:.1f} % of {num_references:,} cases (95 % interval {in_words(beats['interval'], '.1f', 100)} %, "
        f"chance 50 %), by {numbers(gain)[0]:.3g} nats on average ({in_words(gain['interval'], '.3g')}), which is "
        f"{math.exp(min(700, numbers(gain)[0])):.3g} times as likely."
    )
    if num_groups < FEWEST_GROUPS or not (low > CHANCE or high < LITTLE):
        # an interval as narrow as from CHANCE to LITTLE tells; its width falls with the root of the images
        times = ((high - low) / (LITTLE - CHANCE)) ** 2
        needed = math.ceil(num_groups * times / 50) * 50 if math.isfinite(times) else 0
        wanted = f"some {max(200, needed):,} would tell"
        return None, f"Too few examples to tell ({num_groups:,} independent images: {wanted}): {found}"
    if low <= CHANCE:
        return False, f"It does not look: {found}"
    words = [("It looks, but little: " if value < LITTLE else "It looks: ") + found]
    for name in scores:
        right, other = (numbers(metrics[f"{name}_with_{which}"])[0] for which in ("right", "other"))
        _, low, high = numbers(metrics[f"{name}_drop_other"])
        verb = "falls" if low > 0 else "rises" if high < 0 else "is not shown to change,"
        title, drop = name.replace("_", " ").capitalize(), f"(drop {low:.3f} to {high:.3f})"
        words.append(f"{title} {verb} from {right:.3f} to {other:.3f} with another image {drop}.")
    if "gain_over_shuffled" in metrics:
        _, low, high = numbers(metrics["gain_over_shuffled"])
        verb = "matters" if low > 0 else "helps not" if high < 0 else "is not shown to matter"
        gain_in_words = f"gain over shuffled patches {low:.3g} to {high:.3g} nats"
        words.append(f"Where things are in it {verb} ({gain_in_words}).")
    return True, " ".join(words)
