"""Where a run keeps what it has trained: RUN/recipe.yaml, RUN/checkpoint-N/, RUN/final/; see `vora.train.run`."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vora.checkpoint.manifest import MANIFEST, STATE, fault_of, is_json


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
    final, newest = run / "final", newest_checkpoint(run)
    # what is written last says that all is there; where no checkpoint is left, the user hears what is missing
    found = final if (final / MANIFEST).exists() or (newest is None and final.exists()) else newest
    if found is None:
        raise ValueError(f"{run} holds neither final/ nor a checkpoint: the run has not saved anything yet.")
    return Path(found)


def find_checkpoint(directory: Path, resume: bool, tell: Callable[[str], None] = lambda text: None) -> str | None:
    """The newest whole checkpoint to resume from, or None for a fresh run; newer ones that are not whole are named to
    `tell`. ValueError where there is none to resume from, or a fresh run would mix with an old one."""
    found, faults = _checkpoints(directory), list[str]()
    if not resume:
        if any(map(_is_finished, found)) or (directory / "final").exists():
            raise ValueError(
                f"{directory} already holds a run: add --resume to go on with it, or choose another --out."
            )
        return None
    for checkpoint in reversed(found):
        if (fault := fault_of(checkpoint)) is None:
            if faults:
                tell(f"Warning: {'; '.join(faults)}. Going on from {checkpoint.name}.")
            return str(checkpoint)
        faults.append(f"{checkpoint.name}: {fault}")
    causes = f" ({'; '.join(faults)})" if faults else ""
    is_run = any(map(_is_finished, found)) or (directory / "final").exists()
    cure = "choose another --out to begin anew" if is_run else "start without --resume"
    raise ValueError(f"{directory} holds no checkpoint to resume from{causes}: {cure}.")


def checkpoint_up_to(directory: Path, step: int) -> str | None:
    """The newest whole checkpoint of a run that was saved after no more steps than these."""
    found = (folder for folder in reversed(_checkpoints(directory)) if _step(folder) <= step)
    return next((str(folder) for folder in found if fault_of(folder) is None), None)


def set_aside_newer(checkpoint: Path) -> list[str]:
    """Rename the finished checkpoints that are newer than the one a run goes on from, so that they mix with none of
    those to come; their new names. Nothing is deleted."""
    found = [folder for folder in _checkpoints(checkpoint.parent) if _step(folder) > _step(checkpoint)]
    names = []
    for folder in filter(_is_finished, found):
        free = (folder.with_name(f"unused-{folder.name}{end}") for end in chain([""], (f"-{n}" for n in count(2))))
        place = next(place for place in free if not place.exists())
        folder.rename(place)
        names.append(place.name)
    return names


def begin_checkpoint(checkpoint: Path) -> None:
    """Before a checkpoint is written over one that was there: until the last file is written, it is not whole."""
    for name in (STATE, MANIFEST):
        (checkpoint / name).unlink(missing_ok=True)


def delete_older(directory: Path, most: int | None, named: Iterable[str] = ()) -> None:
    """Delete the oldest whole checkpoints of a run but for so many, among them the newest and those that are named."""
    whole = [folder for folder in _checkpoints(directory) if _is_whole(folder)]
    names = {Path(one).name for one in named}
    kept = [folder for folder in whole if folder == whole[-1] or folder.name in names]
    others = [folder for folder in whole if folder not in kept]
    for folder in others[: max(0, len(whole) - max(most or len(whole), len(kept)))]:
        shutil.rmtree(folder, ignore_errors=True)


def newest_checkpoint(directory: Path | str) -> str | None:
    """The newest whole checkpoint of a run."""
    return next((str(folder) for folder in reversed(_checkpoints(directory)) if _is_whole(folder)), None)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON Lines, none where it is missing: a full disk or a kill may have left the last
    one unfinished. ValueError, which names file and line, where another one is no JSON."""
    text = file.read_text() if file.exists() else ""
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{file}, line {number} is no JSON: delete that line.") from None
    return lines


def replace_text(file: Path, text: str) -> None:
    """Write a file so that all of it is there, or the one before."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def last_step(checkpoint: Path | str) -> int:
    """How many steps had been done when a checkpoint was saved."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


def _checkpoints(directory: Path | str) -> list[Path]:
    """All checkpoints of a run, oldest first."""
    found = [folder for folder in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()]
    return sorted((folder for folder in found if folder.name.rpartition("-")[2].isdigit()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_finished(checkpoint: Path) -> bool:
    """Whether the last file is there, readable or not."""
    try:
        return (checkpoint / STATE).exists()
    except OSError:
        return True


def _is_whole(checkpoint: Path) -> bool:
    """Whether the last file can be read; `fault_of` looks at the others too."""
    with suppress(OSError):
        return is_json(checkpoint / STATE)
    return False
