"""How fast this machine is: which precision suits it, and how many steps fit a time budget."""

import time

import torch
from torch import nn

NUM_TIMED = 2


def precision_overrides():
    """The recipe's values for the precision that suits this machine: {dotted key: value}."""
    dtype = "bfloat16" if torch.cuda.is_available() else cpu_dtype()
    return {"model.dtype": dtype, "training.bf16": dtype == "bfloat16"}


def cpu_dtype():
    """bfloat16 where this processor multiplies it clearly faster than float32, else float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(512, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
        nn.functional.linear(left, right)
        start = time.perf_counter()
        for _ in range(5):
            nn.functional.linear(left, right)
        seconds[dtype] = time.perf_counter() - start
    return "bfloat16" if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else "float32"


def seconds_per_step(learner, batch, autocast):
    """Time of one forward and backward on a batch; neither weights nor running means change."""
    learner.eval()
    seconds = []
    for _ in range(1 + NUM_TIMED):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            learner(**batch)["loss"].backward()
        learner.zero_grad()
        seconds.append(time.perf_counter() - start)
    learner.train()
    return min(seconds[1:])


def steps_that_fit(learner, rows, arguments, minutes, num_image_only_steps):
    """How many optimizer steps of a recipe fit a time budget on this machine, at most `max_steps`.

    Args:
        rows: a `PackedRows`; a batch of each kind is taken from a fresh iterator, so its order is untouched.
        minutes: for everything from here to the last step, these measurements included.

    Raises:
        ValueError: not even twenty steps fit after those that only distill.
    """
    start = time.perf_counter()
    size = arguments.per_device_train_batch_size
    iterator = rows.packed(rows.samples(rows.questions_per_image))
    batch = rows.collate([next(iterator) for _ in range(size)])
    whole = seconds_per_step(learner, batch, arguments.bf16) * arguments.gradient_accumulation_steps
    image_only = 0.0
    if num_image_only_steps:
        batch["targets"] = torch.full_like(batch["targets"], -100)  # same tokens, paired blocks only
        image_only = seconds_per_step(learner, batch, arguments.bf16) * arguments.gradient_accumulation_steps
    left = 60 * minutes - (time.perf_counter() - start) - num_image_only_steps * image_only
    steps = int(left / (1.08 * whole))  # optimizer, data and logging take some 8 %
    if steps < 20:
        raise ValueError(
            f"Only {max(steps, 0)} steps of {whole:.1f} s fit {minutes:g} minutes on this machine: "
            "raise max_minutes, or lower data.row_tokens."
        )
    return min(arguments.max_steps, num_image_only_steps + steps)
