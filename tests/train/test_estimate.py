"""What is said before a run: an estimate, its warnings, and a dry run's samples."""

import pytest

from vora.report.words import duration
from vora.train.estimate import in_lines
from vora.train.plan.plan import batch_in_words

FOUND = {
    "hours": 10.0, "steps": 100, "rows_per_step": 8, "samples_per_step": 20.0, "num_devices": 1, "device": "cpu",
    "memory_bytes": {"total": 3e9}, "device_memory_bytes": 16e9, "fits": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40, "40 seconds"), (720, "12 minutes"), (5.3 * 3600, "5.3 hours"), (75 * 3600, "3.1 days")],
)
def test_times_are_said_in_the_unit_that_fits(seconds, words):
    assert duration(seconds) == words


def test_an_estimate_is_a_line_and_what_takes_days_or_does_not_fit_is_warned_of():
    (line,) = in_lines(FOUND)
    assert "10.0 hours for 100 steps of 8 sequences (some 20 samples a step) on 1 x cpu, 3.0 of 16 GB" in line
    assert "5.0 hours for 50 steps" in in_lines(FOUND, num_done=50)[0]
    assert "that is 3.1 days" in in_lines(FOUND | {"hours": 75})[1]
    assert "per_device_train_batch_size" in in_lines(FOUND | {"fits": False})[1]


def test_the_batch_of_one_and_of_several_processes_cannot_be_mixed_up():
    assert "one process a step learns from 2 packed sequences" in batch_in_words(2, 1)
    assert "32 processes a step learns from 64 packed sequences; in one it would be 2" in batch_in_words(2, 32)
