"""Logs of runs to curves of loss against samples seen, and what is read off them.

Dims: L log lines with that loss.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vora.train.run_log import read_log


@dataclass
class Curve:
    """What one run's log says, of the whole run where nothing else is said."""

    loss: str  # lm_loss; distill_loss of a run whose steps only distill
    samples: np.ndarray  # float[L], seen at each line
    smooth: np.ndarray  # float[L], losses as means over the window that ends at each line; see `smoothed`
    distill_only: int  # samples seen before there was a language loss
    samples_seen: int
    tokens: int
    seconds: float  # of steps, not of starting
    distill_loss: float | None  # mean over the last window; None without a teacher

    @property
    def final(self) -> float:
        """The loss over the last window."""
        return float(self.smooth[-1])


def read_curve(log_file: Path, window: float) -> Curve:
    """A run's curve; means are over `window`, a share of all its samples. ValueError without a loss."""
    lines = read_log(log_file)
    each = {
        name: np.array([(line["samples_seen"], line[name]) for line in lines if name in line], float).T
        for name in ("lm_loss", "distill_loss")
    }
    loss = next((name for name, points in each.items() if points.size), None)
    if loss is None:
        raise ValueError(f"{log_file} has no line with a loss: raise training.max_steps, or log more often.")
    before, seconds, tokens, distill_only = 0, 0.0, 0.0, 0
    for line in lines:  # speeds are of the steps since the line before, so that they give back time and tokens
        took = (line["samples_seen"] - before) / line["samples_per_second"] if line["samples_per_second"] else 0.0
        seconds, tokens, before = seconds + took, tokens + took * line["tokens_per_second"], line["samples_seen"]
        distill_only = distill_only if "lm_loss" in line else before
    width, (samples, losses), distilled = window * before, each[loss], each["distill_loss"]
    distill_loss = float(smoothed(distilled[0], distilled[1], width)[-1]) if distilled.size else None
    smooth = smoothed(samples, losses, width, distill_only if loss == "lm_loss" else 0)
    return Curve(loss, samples, smooth, distill_only, before, round(tokens), seconds, distill_loss)


def smoothed(samples: np.ndarray, losses: np.ndarray, width: float, start: int = 0) -> np.ndarray:
    """float[L]: at each line the mean over the last `width` samples, each line weighted by its own; `start` were seen
    before those of the first line."""
    sizes = np.diff(samples, prepend=start)
    sizes = np.where(sizes > 0, sizes, 1)
    windows = [(samples > last - width) & (samples <= last) for last in samples]
    return np.array([np.average(losses[inside], weights=sizes[inside]) for inside in windows])


def samples_until(curve: Curve, loss: float) -> float | None:
    """Samples seen when the smoothed loss is first at `loss` or below, between lines on a straight line;
    None if it never is."""
    below = np.flatnonzero(curve.smooth <= loss)
    if not len(below):
        return None
    ends = slice(max(below[0] - 1, 0), below[0] + 1)
    return float(np.interp(-loss, -curve.smooth[ends], curve.samples[ends]))
