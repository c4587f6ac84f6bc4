"""The figure of a probe: what each condition costs, and how the gains are spread."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vora.eval.metrics.intervals import Estimate, in_words, interval_of, ratio
from vora.eval.probe.scores import ProbeScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = {  # its name below a bar, and its colour
    "right": ("right\nimage", "#157347"),
    "other": ("another\nimage", "#b02a37"),
    "blank": ("blank", "#8a94a0"),
    "shuffled": ("patches\nshuffled", "#c77d0a"),
    "none": ("no\nimage", "#3d5a80"),
}
LINEAR = 0.3  # nats; the axis of gains is about linear up to here
AXIS = (
    "what the right image adds to the log-likelihood of an answer, in nats\n"
    "0: nothing, 1: 2.7 times as likely, 3: 20 times, -1: 0.37 times\n"
    "(the scale is linear up to 0.3 and logarithmic beyond)"
)


def draw_probe(file: Path, metrics: dict[str, Estimate], scores: ProbeScores, verdict: str, title: str) -> None:
    """Write a PNG of a probe's metrics, and of the scores that they are of."""
    from matplotlib.figure import Figure

    shown = list(scores.log_probs)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes: dict[str, Axes] = figure.subplot_mosaic([["bars", name] for name in shown[1:]], width_ratios=[1, 1.15])
    name = next(iter(scores.task_scores), None)
    if name is None:
        drawn = [scores.groups[example] for example in scores.examples]
        sums = [np.stack([-scores.log_probs[condition], scores.num_tokens], 1) for condition in shown]
        values = [interval_of(ratio, one, drawn) for one in sums]
        _bars(axes["bars"], shown, values, "nats per token of the references (lower is better)")
    else:
        values = [metrics[f"{name}_with_{condition}"] for condition in shown]
        _bars(axes["bars"], shown, values, f"{name.replace('_', ' ')} (higher is better)")
    axes["bars"].set_title("with 95 % intervals", fontsize=10)
    _spreads([axes[name] for name in shown[1:]], scores, metrics)
    lines = textwrap.wrap(verdict, 150)
    figure.suptitle("\n".join([f"Does it look? {title}", *lines]), fontsize=10, ha="left", x=0.01)
    figure.savefig(file, dpi=110)


def _bars(axes: "Axes", shown: Sequence[str], values: Sequence[Estimate], label: str) -> None:
    heights = np.array([one["value"] or 0.0 for one in values])
    ends = [[height if end is None else end for end in one["interval"]] for height, one in zip(heights, values)]
    lows, highs = np.array(ends, float).T
    titles, colours = zip(*(SHOWN[condition] for condition in shown))
    places = range(len(shown))
    axes.bar(places, heights, color=colours, width=0.7)
    errors = np.clip([heights - lows, highs - heights], 0, None)
    axes.errorbar(places, heights, errors, fmt="none", ecolor="#1c2733", capsize=4, linewidth=1.2)
    for place in places:
        axes.annotate(f"{heights[place]:.3g}", (place, highs[place]), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(list(places), titles)
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _spreads(all_axes: Sequence["Axes"], scores: ProbeScores, metrics: dict[str, Estimate]) -> None:
    """One histogram below the other, on an axis that is linear around 0 and logarithmic further out."""
    gains = {name: scores.log_probs["right"] - scores.log_probs[name] for name in list(scores.log_probs)[1:]}
    low, high = np.quantile(np.concatenate(list(gains.values())), [0.005, 0.995])
    low, high = min(low, -LINEAR), max(high, LINEAR)
    edges = LINEAR * np.sinh(np.linspace(np.arcsinh(low / LINEAR), np.arcsinh(high / LINEAR), 51))
    steps = [-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100]
    for axes, (name, values) in zip(all_axes, gains.items()):
        share, (title, colour) = metrics[f"right_beats_{name}"], SHOWN[name]
        weights = np.full(len(values), 100 / len(values))
        axes.hist(values.clip(low, high), edges.tolist(), weights=weights, color=colour)
        axes.axvline(0, color="#1c2733", linewidth=1)
        axes.set_xscale("asinh", linear_width=LINEAR)
        axes.set_xlim(low, high)
        shown = [step for step in steps if low <= step <= high]
        axes.set_xticks(shown, [f"{step:g}" for step in shown] if axes is all_axes[-1] else [""] * len(shown))
        axes.minorticks_off()
        axes.set_ylabel("% of cases", fontsize=8)
        found = f"{100 * (share['value'] or 0.0):.1f} % ({in_words(share['interval'], '.1f', 100)})"
        against = title.replace("\n", " ")
        axes.set_title(f"against {against}: the right one is better in {found}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel(AXIS, fontsize=9)
