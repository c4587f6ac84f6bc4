"""Kills a small run of two processes at random moments and resumes it, until it has ended; then asks whether it is the
run that nobody killed.

    PYTHONPATH=src:tests:tests/train python tests/train/kills.py --kills 200 --minutes 25 --out FOLDER

With the same FOLDER it goes on counting. Each start is a fork of this process, so that it costs no imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tiny
import yaml
from PIL import Image
from processes import START
from ranks import train_ranks
from runs import losses, write_lines

from vora.checkpoint.manifest import STATE, fault_of
from vora.checkpoint.run_directory import newest_checkpoint

NAMES = ("loss", "lm_loss", "distill_loss", "samples_seen", "grad_norm")
STEPS = 24


def write_recipe(folder: Path) -> Path:
    """A run of two processes, of seconds, on tiny models and data of its own."""
    folder.mkdir(parents=True)
    llm, vit, rng = tiny.save_tiny_llm(folder / "llm"), tiny.save_tiny_vit(folder / "vit"), np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8)).save(folder / f"{number}.png")
    rows = [{"image": f"{n}.png", "question": "what?", "answer": f"it is {n}"} for n in range(40)]
    recipe = {
        "model": {"llm": str(llm)},
        "teacher": {"name": str(vit), "distill_only_steps": 4},
        "lora": {"rank": 4},
        "data": {"sources": [{"path": write_lines(folder / "train.jsonl", rows)}], "sequence_length": 64},
        "training": {
            "max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "logging_steps": 1,
            "save_steps": 2, "use_cpu": True, "warmup_steps": 1,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def train_alone(recipe: Path, folder: Path) -> None:
    """In a process group of its own, which is to be killed whole."""
    os.setsid()
    train_ranks(2, recipe, folder, resume=newest_checkpoint(folder) is not None)


def attempt(recipe: Path, folder: Path, seconds: float | None, only_one: bool) -> bool:
    """Go on with a run, kill it after so many seconds; whether it was killed."""
    if newest_checkpoint(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # killed before anything was whole: a fresh run
    process = get_context(START).Process(target=train_alone, args=(recipe, folder))
    process.start()
    process.join(seconds)
    killed = process.is_alive()
    if killed:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if only_one and len(ranks) == 2:
            os.kill(int(random.choice(ranks)), signal.SIGKILL)  # the other one has to notice
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.join(300)
    assert process.exitcode is not None and (killed or process.exitcode == 0), process.exitcode
    for checkpoint in folder.glob("checkpoint-*"):  # one that says that it is all there is
        if (checkpoint / STATE).exists():
            assert (fault := fault_of(checkpoint)) is None, f"{checkpoint}: {fault}"
    return killed


def assert_same(folder: Path, whole: Path) -> None:
    """The run that was killed is the one that was not: weights and places in the data to the byte, each line."""
    ours, theirs = (
        {
            str(file.relative_to(run)): file.read_bytes()
            for kind in ("*.safetensors", "data_position_*.json")
            for place in ("final", f"checkpoint-{STEPS}")
            for file in (run / place).glob(kind)
        }
        for run in (folder, whole)
    )
    assert len(theirs) == 6 and ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    found = losses(folder, NAMES)
    assert sorted(found) == list(range(1, STEPS + 1)) and found == losses(whole, NAMES)


def kill_a_run(recipe: Path, whole: Path, folder: Path, num_kills: int, seconds: float, rng: random.Random) -> int:
    """Kill a run so often, or until it ends; how often it was killed."""
    kills = 0
    while attempt(recipe, folder, rng.uniform(0, seconds) if kills < num_kills else None, rng.random() < 0.3):
        kills += 1
    assert_same(folder, whole)
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    root, until = options.out, time.monotonic() + 60 * options.minutes
    recipe, count = root / "data" / "recipe.yaml", root / "kills.jsonl"
    if not recipe.exists():
        write_recipe(root / "data")
    start = time.monotonic()
    if not (root / "whole" / "final").exists():
        shutil.rmtree(root / "whole", ignore_errors=True)
        train_ranks(2, recipe, root / "whole")
        (root / "seconds").write_text(str(max(2.0, (time.monotonic() - start) / 2)))
    seconds = float((root / "seconds").read_text())  # within which a start is killed: of half a run
    done = [json.loads(line)["kills"] for line in count.read_text().splitlines()] if count.exists() else []
    while sum(done) < options.kills and time.monotonic() < until:
        folder, rng = root / f"run-{len(done)}", random.Random(len(done))
        shutil.rmtree(folder, ignore_errors=True)
        done.append(kill_a_run(recipe, root / "whole", folder, 20, seconds, rng))
        with count.open("a") as file:
            file.write(json.dumps({"kills": done[-1]}) + "\n")
        shutil.rmtree(folder)
        print(f"{sum(done)} kills in {len(done)} runs, all as the run that nobody killed", flush=True)


if __name__ == "__main__":
    main()
