"""Generated hostile input is read or refused in a line: nothing crashes, hangs, starts a program or connects."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["images", "rows", "recipes", "messages"]


def generate(kind, count, seed):
    pytest.importorskip("resource")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/hostile.py", kind, str(count), str(seed)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "'refused'" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-1000:]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_is_read_or_refused(kind):
    generate(kind, 6, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_hostile_inputs_are_read_or_refused(kind):
    generate(kind, 10_000, seed=1)
