"""How a cost grows: exponents of power laws, and its split into what is fixed, linear and quadratic."""

from itertools import combinations

import numpy as np


def exponent(sizes, values):
    """Slope of log value against log size; None where there are not two of them above zero."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def split(sizes, values):
    """Coefficients (c, a, b), none below zero, for which c + a size + b size^2 misses the values by the least in
    proportion.

    Raises:
        ValueError: there are fewer than three sizes, or a value is not above zero.
    """
    if len(sizes) < 3 or min(values) <= 0:
        raise ValueError(f"{len(sizes)} sizes, the smallest value {min(values)}: a split needs three above 0.")
    powers = np.stack([np.array(sizes, float) ** power for power in range(3)], 1) / np.array(values, float)[:, None]
    best = None
    for kept in (list(some) for count in (1, 2, 3) for some in combinations(range(3), count)):
        scale = powers[:, kept].max(0)  # else squares of thousands would hide the constant
        found = np.linalg.lstsq(powers[:, kept] / scale, np.ones(len(sizes)), rcond=None)[0] / scale
        missed = float(((powers[:, kept] @ found - 1) ** 2).sum())
        if (found >= 0).all() and (best is None or missed < best[0]):
            best = (missed, dict(zip(kept, found.tolist())))
    return tuple(best[1].get(power, 0.0) for power in range(3))


def quadratic_share(coefficients, size):
    """What part of the cost at a size is the quadratic one."""
    fixed, linear, quadratic = coefficients
    whole = fixed + linear * size + quadratic * size**2
    return quadratic * size**2 / whole
