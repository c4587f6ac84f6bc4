"""What a run shows while it trains: the step and the time left, however narrow the terminal is."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from vora.train.callbacks import ProgressCallback
from vora.train.from_recipe import training_arguments

LOGS = {
    "lm_loss": 1.234, "distill_loss": 0.567, "text_loss": 0.012, "samples_per_second": 12.3,
    "tokens_per_second": 4567.0, "data_wait_share": 0.01,
}  # fmt: skip


def test_a_file_gets_a_line_in_half_a_minute_though_nothing_is_logged(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 9.0 * state.global_step)
    monkeypatch.setattr("vora.train.callbacks.time", clock)
    console, state = Console(file=io.StringIO(), width=80), TrainerState(max_steps=24)
    progress = ProgressCallback(console, tmp_path / "log.jsonl", tmp_path / "v.jsonl")
    args, control = SimpleNamespace(logging_strategy="steps"), TrainerControl()
    progress.on_train_begin(args, state, control)
    for state.global_step in range(1, 12):
        progress.on_step_end(args, state, control)
    progress.stop()
    assert console.file.getvalue().splitlines() == ["step 4/24  3 minutes left", "step 8/24  2 minutes left"]


def test_a_short_run_logs_more_often(recipe):
    steps = {"logging_steps": None, "max_steps": 6}
    for change, expected in (({}, 1), ({"max_steps": 60}, 3), ({"max_steps": 900}, 10), ({"logging_steps": 7}, 7)):
        values = recipe()
        values.training = {key: value for key, value in (values.training | steps | change).items() if value}
        assert training_arguments(values, "out").logging_steps == expected


def test_the_time_left_is_of_steps_not_of_validation_and_saving(tmp_path, monkeypatch):
    seconds = 0.0
    monkeypatch.setattr("vora.train.callbacks.time", SimpleNamespace(monotonic=lambda: seconds))
    console, state = Console(file=io.StringIO(), width=80), TrainerState(max_steps=100)
    progress = ProgressCallback(console, tmp_path / "log.jsonl", tmp_path / "v.jsonl")
    args, control = SimpleNamespace(logging_strategy="steps"), TrainerControl()
    progress.on_train_begin(args, state, control)
    for state.global_step in range(1, 11):
        seconds += 2
        progress.on_step_end(args, state, control)
        if state.global_step % 5 == 0:
            seconds += 300
            progress.on_evaluate(args, state, control, {"eval_loss": 1.0})
            seconds += 60
            progress.on_save(args, state, control)
    progress.on_log(args, state, control, dict(LOGS))
    progress.stop()
    assert "step 10/100  3 minutes left  lm_loss 1.234" in console.file.getvalue()  # 90 steps of 2 seconds


def test_steps_that_only_distill_do_not_promise_the_pace_of_the_others(tmp_path, monkeypatch):
    seconds = 0.0
    monkeypatch.setattr("vora.train.callbacks.time", SimpleNamespace(monotonic=lambda: seconds))
    console, state = Console(file=io.StringIO(), width=80), TrainerState(max_steps=100)
    progress = ProgressCallback(console, tmp_path / "log.jsonl", tmp_path / "v.jsonl", distill_only_steps=20)
    args, control = SimpleNamespace(logging_strategy="steps"), TrainerControl()
    progress.on_train_begin(args, state, control)
    for state.global_step in range(1, 41):
        seconds += 2 if state.global_step <= 20 else 10
        progress.on_step_end(args, state, control)
        if state.global_step in (10, 40):
            progress.on_log(args, state, control, dict(LOGS))
    progress.stop()
    first, last = console.file.getvalue().splitlines()[0], console.file.getvalue().splitlines()[-1]
    assert first.startswith("step 10/100  over 3 minutes left") and last.startswith("step 40/100  10 minutes left")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_step_and_time_left_are_kept_at_80_columns_and_in_a_file(tmp_path, is_terminal):
    console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
    progress, state = (
        ProgressCallback(console, tmp_path / "log.jsonl", tmp_path / "v.jsonl"),
        TrainerState(max_steps=12_000),
    )
    args = SimpleNamespace(logging_strategy="steps")
    progress.on_train_begin(args, state, None)
    for state.global_step in (100, 345):
        progress.on_step_end(args, state, TrainerControl())
        progress.on_log(args, state, None, dict(LOGS))
    progress.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    lines = [line for line in shown if re.search(r"step +345/12000 +.* left +lm_loss 1.234", line)]
    assert lines, shown
    if is_terminal:
        assert max(map(len, shown)) <= 80
    else:
        assert lines[0].endswith("1% waiting for data")
