"""A stopped or killed run goes on as if nothing had been, of one process and of two; no run is overwritten."""

import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from processes import START, in_processes
from ranks import train_ranks
from rich.console import Console
from runs import close_to, losses, run
from transformers import TrainerCallback, TrainerControl, TrainerState

from vora.checkpoint.layout import read_info
from vora.checkpoint.run_directory import newest_checkpoint
from vora.train.callbacks import StopOnSignal
from vora.train.from_recipe import fewest_of_processes
from vora.train.recipe import load_recipe
from vora.train.recipe_sections import AUTO_LENGTH
from vora.train.run_log import read_log


class StopAt(TrainerCallback):
    """Sends this process signals after a step."""

    def __init__(self, step, count=1):
        self.step, self.count = step, count

    def on_step_end(self, args, state, control, **kwargs):
        for _ in range(self.count if state.global_step == self.step else 0):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_killed_after_its_last_step_only_ends_and_none_is_overwritten(recipe, tmp_path):
    run(recipe(save_steps=3), tmp_path / "run")
    whole = losses(tmp_path / "run")
    expected = (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        run(recipe(), tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint"):
        run(recipe(), tmp_path / "other", resume=True)
    shutil.rmtree(tmp_path / "run" / "final")
    run(load_recipe(tmp_path / "run" / "recipe.yaml"), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == whole and max(whole) == 6
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes() == expected


def test_a_signal_is_answered_at_once_and_a_second_one_does_not_wait(recipe, tmp_path):
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(InterruptedError, match="at once, after step 3 of 6. Go on from checkpoint-2 with: vora train"):
        run(recipe(save_steps=2), tmp_path / "run", callbacks=[StopAt(3, count=2)], console=console)
    said = console.file.getvalue()
    assert "SIGTERM: saves a checkpoint after the step that is running, and stops. A second signal stops at" in said
    with pytest.raises(InterruptedError, match="no checkpoint yet, so it would begin anew"):
        run(recipe(), tmp_path / "other", callbacks=[StopAt(1, count=2)])
    run(recipe(save_steps=2), tmp_path / "run", resume=True, console=console)
    assert "Going on from checkpoint-2 of 6 steps." in console.file.getvalue()
    assert losses(tmp_path / "run").keys() == set(range(1, 7))


class BrokenPipe(Console):
    """Of a reader that the same Ctrl-C has ended: rich leaves with SystemExit."""

    def print(self, *objects, **options):
        if self.breaks:
            raise SystemExit(1)


def test_a_signal_is_heeded_though_nobody_reads_what_is_said_and_workers_say_nothing(monkeypatch):
    state, control, console = TrainerState(max_steps=9), TrainerControl(), BrokenPipe(file=io.StringIO())
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for breaks, own in ((True, True), (False, False)):
        stop, console.breaks = StopOnSignal(console), breaks
        said = []
        monkeypatch.setattr(BrokenPipe, "print", BrokenPipe.print if breaks else lambda *_, **__: said.append(1))
        stop.on_train_begin(SimpleNamespace(world_size=1), state, control)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getpid if own else lambda: -1)  # a worker that the process has forked
            stop._catch(signal.SIGTERM, None)
        stop.on_step_end(None, state, control)
        assert stop.caught == "SIGTERM" and control.should_training_stop and not said
        stop.release()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_refused_resume_changes_nothing_in_the_run(recipe, tmp_path):
    run(recipe(save_steps=2, max_steps=4), tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    other = recipe(save_steps=2)
    other.data.sequence_length += 8
    with pytest.raises(ValueError, match="sequence_length was .* recipe.yaml has it.*model.vora=THIS_RUN"):
        run(other, tmp_path / "run", resume=True)
    decaying = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}}
    run(recipe(save_steps=1, save_total_limit=9, **decaying), tmp_path / "decayed")
    names = {folder.name for folder in (tmp_path / "decayed").iterdir()}
    longer = recipe(max_steps=10, **decaying)  # which goes on from before the decay
    longer.data.sequence_length += 8
    with pytest.raises(ValueError, match="sequence_length was"):
        run(longer, tmp_path / "decayed", resume=True)
    assert {folder.name for folder in (tmp_path / "decayed").iterdir()} == names
    of_other_shape = recipe(save_steps=2)
    of_other_shape.lora.rank += 1
    with pytest.raises((ValueError, RuntimeError)):
        run(of_other_shape, tmp_path / "run", resume=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before
    assert run(load_recipe(tmp_path / "run" / "recipe.yaml"), tmp_path / "run", resume=True).state.global_step == 4


def test_a_run_that_has_ended_keeps_the_recipe_that_it_was_trained_with(recipe, tmp_path):
    run(recipe(save_steps=2, max_steps=4), tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    files = {file: file.read_bytes() for file in (tmp_path / "run" / "final").iterdir()}
    other = recipe(save_steps=2, max_steps=4, learning_rate=1e-4)
    other.model.image_markers = ("<a>", "<b>")
    with pytest.raises(ValueError, match="All 4 steps are done.*image_markers was None.*learning_rate was 0.005, is"):
        run(other, tmp_path / "run", resume=True)
    assert {file: file.read_bytes() for file in (tmp_path / "run" / "final").iterdir()} == files
    console = Console(file=io.StringIO(), width=200)
    run(recipe(save_steps=2, max_steps=3), tmp_path / "run", resume=True, console=console)
    assert "Step 4 of 3 is done: nothing is left to train." in console.file.getvalue()
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


def test_weights_may_be_read_as_the_umask_says(recipe, tmp_path):
    before = os.umask(0o022)
    try:
        run(recipe(max_steps=2, save_steps=2), tmp_path / "run")
    finally:
        os.umask(before)
    weights = list((tmp_path / "run").rglob("*.safetensors"))
    assert len(weights) == 4 and {stat.S_IMODE(file.stat().st_mode) for file in weights} == {0o644}


def test_a_length_that_the_data_chose_is_kept(recipe, tmp_path):
    def chosen(steps):
        found = recipe(max_steps=steps, save_steps=2)
        found.data.sequence_length = AUTO_LENGTH
        return found

    run(chosen(2), tmp_path / "run")
    length = load_recipe(tmp_path / "run" / "recipe.yaml").data.sequence_length
    assert length >= 8 and run(chosen(4), tmp_path / "run", resume=True).state.global_step == 4
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.sequence_length == length


def test_a_longer_run_hides_its_first_end_and_keeps_the_planned_steps(recipe, tmp_path, monkeypatch):
    run(recipe(max_steps=4, save_steps=2), tmp_path / "run")
    drawn = []
    monkeypatch.setattr("vora.train.run.draw_losses", drawn.append)
    with pytest.raises(InterruptedError, match="--resume"):
        run(recipe(max_steps=9, save_steps=2), tmp_path / "run", resume=True, callbacks=[StopAt(6)])
    assert drawn == [tmp_path / "run"]  # for who looks at what was stopped
    assert read_info(tmp_path / "run").path.name in ("checkpoint-6", "checkpoint-7")
    planned = recipe(save_steps=2)  # max_steps 6, which the checkpoint knows better
    planned.max_minutes = 10.0
    assert run(planned, tmp_path / "run", resume=True).state.global_step == 9


torch.set_num_threads(1)  # also in what is spawned
STEPS = 30
NAMES = ("lm_loss", "distill_loss", "samples_seen")
OF_TWO = ("lm_loss", "answer_loss", "distill_loss", "text_loss", "samples_seen")


def train_alone(recipe, folder):
    """In a process group of its own, which is to be killed whole."""
    os.setsid()
    run(load_recipe(recipe), folder, resume=newest_checkpoint(folder) is not None)


def steps_done(folder):
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def kill_and_resume(recipe, whole, folder, num_kills):
    """Kills at random moments, then the run to its end; how often it was killed."""
    kills, process, rng = 0, None, random.Random(num_kills)
    while process is None or process.exitcode == -signal.SIGKILL:
        if newest_checkpoint(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # killed before the first checkpoint was whole: a fresh run
        process = get_context(START).Process(target=train_alone, args=(recipe, folder))
        process.start()
        if kills < num_kills:
            until = steps_done(folder) + rng.randint(1, STEPS // (num_kills + 1))
            while process.is_alive() and steps_done(folder) < until:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.2)
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
        process.join(300)
    assert process.exitcode == 0
    assert losses(folder, NAMES) == losses(whole, NAMES)
    return kills


@pytest.fixture(scope="module")
def whole(two_sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(load_recipe(two_sources), folder)
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    return folder


@pytest.mark.parametrize(("num_kills", "least"), [(1, 1), pytest.param(10, 8, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_exactly(two_sources, whole, tmp_path, num_kills, least):
    assert kill_and_resume(two_sources, whole, tmp_path / "run", num_kills) >= least


def stopped(rank, recipe, folder, overrides):
    """As one of two processes, the first of which alone catches a signal."""
    with pytest.raises(InterruptedError, match="A signal to another process" if rank else "SIGTERM"):
        run(load_recipe(recipe, overrides), folder, callbacks=[] if rank else [StopAt(5)])


def measures(trainer):
    """Each process has its own number of steps that it has time for."""
    assert fewest_of_processes(30 - trainer.args.process_index, trainer.args) == 29


def test_two_processes_stop_and_resume_as_one_run(two_sources, tmp_path):
    few = ["training.max_steps=9", "training.dataloader_num_workers=1", "teacher.distill_only_steps=3"]
    few += ["data.answer_balance=1", "lora.text_kl_weight=0.5"]
    launched = [sys.executable, *"-m torch.distributed.run --nproc_per_node 2 --standalone -m vora.cli train".split()]
    subprocess.run(
        [*launched, two_sources, *few, "--out", tmp_path / "whole"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=300, check=True,
    )  # fmt: skip
    in_processes(2, tmp_path, stopped, two_sources, tmp_path / "cut", few)
    assert (tmp_path / "cut" / "checkpoint-6").exists()
    train_ranks(2, two_sources, tmp_path / "cut", few, after=measures, resume=True)
    found = losses(tmp_path / "cut", OF_TWO)
    # a sum's last bit depends on where a process has its memory; the KL is a difference of such sums
    expected = close_to(losses(tmp_path / "whole", OF_TWO), rel=1e-6, abs=1e-7)
    assert sorted(found) == list(range(1, 10)) and found == expected
    assert all(any(of_name) for of_name in zip(*found.values()))
    places = [json.loads((tmp_path / "cut" / "checkpoint-9" / f"data_position_{r}.json").read_text()) for r in (0, 1)]
    assert places[0]["data"] == places[1]["data"] and places[0]["num_sequences"] == places[1]["num_sequences"] == 24
    assert f"| samples seen | {found[9][-1]} |" in (tmp_path / "cut" / "report.md").read_text()  # of both


def test_logged_losses_are_those_of_both_processes(two_sources, tmp_path):
    train_ranks(2, two_sources, tmp_path / "run", ["training.max_steps=3", "teacher=null"])
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "lm_loss" in line]
    assert len(lines) == 3 and all(line["lm_loss"] == pytest.approx(line["loss"], rel=1e-4) for line in lines)
