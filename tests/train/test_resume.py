"""A stopped or killed run goes on as if nothing had been, of one process and of two; no run is overwritten."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch.distributed as dist
from runs import finish, losses, run, start
from torch.multiprocessing import spawn
from transformers import TrainerCallback, TrainerControl, TrainingArguments

from vora.checkpoint.layout import read_info
from vora.checkpoint.lineage import read_card
from vora.checkpoint.run_directory import find_checkpoint
from vora.train.callbacks import StopOnSignal
from vora.train.from_recipe import fewest_of_processes
from vora.train.recipe import load_recipe
from vora.train.run_log import read_log


class StopAt(TrainerCallback):
    """Sends this process a signal after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_resumed_losses_are_those_of_an_uninterrupted_run(recipe, tmp_path):
    run(recipe(save_steps=2), tmp_path / "whole")
    with pytest.raises(InterruptedError, match="--resume"):
        run(recipe(save_steps=2), tmp_path / "cut", callbacks=[StopAt(3)])
    assert (tmp_path / "cut" / "checkpoint-3").exists() or (tmp_path / "cut" / "checkpoint-4").exists()
    of_cut, of_whole = read_card(read_info(tmp_path / "cut").path), read_card(tmp_path / "whole" / "final")
    assert of_cut["base_llm"] == of_whole["base_llm"] != "not stated" and of_cut["stages"][0]["steps"] in (3, 4)
    run(load_recipe(tmp_path / "cut" / "recipe.yaml"), tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


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


def test_a_longer_run_hides_its_first_end_and_keeps_the_planned_steps(recipe, tmp_path):
    run(recipe(max_steps=4, save_steps=2), tmp_path / "run")
    with pytest.raises(InterruptedError):
        run(recipe(max_steps=9, save_steps=2), tmp_path / "run", resume=True, callbacks=[StopAt(6)])
    assert read_info(tmp_path / "run").path.name in ("checkpoint-6", "checkpoint-7")
    planned = recipe(save_steps=2)  # max_steps 6, which the checkpoint knows better
    planned.max_minutes = 10.0
    assert run(planned, tmp_path / "run", resume=True).state.global_step == 9


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


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
            "localhost:0", "-m")  # fmt: skip
OF_TWO = ("lm_loss", "answer_loss", "distill_loss", "text_loss", "samples_seen")


def train_two(path, folder, *arguments):
    finish(start(path, folder, *arguments, launcher=TORCHRUN))


def test_two_processes_resume_as_one_run(two_sources, tmp_path):
    few = ["training.dataloader_num_workers=1", "teacher.distill_only_steps=3"]
    few += ["data.answer_balance=1", "lora.text_kl_weight=0.5"]
    train_two(two_sources, tmp_path / "whole", "training.max_steps=9", *few)
    train_two(two_sources, tmp_path / "cut", "training.max_steps=6", *few)
    train_two(two_sources, tmp_path / "cut", "training.max_steps=9", *few, "--resume")
    found = losses(tmp_path / "cut", OF_TWO)
    assert sorted(found) == list(range(1, 10)) and found == losses(tmp_path / "whole", OF_TWO)
    assert all(any(of_name) for of_name in zip(*found.values()))
    places = [json.loads((tmp_path / "cut" / "checkpoint-9" / f"data_position_{r}.json").read_text()) for r in (0, 1)]
    assert places[0]["data"] == places[1]["data"] and places[0]["num_sequences"] == places[1]["num_sequences"] == 24
    assert f"| samples seen | {found[9][-1]} |" in (tmp_path / "cut" / "report.md").read_text()  # of both


def test_logged_losses_are_those_of_both_processes(two_sources, tmp_path):
    train_two(two_sources, tmp_path / "run", "training.max_steps=3", "teacher=null")
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if "lm_loss" in line]
    assert len(lines) == 3 and all(line["lm_loss"] == pytest.approx(line["loss"], rel=1e-4) for line in lines)


def agree(rank, folder):
    """Two processes, of which one measured fewer steps and only the other caught a signal, after its second step."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    arguments = TrainingArguments(output_dir=folder, use_cpu=True)
    found, stop = [fewest_of_processes(30 - rank, arguments)], StopOnSignal()
    stop.on_train_begin(arguments, None, None)
    for step in range(3):
        if rank == 0 and step == 1:
            stop._catch(2, None)
        control = TrainerControl()
        stop.on_step_end(arguments, None, control)
        found.append(control.should_training_stop)
    stop.release()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([*found, stop.caught], file)
    dist.barrier()
    dist.destroy_process_group()  # else a process that ends while its threads live may abort


def test_processes_agree_on_how_long_a_run_is_and_when_it_stops(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    spawn(agree, (str(tmp_path),), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == [29, False, True, True, "SIGINT"]
    assert found[1] == [29, False, True, True, "A signal to another process"]
