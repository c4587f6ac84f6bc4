"""How many heaps a server's threads have."""

import ctypes
import os
import sys
from contextlib import suppress

M_ARENA_MAX = -8  # of mallopt, in glibc's malloc.h
NUM_HEAPS = 2


def share_heaps() -> None:
    """Let all threads to come have two heaps between them. By default glibc gives each its own, up to eight per core,
    and each keeps the most that its thread ever held: a server grew by 370 MB within minutes (dev/LOG.md). Of effect
    under glibc alone, and not where MALLOC_ARENA_MAX or GLIBC_TUNABLES say otherwise."""
    is_set = os.environ.get("MALLOC_ARENA_MAX") or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and not is_set:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, NUM_HEAPS)
