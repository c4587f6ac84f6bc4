"""Runs of several processes for the tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processes import in_processes
from runs import run

from vora.train.recipe import load_recipe


def train_as(
    rank: int, recipe: Path, folder: Path, overrides: Sequence[str], after: Callable | None = None, **options: Any
) -> None:
    """As one of several processes: a run, and what is to be asked of it after."""
    trainer = run(load_recipe(recipe, list(overrides)), folder, **options)
    if after is not None:
        after(trainer)


def train_ranks(num: int, recipe: Path, folder: Path, overrides: Sequence[str] = (), **options: Any) -> None:
    """A run of so many processes."""
    in_processes(num, folder.parent, train_as, recipe, folder, overrides, **options)
