"""A stopped run goes on exactly, and no run is overwritten."""

import os
import shutil
import signal

import pytest
from runs import losses, run
from transformers import TrainerCallback

from vora.checkpoint.layout import read_info
from vora.checkpoint.lineage import read_card
from vora.train.recipe import load_recipe


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
