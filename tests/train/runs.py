"""Short runs for the tests, and what they logged."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from vora.train.recipe import Recipe
from vora.train.run import train
from vora.train.run_log import read_log
from vora.train.trainer import VoraTrainer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}
NAMED = ("lm_loss", "distill_loss")


def run(recipe: Recipe, folder: Path, draws: bool = False, **kwargs: object) -> VoraTrainer:
    """A run that prints nothing, and draws its losses only where it should."""
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr("vora.train.run_log.save_figure", lambda figure, file: None)
        return train(recipe, folder, **{"console": Console(quiet=True), **kwargs})


def losses(folder: Path, names: tuple[str, ...] = NAMED) -> dict[int, list[float | None]]:
    """{step: what was logged under these names}; none of them depends on the clock."""
    return {line["step"]: [line.get(name) for name in names] for line in read_log(folder / "log.jsonl")}


def close_to(found: dict[int, list[float | None]], **tolerance: float) -> dict:
    """What `losses` gave, to be compared with another run's."""
    return {
        step: [None if value is None else pytest.approx(value, **tolerance) for value in values]
        for step, values in found.items()
    }


def write_lines(path: Path, lines: list[dict]) -> str:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)
