"""A run that is killed without warning goes on as if nothing had been: same samples, same losses."""

import os
import random
import shutil
import signal
import time

import pytest
from runs import finish, losses, start

from vora.checkpoint.run_directory import find_checkpoint

STEPS = 30
NAMES = ("lm_loss", "distill_loss", "samples_seen")


def steps_done(folder):
    log = folder / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_and_resume(recipe, whole, folder, num_kills):
    """Kills at random moments, then the run to its end; how often it was killed."""
    kills, process, rng = 0, None, random.Random(num_kills)
    while process is None or process.returncode == -signal.SIGKILL:
        resume = any(folder.glob("checkpoint-*"))
        if not resume and folder.exists():
            shutil.rmtree(folder)  # killed before the first checkpoint: a fresh run
        process = start(recipe, folder, *["--resume"] * resume)
        if kills < num_kills:
            until = steps_done(folder) + rng.randint(1, 2 * STEPS // (num_kills + 1))
            while process.poll() is None and steps_done(folder) < until:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.3)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
    finish(process)
    assert losses(folder, NAMES) == losses(whole, NAMES)
    return kills


@pytest.fixture(scope="module")
def whole(two_sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(two_sources, folder))
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    return folder


@pytest.mark.parametrize(("num_kills", "least"), [(1, 1), pytest.param(10, 8, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_exactly(two_sources, whole, tmp_path, num_kills, least):
    assert kill_and_resume(two_sources, whole, tmp_path / "run", num_kills) >= least


def test_a_checkpoint_that_was_not_finished_is_not_resumed_from(tmp_path):
    for step, text in ((3, '{"global_step": 3}'), (6, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-9").mkdir()
    assert find_checkpoint(tmp_path, resume=True) == str(tmp_path / "checkpoint-3")
