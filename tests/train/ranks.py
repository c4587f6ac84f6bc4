"""Runs of several processes for the tests, which do not import anything anew."""

import gc
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
from runs import run
from torch.multiprocessing import start_processes

from vora.train.recipe import load_recipe

# a fork has at once what a fresh process imports in seconds; where there is a GPU, autograd refuses to run in one
START = "spawn" if torch.cuda.is_available() else "fork"


def train_as(
    rank: int, num: int, store: Path, recipe: Path, folder: Path, overrides: Sequence[str],
    after: Callable | None = None, **options: Any,
) -> None:  # fmt: skip
    """As one of several processes: a run, and what is to be asked of it after."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ |= {name: str(value) for name, value in places.items()}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num, timeout=timedelta(seconds=300)
    )
    trainer = run(load_recipe(recipe, list(overrides)), folder, **options)
    if after is not None:
        after(trainer)
    del trainer
    gc.collect()  # DDP lets go of the group first: as its last owner it would wait for threads that wait for Python
    dist.barrier()
    dist.destroy_process_group()  # else a process that ends while its threads live may abort


def train_ranks(num: int, recipe: Path, folder: Path, overrides: Sequence[str] = (), **options: Any) -> None:
    """A run of so many processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    store = Path(mkdtemp(dir=folder.parent)) / "store"
    start_processes(
        partial(train_as, **options), (num, store, recipe, folder, overrides), nprocs=num, start_method=START
    )
