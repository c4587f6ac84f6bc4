"""The curves of a grid as one image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vora.ablate.curves import Curve
from vora.report.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C510A")  # Okabe and Ito's
NUM_POINTS, LEAST_GAP = 300, 0.05  # of a line; of labels, as a share of the height


class Line(NamedTuple):
    """A variant's line: at `samples`, float[NUM_POINTS], the `values` of its seeds, float[seeds, NUM_POINTS]."""

    variant: str
    color: Any
    samples: np.ndarray
    values: np.ndarray

    @property
    def end(self) -> float:
        return float(self.values.mean(0)[-1])


def draw_curves(
    curves: Mapping[tuple[str, int], Curve], variants: Sequence[str], baseline: str, image: Path, title: str = ""
) -> None:
    """lm_loss against samples seen: a line per variant, the mean of its seeds, in a band from lowest to highest.

    Args:
        curves: {(variant, seed): curve}; variants without any are left out.
        variants: in the order of the legend; the baseline is black.
        image: PNG file to write.
    """
    figure, axes = new_figure(8, 4.5)
    drawn: list[Line] = []
    colours = iter(_colours(len(variants)))
    for variant in variants:
        own = [curve for (name, _), curve in curves.items() if name == variant]
        colour = "black" if variant == baseline else next(colours)
        if not own:
            continue
        samples, values = common(own)
        axes.plot(samples, values.mean(0), color=colour, lw=1.8, ls="--" if variant == baseline else "-")
        if len(own) > 1:
            axes.fill_between(samples, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        drawn.append(Line(variant, colour, samples, values))
    if drawn:
        _frame(axes, drawn)
        _label(axes, drawn, baseline)
    axes.set(xlabel="samples seen", ylabel="lm_loss", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    save_figure(figure, image, dpi=130)


def common(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of several seeds at the same numbers of samples.

    Returns:
        (float[NUM_POINTS], float[curves, NUM_POINTS]): where all of them have been.
    """
    first, last = max(c.samples[0] for c in curves), min(c.samples[-1] for c in curves)
    samples = np.linspace(first, max(first, last), NUM_POINTS)
    return samples, np.stack([np.interp(samples, c.samples, c.smooth) for c in curves])


def _colours(count: int) -> Sequence[Any]:
    if count <= len(COLOURS) + 1:
        return COLOURS
    import matplotlib

    return [matplotlib.colormaps["viridis"](share) for share in np.linspace(0, 0.88, count)]


def _frame(axes: "Axes", drawn: Sequence[Line]) -> None:
    """A run begins far above where it ends: the room is given to what differs after the first third of each line."""
    last = max(line.samples[-1] for line in drawn)
    later = np.concatenate([line.values[:, len(line.samples) // 3 :].ravel() for line in drawn])
    low, high = later.min(), later.max()
    room = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(0, last)


def _label(axes: "Axes", drawn: Sequence[Line], baseline: str) -> None:
    """Each variant's name at the right end of its line, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    order = sorted(drawn, key=lambda line: line.end)
    places = [(line.end - low) / (high - low) for line in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LEAST_GAP)
    above = places[-1] - 1
    if above > 0:  # the highest would leave the image: press them down from the top
        places[-1] = 1.0
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - LEAST_GAP)
    for line, place in zip(order, places):
        text = f"{line.variant} {line.end:.3f}" + (" (baseline)" if line.variant == baseline else "")
        axes.annotate(
            text, (line.samples[-1], line.end), (1.04, place), textcoords="axes fraction", color=line.color,
            fontsize=9, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.color, "lw": 0.6, "relpos": (0, 0.5), "shrinkB": 0},
        )  # fmt: skip
