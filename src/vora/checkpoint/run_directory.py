"""Where a run keeps what it has trained: RUN/recipe.yaml, RUN/checkpoint-N/, RUN/final/; see `vora.train.run`."""

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def run_of(folder: Path) -> Path | None:
    """The run directory that a folder is, or that it is the `final` or a checkpoint of; None for any other."""
    whole = folder.resolve()  # of `.`, or of a link to the newest
    is_saved = whole.name == "final" or whole.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    places = [folder, whole.parent] if is_saved else [folder]
    return next((place for place in places if (place / "recipe.yaml").exists()), None)


def read_recipe(run: Path) -> dict[str, Any]:
    """The recipe of a run, defaults included, as plain YAML."""
    return yaml.safe_load((run / "recipe.yaml").read_text())


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint of a run that was best on its validation samples."""

    folder: Path
    metric: str
    value: float


def best_checkpoint(run: Path) -> BestCheckpoint | None:
    """The best checkpoint of a run whose recipe says by what (`load_best_model_at_end`, `metric_for_best_model`)."""
    newest = newest_checkpoint(run)
    state = {} if newest is None else json.loads((Path(newest) / "trainer_state.json").read_text())
    if not state.get("best_model_checkpoint"):
        return None
    folder = run / Path(state["best_model_checkpoint"]).name  # the run may have been moved
    metric = read_recipe(run)["training"].get("metric_for_best_model") or "loss"
    found = BestCheckpoint(folder, f"eval_{metric.removeprefix('eval_')}", state["best_metric"])
    return found if _is_whole(folder) else None


def weights_of_run(run: Path) -> Path:
    """The best checkpoint of a run, else `final`, else the newest checkpoint; ValueError where it has saved nothing
    yet."""
    if best := best_checkpoint(run):
        return best.folder
    found = run / "final" if (run / "final").exists() else newest_checkpoint(run)
    if found is None:
        raise ValueError(f"{run} holds neither final/ nor a checkpoint: the run has not saved anything yet.")
    return Path(found)


def find_checkpoint(directory: Path, resume: bool) -> str | None:
    """The newest checkpoint to resume from, or None for a fresh run; one that a killed run was writing is removed.
    ValueError where nothing is there to resume, or a fresh run would mix with an old one."""
    for folder in _checkpoints(directory):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # several processes may do so at once
    newest = newest_checkpoint(directory)
    if resume and newest is None:
        raise ValueError(f"{directory} holds no checkpoint to resume from: start without --resume.")
    if not resume and (newest is not None or (directory / "final").exists()):
        raise ValueError(f"{directory} already holds a run: add --resume to go on with it, or choose another --out.")
    return newest


def newest_checkpoint(directory: Path | str) -> str | None:
    """The newest whole checkpoint of a run."""
    return next((str(folder) for folder in reversed(_checkpoints(directory)) if _is_whole(folder)), None)


def last_step(checkpoint: Path | str) -> int:
    """How many steps had been done when a checkpoint was saved."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


def _checkpoints(directory: Path | str) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    steps = {f: f.name.rpartition("-")[2] for f in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.is_dir()}
    return sorted((folder for folder in steps if steps[folder].isdigit()), key=lambda folder: int(steps[folder]))


def _is_whole(checkpoint: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))  # written last
    return False
