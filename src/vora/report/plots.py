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
    for name, label in labels.items():
        points = [(line["samples_seen"], line[name]) for line in log if name in line]
        if points:
            marker = "o" if name.startswith("eval_") else None  # few and far between, perhaps one
            axes.plot(*zip(*points), label=label, marker=marker, markersize=4)
    axes.set(xlabel="samples seen", ylabel="loss", yscale="log")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    return figure


def save_figure(figure: "Figure", file: Path | str, dpi: int = 120) -> None:
    """Write a PNG, of the same bytes for the same figure."""
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})


def figure_url(figure: "Figure", dpi: int = 110) -> str:
    """A figure inside a page."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return bytes_url(buffer.getvalue(), "image/png")
