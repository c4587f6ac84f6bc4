"""The picture of a probe: what each condition costs, and how the gains are spread."""

import textwrap

import numpy as np

from vora.eval.conditions import CONDITIONS

COLOURS = {"right": "#157347", "other": "#b02a37", "blank": "#8a94a0", "shuffled": "#c77d0a", "none": "#3d5a80"}
TITLES = {
    "right": "right\npicture", "other": "another\npicture", "blank": "blank", "shuffled": "patches\nshuffled",
    "none": "no\npicture",
}  # fmt: skip


def draw_probe(file, metrics, readings, verdict, title):
    """Write a PNG.

    Args:
        metrics: of `probe_metrics`.
        readings: the `Readings` that they are of.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    bars, spread = figure.subplots(1, 2, width_ratios=[1, 1.15])
    name = next(iter(readings.scores), None)
    if name is None:
        values = [_surprise(readings, condition) for condition in CONDITIONS]
        _bars(bars, values, "nats per token of the references (lower is better)")
    else:
        values = [metrics[f"{name}_with_{condition}"] for condition in CONDITIONS]
        _bars(bars, values, f"{name.replace('_', ' ')} (higher is better)")
    bars.set_title("with 95 % intervals", fontsize=10)
    _spread(spread, readings, metrics)
    lines = textwrap.wrap(verdict, 125)
    figure.suptitle("\n".join([f"Does it look? {title}", *lines]), fontsize=10, ha="left", x=0.01)
    figure.savefig(file, dpi=110)


def _surprise(readings, condition):
    from vora.eval.intervals import interval_of

    sums = np.stack([-readings.log_probs[condition], readings.num_tokens], 1)
    groups = [readings.groups[example] for example in readings.examples]
    return interval_of(lambda drawn: drawn[..., 0] / drawn[..., 1], sums, groups)


def _bars(axes, values, label):
    heights = [one["value"] for one in values]
    errors = [[max(0.0, one["value"] - one["interval"][0]) for one in values],
              [max(0.0, one["interval"][1] - one["value"]) for one in values]]  # fmt: skip
    places = range(len(CONDITIONS))
    axes.bar(places, heights, color=[COLOURS[condition] for condition in CONDITIONS], width=0.7)
    axes.errorbar(places, heights, errors, fmt="none", ecolor="#1c2733", capsize=4, linewidth=1.2)
    for place, one in zip(places, values):
        axes.annotate(
            f"{one['value']:.3g}", (place, one["interval"][1]), (0, 3), textcoords="offset points", ha="center"
        )
    axes.set_xticks(list(places), [TITLES[condition] for condition in CONDITIONS])
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _spread(axes, readings, metrics):
    gains = {name: readings.log_probs["right"] - readings.log_probs[name] for name in CONDITIONS[1:]}
    low, high = np.quantile(np.concatenate(list(gains.values())), [0.01, 0.99])
    low, high = min(low, -0.01), max(high, 0.01)
    edges = np.linspace(low, high, 41)
    for name, values in gains.items():
        beats = metrics[f"right_beats_{name}"]["value"]
        label = f"over {TITLES[name].replace(chr(10), ' ')}: {100 * beats:.1f} % above 0"
        weights = np.full(len(values), 100 / len(values))
        inside = values.clip(low, high)
        if name == "other":
            axes.hist(inside, edges, weights=weights, color=COLOURS[name], alpha=0.45, label=label)
        else:
            axes.hist(inside, edges, weights=weights, histtype="step", color=COLOURS[name], linewidth=1.6, label=label)
    axes.axvline(0, color="#1c2733", linewidth=1)
    axes.set_xlabel("gain in log-likelihood that the right picture brings, nats per reference (ends gathered)")
    axes.set_ylabel("% of references")
    axes.set_title("above 0: the right picture is better (ties count half)", fontsize=10)
    axes.legend(fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
