"""A run that is killed without warning goes on as if nothing had been: same samples, same losses."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import save_tiny_vit

STEPS = 60


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, llm_folder):
    """Two sources, two workers, drawn budgets, images alone first, a checkpoint every third step."""
    folder, rng = tmp_path_factory.mktemp("kill"), np.random.default_rng(0)
    lines = []
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "what?", "answer": f"it is {number}"})
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"question": f"say {number}", "answer": f"{number}"} for number in range(50)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_tiny_vit(folder / "vit")
    values = {
        "model": {"llm": llm_folder},
        "teacher": {"name": "vit", "distill_only_steps": 8},
        "data": {
            "sources": [{"path": "images.jsonl", "weight": 2}, {"path": "texts.jsonl", "weight": 1}],
            "sequence_length": 128, "image_tokens": [2, 9],
        },
        "training": {
            "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
            "save_steps": 3, "dataloader_num_workers": 2, "use_cpu": True, "learning_rate": 1e-3,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def start(recipe, folder, *overrides, resume=False):
    command = [sys.executable, "-c", "from vora.cli import main; main()", "train", str(recipe), *overrides]
    command += ["--out", str(folder)] + (["--resume"] if resume else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def losses(folder):
    """{step: (losses, samples seen)}; what does not depend on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: [line.get(key) for key in ("lm_loss", "distill_loss", "samples_seen")] for line in lines}


def steps_done(folder):
    log = folder / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_and_resume(recipe, whole, folder, num_kills, rng):
    kills = 0
    while True:
        resume = any(folder.glob("checkpoint-*"))
        if not resume and folder.exists():
            for file in folder.iterdir():  # killed before the first checkpoint: a fresh run
                file.unlink()
        process = start(recipe, folder, resume=resume)
        if kills < num_kills:
            begun, until = steps_done(folder), rng.randint(1, 2 * STEPS // (num_kills + 1))
            while process.poll() is None and steps_done(folder) < begun + until:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.3)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                continue
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
        break
    assert losses(folder) == losses(whole)
    return kills


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(recipe, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    return folder


def test_a_killed_run_goes_on_exactly(recipe, whole, tmp_path):
    assert kill_and_resume(recipe, whole, tmp_path / "run", num_kills=1, rng=random.Random(0)) == 1


@pytest.mark.slow
def test_ten_kills_leave_no_trace(recipe, whole, tmp_path):
    assert kill_and_resume(recipe, whole, tmp_path / "run", num_kills=10, rng=random.Random()) >= 8


def test_a_checkpoint_that_was_not_finished_is_not_resumed_from(recipe, whole, tmp_path):
    from vora.checkpoint.run_directory import find_checkpoint

    for step, text in ((3, '{"global_step": 3}'), (6, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-9").mkdir()
    assert find_checkpoint(tmp_path, resume=True) == str(tmp_path / "checkpoint-3")
