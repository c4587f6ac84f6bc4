"""Work of several processes for the tests, which do not import anything anew."""

import gc
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from tqdm import tqdm

# a fork has at once what a fresh process imports in seconds; where there is a GPU, autograd refuses to run in one
START = "spawn" if torch.cuda.is_available() else "fork"
tqdm.set_lock(threading.RLock())  # its own is shared with forks: one that is killed while it has it would keep it


def in_processes(num: int, folder: Path, work: Callable[..., None], *given: Any, **options: Any) -> None:
    """Have each of so many processes of one group do the work, which gets its rank first; they meet in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Path(mkdtemp(dir=folder)) / "store"
    start_processes(_as_rank, (num, store, work, given, options), nprocs=num, start_method=START)


def _as_rank(rank: int, num: int, store: Path, work: Callable[..., None], given: Any, options: Any) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in places.items()}
    group = {"rank": rank, "world_size": num, "timeout": timedelta(seconds=300)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **group)
    work(rank, *given, **options)
    gc.collect()  # DDP lets go of the group first: as its last owner it would wait for threads that wait for Python
    dist.barrier()
    dist.destroy_process_group()  # else a process that ends while its threads live may abort
