"""Two processes under torchrun: each reads its own part of the data, and a resumed run is the uninterrupted one, with
all that a step may follow: answers that count alike, and text kept."""

import json
import os

import pytest
import torch.distributed as dist
from runs import finish, losses, start
from torch.multiprocessing import spawn
from transformers import TrainerControl, TrainingArguments

from vora.train.callbacks import StopOnSignal
from vora.train.from_recipe import fewest_of_processes
from vora.train.run_log import read_log

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="processes on a CPU talk through gloo")


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
            "localhost:0", "-m")  # fmt: skip
NAMES = ("lm_loss", "answer_loss", "distill_loss", "text_loss", "samples_seen")


def train(path, folder, *arguments):
    finish(start(path, folder, *arguments, launcher=TORCHRUN))


@needs_gloo
def test_two_processes_resume_as_one_run(two_sources, tmp_path):
    few = ["training.dataloader_num_workers=1", "teacher.distill_only_steps=3"]
    few += ["data.answer_balance=1", "lora.text_kl_weight=0.5"]
    train(two_sources, tmp_path / "whole", "training.max_steps=9", *few)
    train(two_sources, tmp_path / "cut", "training.max_steps=6", *few)
    train(two_sources, tmp_path / "cut", "training.max_steps=9", *few, "--resume")
    found = losses(tmp_path / "cut", NAMES)
    assert sorted(found) == list(range(1, 10)) and found == losses(tmp_path / "whole", NAMES)
    assert all(any(of_name) for of_name in zip(*found.values()))
    places = [json.loads((tmp_path / "cut" / "checkpoint-9" / f"data_position_{r}.json").read_text()) for r in (0, 1)]
    assert places[0]["data"] == places[1]["data"] and places[0]["num_sequences"] == places[1]["num_sequences"] == 24
    assert f"| samples seen | {found[9][-1]} |" in (tmp_path / "cut" / "report.md").read_text()  # of both


@needs_gloo
def test_logged_losses_are_those_of_both_processes(two_sources, tmp_path):
    train(two_sources, tmp_path / "run", "training.max_steps=3", "teacher=null")
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


@needs_gloo
def test_processes_agree_on_how_long_a_run_is_and_when_it_stops(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    spawn(agree, (str(tmp_path),), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == [29, False, True, True, "SIGINT"]
    assert found[1] == [29, False, True, True, "A signal to another process"]
