"""The curves of a grid as one image."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from vora.ablate.curves import Curve
from vora.report.plots import new_figure, save_figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C510A")  # Okabe and Ito's
NUM_POINTS = 300  # of a line


def draw_curves(
    curves: Mapping[tuple[str, int], Curve], variants: Sequence[str], baseline: str, image: Path, title: str = ""
) -> None:
    """Write a PNG of the loss against samples seen: a line per variant, the mean of its seeds, in a band from lowest
    to highest; the baseline in black, variants without a curve left out."""
    figure, axes = new_figure(8, 4.5)
    drawn, ends, colours = [], {}, cycle(COLOURS)
    for variant in variants:
        own = [curve for (name, _), curve in curves.items() if name == variant]
        color, style, mark = ("black", "--", " (baseline)") if variant == baseline else (next(colours), "-", "")
        if own:
            first, last = max(c.samples[0] for c in own), min(c.samples[-1] for c in own)
            samples = np.linspace(first, max(first, last), NUM_POINTS)  # where all seeds have been
            values = np.stack([np.interp(samples, c.samples, c.smooth) for c in own])
            mean = values.mean(0)
            label, point = f"{variant} {mean[-1]:.3f}{mark}", "o" if last <= first else None  # of one line of a log
            (line,) = axes.plot(samples, mean, style, color=color, lw=1.8, label=label, marker=point)
            line.set_clip_on(not point)
            axes.fill_between(samples, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
            drawn.append((samples, values))
            ends[line] = mean[-1]
    if drawn:
        axes.set(**limits(drawn))
        order: list[Any] = sorted(ends, key=lambda line: -ends[line])
        if len({seed for _, seed in curves}) > 1:
            order.append(Patch(facecolor="lightgray", edgecolor="gray", label="lowest to highest seed"))
        legend = axes.legend(handles=order, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        for text, handle in zip(legend.get_texts(), order):
            text.set_color("gray" if isinstance(handle, Patch) else handle.get_color())
    loss = next((curve.loss for curve in curves.values()), "lm_loss")
    axes.set(xlabel="samples seen", ylabel=loss, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    save_figure(figure, image, dpi=130)


def limits(drawn: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """Of the axes: a run begins far above where it ends, so they show what differs after each line's first third."""
    later = np.concatenate([values[:, NUM_POINTS // 3 :].ravel() for _, values in drawn])
    room = 0.05 * np.ptp(later) or 0.1
    first, last = min(samples[0] for samples, _ in drawn), max(samples[-1] for samples, _ in drawn)
    return {"xlim": (min(first, 0.95 * last), last), "ylim": (later.min() - room, later.max() + room)}
