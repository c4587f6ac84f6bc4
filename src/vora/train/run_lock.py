"""One run at a time in a directory: RUN/run.lock names the process that writes there, and its machine."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from vora.train.from_recipe import of_first_process

LOCK_FILE = "run.lock"


@contextmanager
def run_lock(directory: Path, arguments: TrainingArguments) -> Iterator[None]:
    """Hold a run's directory, for all its processes; ValueError where another run does. A directory that is made for
    the lock goes with it if nothing else came into it."""
    is_new = not directory.exists()
    of_first_process(lambda: take_lock(directory), arguments)
    try:
        yield
    finally:
        if arguments.process_index == 0:
            (directory / LOCK_FILE).unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):
                    directory.rmdir()


def take_lock(directory: Path) -> None:
    """Write the lock, over one whose process is gone from this machine; ValueError where it may be running."""
    directory.mkdir(parents=True, exist_ok=True)
    file, mine = directory / LOCK_FILE, _owner()
    for _ in range(2):
        with suppress(FileExistsError), file.open("x") as opened:
            json.dump(mine, opened)
            return
        owner = _read(file)
        is_elsewhere = bool(owner) and owner["host"] != mine["host"]
        if is_elsewhere or (owner and owner["begun"] is not None and _begun(owner["pid"]) == owner["begun"]):
            raise ValueError(
                f"Process {owner['pid']} on {owner['host']} is training in {directory}: choose another --out, or "
                f"delete {file} if that process is gone."
            )
        file.unlink(missing_ok=True)
    raise ValueError(f"Another process has just begun to train in {directory}: choose another --out.")


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "begun": _begun(os.getpid())}


def _read(file: Path) -> dict[str, Any]:
    """Who holds a lock; nothing where it was not written to its end."""
    with suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return {}


def _begun(pid: int) -> str | None:
    """When a process of this machine began, for numbers come again; None where it is gone."""
    if not Path("/proc/self/stat").exists():  # no Linux
        with suppress(ProcessLookupError):
            with suppress(PermissionError):
                os.kill(pid, 0)
            return "at some time"
        return None
    with suppress(OSError):
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else others[18]
    return None
