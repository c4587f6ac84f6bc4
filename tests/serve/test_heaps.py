"""Threads of a server share heaps."""

import os
import re
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, threading
from vora.serve.heaps import share_heaps
share_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
together = threading.Barrier(12)
def hold():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=hold) for _ in range(12)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc.malloc_stats()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
@pytest.mark.parametrize(("given", "most"), [({}, 2), ({"MALLOC_ARENA_MAX": "5"}, 5)])
def test_threads_have_two_heaps_between_them_or_as_many_as_the_user_says(given, most):
    env = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | given
    said = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True).stderr
    heaps = set(re.findall(r"^Arena (\d+):", said, re.M))
    if not heaps:
        pytest.skip("another malloc than glibc's")
    assert 2 <= len(heaps) <= most and (not given or len(heaps) > 2)
