"""The figure of a probe: what each condition costs, and how the gains are spread."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vora.eval.metrics.intervals import Estimate, in_words, interval_of
from vora.eval.probe.scores import ProbeScores, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"right": "#157347", "other": "#b02a37", "blank": "#8a94a0", "shuffled": "#c77d0a", "none": "#3d5a80"}
TITLES = {
    "right": "right\nimage", "other": "another\nimage", "blank": "blank", "shuffled": "patches\nshuffled",
    "none": "no\nimage",
}  # fmt: skip
LINEAR = 0.3  # nats; the axis of gains is about linear up to here


def draw_probe(file: Path, metrics: dict[str, Estimate], scores: ProbeScores, verdict: str, title: str) -> None:
    """Write a PNG of a probe's metrics, and of the scores that they are of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(scores.log_probs)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: dict[str, Axes] = figure.subplot_mosaic([["bars", name] for name in shown[1:]], width_ratios=[1, 1.15])
    name = next(iter(scores.task_scores), None)
    if name is None:
        values = [_surprise(scores, condition) for condition in shown]
        _bars(axes["bars"], shown, values, "nats per token of the references (lower is better)")
    else:
        values = [metrics[f"{name}_with_{condition}"] for condition in shown]
        _bars(axes["bars"], shown, values, f"{name.replace('_', ' ')} (higher is better)")
    axes["bars"].set_title("with 95 % intervals", fontsize=10)
    _spreads([axes[name] for name in shown[1:]], scores, metrics)
    lines = textwrap.wrap(verdict, 150)
    figure.suptitle("\n".join([f"Does it look? {title}", *lines]), fontsize=10, ha="left", x=0.01)
    figure.savefig(file, dpi=110)


def _surprise(scores: ProbeScores, condition: str) -> Estimate:
    sums = np.stack([-scores.log_probs[condition], scores.num_tokens], 1)
    return interval_of(ratio, sums, [scores.groups[example] for example in scores.examples])


def _bars(axes: "Axes", shown: Sequence[str], values: Sequence[Estimate], label: str) -> None:
    heights = [one["value"] or 0.0 for one in values]
    ends = [[height if end is None else end for end in one["interval"]] for height, one in zip(heights, values)]
    errors = [[max(0.0, height - low) for height, (low, _) in zip(heights, ends)],
              [max(0.0, high - height) for height, (_, high) in zip(heights, ends)]]  # fmt: skip
    places = range(len(shown))
    axes.bar(places, heights, color=[COLOURS[condition] for condition in shown], width=0.7)
    axes.errorbar(places, heights, errors, fmt="none", ecolor="#1c2733", capsize=4, linewidth=1.2)
    for place, height, (_, high) in zip(places, heights, ends):
        axes.annotate(f"{height:.3g}", (place, high), (0, 3), textcoords="offset points", ha="center")
    axes.set_xticks(list(places), [TITLES[condition] for condition in shown])
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _spreads(all_axes: Sequence["Axes"], scores: ProbeScores, metrics: dict[str, Estimate]) -> None:
    """One histogram below the other, on an axis that is linear around 0 and logarithmic further out."""
    right = scores.log_probs["right"]
    gains = {name: right - values for name, values in scores.log_probs.items() if name != "right"}
    low, high = np.quantile(np.concatenate(list(gains.values())), [0.005, 0.995])
    low, high = min(low, -LINEAR), max(high, LINEAR)
    edges = LINEAR * np.sinh(np.linspace(np.arcsinh(low / LINEAR), np.arcsinh(high / LINEAR), 51))
    steps = [-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100]
    for axes, (name, values) in zip(all_axes, gains.items()):
        share = metrics[f"right_beats_{name}"]
        weights = np.full(len(values), 100 / len(values))
        axes.hist(values.clip(low, high), edges.tolist(), weights=weights, color=COLOURS[name])
        axes.axvline(0, color="#1c2733", linewidth=1)
        axes.set_xscale("asinh", linear_width=LINEAR)
        axes.set_xlim(low, high)
        shown = [step for step in steps if low <= step <= high]
        axes.set_xticks(shown, [f"{step:g}" for step in shown] if axes is all_axes[-1] else [""] * len(shown))
        axes.minorticks_off()
        axes.set_ylabel("% of cases", fontsize=8)
        against = TITLES[name].replace("\n", " ")
        interval = in_words(share["interval"], ".1f", 100)
        axes.set_title(
            f"against {against}: the right one is better in {100 * (share['value'] or 0.0):.1f} % ({interval})",
            fontsize=9, loc="left",
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel("what the right image adds to the log-likelihood of an answer, nats", fontsize=9)
