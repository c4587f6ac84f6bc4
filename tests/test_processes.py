"""Two processes under torchrun: each reads its own part of the data, and a resumed run is the uninterrupted one, with
all that a step may follow: answers that count alike, text kept and text spared."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_kill import recipe  # noqa: F401  (a fixture: two sources, two workers, drawn budgets)


def train(path, folder, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "vora.cli", "train", str(path), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keys = ("lm_loss", "answer_loss", "distill_loss", "text_loss", "text_energy", "samples_seen")
    return {line["step"]: [line.get(key) for key in keys] for line in lines}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="processes on a CPU talk through gloo")
def test_two_processes_resume_as_one_run(recipe, tmp_path):  # noqa: F811
    few = ["training.dataloader_num_workers=1", "training.save_steps=6"]
    few += ["data.answer_balance=1", "lora.keep_text=0.5", "lora.spare_text=0.1"]
    train(recipe, tmp_path / "whole", "training.max_steps=18", *few)
    train(recipe, tmp_path / "cut", "training.max_steps=12", *few)
    train(recipe, tmp_path / "cut", "training.max_steps=18", *few, "--resume")
    found = losses(tmp_path / "cut")
    assert sorted(found) == list(range(1, 19)) and found == losses(tmp_path / "whole")
    places = [json.loads((tmp_path / "cut" / "checkpoint-18" / f"data_position_{r}.json").read_text()) for r in (0, 1)]
    report = (tmp_path / "cut" / "report.md").read_text()
    assert f"| samples seen | {found[18][-1]} |" in report  # of both
    for number in range(len(found[18])):
        assert any(line[number] for line in found.values())
    assert places[0]["data"] == places[1]["data"] and places[0]["num_rows"] == places[1]["num_rows"] == 40
