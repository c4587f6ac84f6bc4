"""A container's quota is what threads are counted by."""

import os

import pytest

from vora import cpu_threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "250000 100000"}, 2.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_threads.container_cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(
    ("quota", "given", "expected"),
    [(2.5, None, "2"), (0.5, None, "1"), (2.5, "7", "7"), (None, None, None), (64, None, None)],
)
def test_as_many_threads_as_processors_unless_the_user_sets_it(monkeypatch, quota, given, expected):
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_NUM_THREADS": given})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cpu_threads, "container_cpu_quota", lambda: quota)
    cpu_threads.configure_cpu_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected and os.environ["GOMP_SPINCOUNT"] == "20000"
