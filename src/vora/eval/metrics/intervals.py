"""Values with 95 % intervals.

Dims: N examples, G groups (the questions about one image are drawn together), K sums that a value is made of.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

NUM_DRAWS, AT_ONCE = 2000, 1 << 22
Z = 1.959964  # 97.5 % of a normal distribution lie below


class Estimate(TypedDict):
    """A value and its 95 % interval [low, high]. None for what is not defined, as of 0 examples, and as the interval
    of one group, of which all draws are the same."""

    value: float | None
    interval: list[float | None]


def numbers(found: Estimate) -> tuple[float, float, float]:
    """(value, low, high), NaN for None, which is neither above nor below anything."""
    value, low, high = (math.nan if one is None else one for one in (found["value"], *found["interval"]))
    return value, low, high


def interval_of(
    value_of: Callable[[np.ndarray], np.ndarray], sums: ArrayLike, groups: Sequence[Hashable], seed: int = 0
) -> Estimate:
    """A value of a corpus, and the middle 95 % of what it is for draws of as many groups, with replacement. `sums` are
    float[N, K], what each example adds, `groups` N names; `value_of` makes float[...] of sums float[..., K]."""
    sums = np.asarray(sums, float)
    if not len(sums):
        return {"value": None, "interval": [None, None]}
    _, number = np.unique([str(group) for group in groups], return_inverse=True)
    by_group = np.zeros((number.max() + 1, sums.shape[1]))
    np.add.at(by_group, number, sums)
    draw, count = np.random.default_rng(seed), len(by_group)
    values: list[np.ndarray] = []
    equal = np.full(count, 1 / count)
    for start in range(0, NUM_DRAWS, max(1, AT_ONCE // count)):
        size = min(max(1, AT_ONCE // count), NUM_DRAWS - start)
        values.append(value_of(draw.multinomial(count, equal, size=size) @ by_group))
    drawn = np.concatenate(values)
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan,) * 2
    low, high = (low, high) if count > 1 else (np.nan, np.nan)
    value = float(value_of(sums.sum(0)))
    return {"value": _finite(value), "interval": [_finite(low), _finite(high)]}


def mean(scores: ArrayLike, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """The mean of any scores."""
    scores = np.asarray(scores, float)
    return interval_of(ratio, np.stack([scores, np.ones(len(scores))], 1), groups, seed)


def share(scores: ArrayLike, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """The mean of scores in 0..1; where no draw differs (all are 0, all are 1, there is one group) with Wilson's
    interval for G groups: so few have not shown that there is nothing else."""
    found = mean(scores, groups, seed)
    low, high = found["interval"]
    if found["value"] is not None and (low is None or high is None or math.isclose(low, high, abs_tol=1e-9)):
        found["interval"] = list(wilson(found["value"], len({str(group) for group in groups})))
    return found


def wilson(value: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share in `count` draws."""
    middle = (value + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(value * (1 - value) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))


def in_words(interval: Sequence[float | None], form: str = ".4f", scale: float = 1) -> str:
    """`0.1000 to 0.2000`, or `-` where there is no interval."""
    low, high = interval
    return "-" if low is None or high is None else f"{scale * low:{form}} to {scale * high:{form}}"


def ratio(sums: np.ndarray) -> np.ndarray:
    """float[..., 2] to the first by the second, NaN of nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
