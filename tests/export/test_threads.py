"""What llama.cpp finds of torch's threads."""

import subprocess
import sys

import pytest

COUNT = """
import os
import torch
from vora.export.runtimes import end_idle_threads

torch.set_num_threads(4)
total = torch.randn(1000, 1000).add(1).sum()
before = len(os.listdir("/proc/self/task"))
end_idle_threads()
print(before, len(os.listdir("/proc/self/task")))
torch.randn(1000, 1000).add(1).sum()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by /proc")
def test_torch_threads_end_and_may_start_again() -> None:
    """With idle threads of torch beside its own a token took llama.cpp twice as long."""
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before - after == 3
