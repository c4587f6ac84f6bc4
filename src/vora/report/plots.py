"""Plots with matplotlib: figures without a window, and the curves of losses."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vora.report.images import bytes_url

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of so many inches, drawn without a display, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def losses_figure(log: Sequence[Mapping[str, Any]], labels: Mapping[str, str], size: tuple[float, float]) -> "Figure":
    """Losses against samples seen, of log lines with `samples_seen` and, each under its name, some of the losses;
    `labels` are {name of a loss: its name in the legend}."""
    figure, axes = new_figure(*size)
    _draw_lines(axes, log, labels)
    axes.set(xlabel="samples seen", ylabel="loss")
    _in_plain_numbers(axes)
    return figure


def run_figure(log: Sequence[Mapping[str, Any]], losses: Mapping[str, str], shares: Mapping[str, str]) -> "Figure":
    """As `losses_figure`, with a second plot below, of shares for which 0.5 is chance, if the log has some."""
    from matplotlib.figure import Figure

    has_shares = any(name in line for line in log for name in shares)
    figure = Figure(figsize=(7, 5.5 if has_shares else 3.5), layout="constrained")
    heights = [5, 2] if has_shares else [1]
    every = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    _draw_lines(every[0], log, losses)
    every[0].set(ylabel="loss")
    _in_plain_numbers(every[0])
    if has_shares:
        every[1].axhline(0.5, color="gray", linestyle="--", linewidth=1, label="chance")
        _draw_lines(every[1], log, shares)
        every[1].set(ylim=(0, 1))
    every[-1].set(xlabel="samples seen")
    return figure


def _draw_lines(axes: "Axes", log: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    """A line for each of the labels that a log has, against samples seen, on a grid and with a legend."""
    colours: dict[str, Any] = {}
    for name, label in labels.items():
        points = [(line["samples_seen"], line[name]) for line in log if name in line]
        if points:
            is_measured = name.startswith("eval_")  # few and far between, perhaps one
            of, style = name.removeprefix("eval_"), "o:" if is_measured else "-"
            (line,) = axes.plot(*zip(*points), style, label=label, color=colours.get(of), markersize=4)
            colours[of] = line.get_color()
    if axes.lines:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    axes.grid(alpha=0.3)


def _in_plain_numbers(axes: "Axes") -> None:
    """Ticks of a logarithmic axis as 0.5 and 6, not as powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if high < 20 * low else "")  # else too many


def save_figure(figure: "Figure", file: Path | str, dpi: int = 120) -> None:
    """Write a PNG, of the same bytes for the same figure."""
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})


def figure_url(figure: "Figure", dpi: int = 110) -> str:
    """A figure inside a page."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return bytes_url(buffer.getvalue(), "image/png")
