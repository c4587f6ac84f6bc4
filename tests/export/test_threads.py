"""What llama.cpp finds of torch's threads."""

import subprocess
import sys

import pytest

COUNT = """
import os, time
from pathlib import Path
import torch
from vora.export.runtimes import end_idle_threads

count = lambda: len(os.listdir("/proc/self/task"))
if "/libgomp.so.1" not in Path("/proc/self/maps").read_text():
    raise SystemExit("another OpenMP")
torch.set_num_threads(4)
torch.randn(1000, 1000).add(1)
before = count()
end_idle_threads()
end = time.monotonic() + 20
while count() > before - 3 and time.monotonic() < end:  # they end by themselves
    time.sleep(0.01)
ended = before - count()
torch.randn(1000, 1000).add(1)
print(ended, count() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_torch_threads_end_and_start_again() -> None:
    """With idle threads of torch beside its own a token took llama.cpp twice as long."""
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    if "another OpenMP" in found.stderr:
        pytest.skip("torch has another OpenMP than llama.cpp")
    assert found.stdout.split() == ["3", "0"], found.stderr
