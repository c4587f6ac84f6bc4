"""Runs fail safely: nothing ruined is saved, nothing damaged is used in silence, nothing of others is deleted."""

import json
import os
import re
import shutil
import socket
from io import StringIO
from pathlib import Path

import pytest
import torch
from ranks import train_ranks
from rich.console import Console
from ruins import Ruins
from runs import losses, run
from safetensors.torch import load_file, save_file
from test_train import Rates
from torch.multiprocessing import ProcessRaisedException
from transformers import TrainerCallback

from vora.checkpoint.layout import read_info
from vora.checkpoint.load import load_adapter, load_model, merge_run
from vora.checkpoint.manifest import MANIFEST, STATE
from vora.checkpoint.run_directory import find_checkpoint, read_lines
from vora.data.stream import PackedSequences
from vora.train.recipe import load_recipe
from vora.train.run_lock import LOCK_FILE, take_lock
from vora.train.trainer import VoraTrainer


class Ruin(TrainerCallback):
    """Makes the weights no numbers in the optimizer's step after so many."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe(save_steps=3), folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def printed():
    return Console(record=True, file=StringIO(), width=1000)


def test_a_last_step_that_ruins_the_weights_is_not_saved(recipe, whole, tmp_path):
    with pytest.raises(FloatingPointError, match="After step 6 1 tensors of weights and 1 losses.*from checkpoint-3"):
        run(recipe(save_steps=3), tmp_path / "run", callbacks=[Ruin(5)])
    assert {path.name for path in (tmp_path / "run").glob("[cf]*")} == {"checkpoint-3"}
    (line,) = read_lines(tmp_path / "run" / "diverged.jsonl")[:1]
    assert line["step"] == 6 and line["samples"] and all("train.jsonl" in name for name in line["samples"])
    run(recipe(save_steps=3), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole)
    files = [folder / "final" / "adapter_model.safetensors" for folder in (tmp_path / "run", whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_are_looked_at_where_no_loss_is(recipe, tmp_path, monkeypatch):
    """As on a GPU between two log lines. The first step's weights are finite, and every loss with them is not."""
    monkeypatch.setattr(VoraTrainer, "_check_loss", lambda *args: None)
    wanted = recipe(learning_rate=1e30, max_grad_norm=0.0, save_steps=1, logging_steps=100)
    with pytest.raises(FloatingPointError, match="After step 1 0 tensors of weights and 1 losses.*No checkpoint"):
        run(wanted, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("num_steps", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_nothing_that_is_not_finite_is_saved(tmp_path, num_steps):
    ruins = Ruins(tmp_path)
    for number in range(60, 60 + num_steps):
        ruins.step(number)
    assert len(ruins.found) == 5 and sum(ruins.found.values()) >= 0.97 * num_steps


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def ruin(file):
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file)


FEWER = r"has [\d,]+ of [\d,]+ bytes"
FAULTS = [  # file, damage, what is said of it with a manifest, and without, as of earlier versions
    ("optimizer.pt", Path.unlink, "is missing", "is missing"),
    ("optimizer.pt", empty, "has 0 of", "is cut off"),
    ("optimizer.pt", flip, "has other bytes than were written", None),
    ("scheduler.pt", Path.unlink, "is missing", "is missing"),
    ("rng_state.pth", cut, FEWER, "is cut off"),
    ("data_position_0.json", cut, FEWER, "is cut off"),
    ("adapter_model.safetensors", cut, FEWER, "is cut off"),
    ("adapter_model.safetensors", ruin, FEWER, "holds .* tensors that are not finite, such as base_model"),
    (STATE, cut, "is cut off", "is cut off"),
]


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize(("name", "damage", "with_manifest", "without"), FAULTS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    copied, name, damage, with_manifest, without, has_manifest
):
    told, cause = [], with_manifest if has_manifest else without
    if not has_manifest:
        for checkpoint in copied.glob("checkpoint-*"):
            (checkpoint / MANIFEST).unlink()
    assert find_checkpoint(copied, True, told.append) == str(copied / "checkpoint-6") and not told
    damage(copied / "checkpoint-6" / name)
    if cause is None:
        assert find_checkpoint(copied, True) == str(copied / "checkpoint-6")
        return
    before = sorted(copied.rglob("*"))
    assert find_checkpoint(copied, True, told.append) == str(copied / "checkpoint-3")
    stem = name.split(".")[0]
    assert len(told) == 1 and "checkpoint-6: " + stem in told[0] and told[0].endswith("Going on from checkpoint-3.")
    assert re.search(cause, told[0])
    damage(copied / "checkpoint-3" / name)
    with pytest.raises(ValueError, match=f"no checkpoint to resume from .*checkpoint-6: {stem}.*checkpoint-3: {stem}"):
        find_checkpoint(copied, True)
    assert sorted(copied.rglob("*")) == [path for path in before if path.exists()]


def test_a_damaged_final_is_named_when_it_is_loaded(copied):
    assert (copied / "final" / MANIFEST).exists()
    load_adapter(copied)
    flip(copied / "final" / "adapter_model.safetensors")
    for load in (load_adapter, load_model, merge_run):
        for given in (copied, read_info(copied)):  # as Python gives it, and as the command line does
            with pytest.raises(ValueError, match="final: adapter_model.safetensors has other bytes than were written"):
                load(given)


def test_a_run_goes_on_exactly_from_the_checkpoint_before(recipe, whole, copied):
    shutil.rmtree(copied / "final")
    (copied / "checkpoint-6" / "optimizer.pt").unlink()
    with (copied / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a full disk
    console = printed()
    run(recipe(save_steps=3), copied, resume=True, console=console)
    assert losses(copied) == losses(whole) and (copied / "final").exists()
    assert (copied / "unused-checkpoint-6").exists() and find_checkpoint(copied, True) == str(copied / "checkpoint-6")
    text = console.export_text()
    assert "checkpoint-6: optimizer.pt is missing. Going on from checkpoint-3" in text
    assert "kept under another name: unused-checkpoint-6" in text and "Changed since" not in text


def test_a_line_that_is_no_json_is_named(copied):
    (copied / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2 is no JSON"):
        read_lines(copied / "log.jsonl")


def test_what_changes_on_resume_is_used_and_told_or_refused(recipe, copied):
    changed = {"learning_rate": 1e-3, "weight_decay": 0.1, "save_steps": 1, "max_steps": 8}
    console, rates = printed(), Rates()
    trainer = run(recipe(**changed), copied, resume=True, console=console, callbacks=[rates])
    assert rates.found.keys() == {6, 7} and {*rates.found[6].values(), *rates.found[7].values()} == {1e-3}
    assert 0.1 in {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert (copied / "checkpoint-7").exists()
    text = console.export_text()
    assert "training.learning_rate was 0.005, is 0.001" in text and "training.save_steps was 3, is 1" in text
    assert load_recipe(copied / "recipe.yaml").training["learning_rate"] == 1e-3
    with pytest.raises(ValueError, match="training.optim was None, is sgd"):
        run(recipe(**changed | {"optim": "sgd", "max_steps": 9}), copied, resume=True)
    for key, value in (("summary", True), ("weight", 0.0), ("pairs", "last")):
        other = recipe(**changed | {"max_steps": 9})
        setattr(other.teacher, key, value)
        other.teacher.distill_only_steps = 0
        with pytest.raises(ValueError, match=f"teacher.{key} was .*optimizer's state .* is of another kind"):
            run(other, copied, resume=True)
    assert "optim" not in load_recipe(copied / "recipe.yaml").training


def test_two_runs_in_one_directory_are_refused_and_a_dead_one_s_lock_is_not(recipe, tmp_path):
    folder = tmp_path / "run"
    take_lock(folder)
    owner = f"^Process {os.getpid()} on {socket.gethostname()} is training in .*--out"
    with pytest.raises(ValueError, match=owner) as error:
        run(recipe(), folder)
    assert "\n" not in str(error.value) and [path.name for path in folder.iterdir()] == [LOCK_FILE]
    lock = json.loads((folder / LOCK_FILE).read_text())
    for gone in ({"pid": 2**22 + 1}, {"begun": "1"}):  # no such process; the number's process is another
        (folder / LOCK_FILE).write_text(json.dumps(lock | gone))
        take_lock(folder)
        assert json.loads((folder / LOCK_FILE).read_text()) == lock
    (folder / LOCK_FILE).write_text(json.dumps(lock | {"host": "elsewhere", "pid": 2**22 + 1}))
    with pytest.raises(ValueError, match="on elsewhere is training"):
        take_lock(folder)
    (folder / LOCK_FILE).write_text("")
    run(recipe(max_steps=1), folder)
    assert not (folder / LOCK_FILE).exists()


def test_nothing_is_deleted_that_the_run_did_not_write(recipe, copied):
    (copied / "checkpoint-6" / STATE).unlink()
    (copied / "checkpoint-6" / STATE).mkdir()  # cannot be read
    shutil.copytree(copied / "checkpoint-3", copied / "checkpoint-3-mine")
    with pytest.raises(ValueError, match="already holds a run"):
        run(recipe(), copied)
    console = printed()
    run(recipe(save_steps=1, save_total_limit=1), copied, resume=True, console=console)
    assert "checkpoint-6: trainer_state.json cannot be read" in console.export_text()
    names = {path.name for path in copied.glob("*checkpoint-*")}
    assert names == {"checkpoint-3-mine", "unused-checkpoint-6", "checkpoint-6"}


class NoPosition(TrainerCallback):
    """A process that cannot write where it stands in the data, as on a full disk."""

    def on_train_begin(self, args, state, control, **kwargs):
        def fail(self):
            raise OSError("No space left on device")

        if args.process_index == 1:
            PackedSequences.state_dict = fail


def test_a_checkpoint_that_one_of_two_processes_did_not_write_is_not_finished(two_sources, tmp_path):
    with pytest.raises(ProcessRaisedException):
        train_ranks(2, two_sources, tmp_path / "run", ["training.max_steps=3"], callbacks=[NoPosition()])
    names = {path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir()}
    assert "data_position_0.json" in names and not names & {"data_position_1.json", MANIFEST, STATE}
    with pytest.raises(ValueError, match="checkpoint-3: it was not finished"):
        find_checkpoint(tmp_path / "run", True)
