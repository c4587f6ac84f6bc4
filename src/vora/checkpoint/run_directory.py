"""Where a run keeps what it has trained.

RUN/recipe.yaml, RUN/checkpoint-N/, RUN/final/; see `vora.train.run`.
"""

import json
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def is_run(folder):
    """Whether a folder is the directory of a run of `vora train`."""
    return (Path(folder) / "recipe.yaml").exists()


def trained_folder(directory):
    """Where a run has its newest trained weights; a folder that is no run is its own.

    Raises:
        ValueError: the run has saved nothing yet.
    """
    if not is_run(directory):
        return Path(directory)
    final = Path(directory) / "final"
    folder = final if final.exists() else newest_checkpoint(directory)
    if folder is None:
        raise ValueError(f"{directory} holds neither final/ nor a checkpoint: the run has not saved anything yet.")
    return Path(folder)


def find_checkpoint(directory, resume):
    """The newest checkpoint to resume from, or None for a fresh run; one that a killed run was writing is removed.

    Raises:
        ValueError: nothing is there to resume, or a fresh run would mix with an old one.
    """
    for folder in _checkpoints(directory):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)  # several processes may do so at once
    newest = newest_checkpoint(directory)
    if resume and newest is None:
        raise ValueError(f"{directory} holds no checkpoint to resume from: start without --resume.")
    if not resume and (newest is not None or (directory / "final").exists()):
        raise ValueError(f"{directory} already holds a run: add --resume to go on with it, or choose another --out.")
    return newest


def newest_checkpoint(directory):
    """The newest whole checkpoint of a run as a path, or None."""
    return next((str(folder) for folder in reversed(_checkpoints(directory)) if _is_whole(folder)), None)


def last_step(checkpoint):
    """How many steps had been done when a checkpoint was saved."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]


def _checkpoints(directory):
    """All checkpoints of a run, oldest first."""
    folders = [
        folder
        for folder in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rpartition("-")[2].isdigit()
    ]
    return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))


def _is_whole(checkpoint):
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # written last
        return True
    except (OSError, ValueError):
        return False
