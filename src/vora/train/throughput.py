"""How fast this machine is: which precision suits it, and how many steps fit a time budget."""

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from vora.data.stream import PackedSequences
from vora.distill.objective import Objective
from vora.train.plan.device import matmul_flops

NUM_WARMING, NUM_TIMED = 2, 6
FEWEST_STEPS = 20
MARGIN = 1.1  # logging, and the ups and downs of a shared machine


class TooLittleTime(ValueError):
    """Not even a few steps fit `max_minutes`; `minutes` would do."""

    def __init__(self, message: str, minutes: float) -> None:
        super().__init__(message)
        self.minutes = minutes


def precision_overrides() -> dict[str, Any]:
    """The recipe's values for the precision that suits this machine: {dotted key: value}."""
    if torch.cuda.is_available():
        return {"model.dtype": "bfloat16", "training.bf16": True}
    dtype = cpu_dtype()
    # TrainingArguments takes bf16 without an accelerator only where the processor is asked for by name
    return {"model.dtype": dtype, "training.bf16": dtype == "bfloat16", "training.use_cpu": dtype == "bfloat16"}


def cpu_dtype() -> str:
    """bfloat16 where this processor multiplies it clearly faster than float32, else float32."""
    gain = matmul_flops("cpu", torch.bfloat16) / matmul_flops("cpu", torch.float32)
    return "bfloat16" if gain > 1.4 else "float32"


def seconds_per_step(
    objective: Objective, sequences: PackedSequences, iterator: Iterator, arguments: TrainingArguments
) -> float:
    """Median time of an optimizer step from reading (`iterator`) to updating; neither weights nor running means
    change."""
    device = arguments.device
    objective.to(device).train()  # models come in eval mode, in which no block is recomputed or compiled
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)  # all the work, to no effect
    if objective.distillation is not None:
        objective.distillation.eval()  # its means stay; the rest trains, or no block would be recomputed or compiled
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    times = []
    for _ in range(NUM_WARMING + NUM_TIMED):
        wait(device)
        start = time.perf_counter()
        for _ in range(arguments.gradient_accumulation_steps):
            read = sequences.collate([next(iterator) for _ in range(arguments.per_device_train_batch_size)])
            batch: Any = {name: one.to(device) if hasattr(one, "to") else one for name, one in read.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
                loss = objective(**batch)["loss"]
            loss.backward()
        nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        times.append(time.perf_counter() - start)
    objective.train()
    return median(times[NUM_WARMING:])


def steps_that_fit(
    objective: Objective, sequences: PackedSequences, arguments: TrainingArguments, minutes: float,
    num_distill_only: int,
) -> int:  # fmt: skip
    """How many optimizer steps of a recipe fit so many minutes from here on, these measurements included, at most
    `max_steps`; TooLittleTime where not even twenty do after those that only distill. Each kind of steps is tried on
    an iterator of its own, so that the order of the data is untouched."""
    start = time.perf_counter()
    whole = MARGIN * seconds_per_step(objective, sequences, sequences.training_sequences(), arguments)
    distill_only = 0.0
    if num_distill_only:
        distill_only = MARGIN * seconds_per_step(objective, sequences, sequences.distill_sequences(), arguments)
    left_for_all = 60 * minutes - (time.perf_counter() - start)
    left = left_for_all - num_distill_only * distill_only
    steps = int(left / whole)
    if steps < FEWEST_STEPS:
        missing = num_distill_only * distill_only + FEWEST_STEPS * whole - left_for_all
        raise TooLittleTime(
            f"Only {max(steps, 0)} steps of {whole:.1f} s fit {minutes:g} minutes on this machine, after "
            f"{num_distill_only} of {distill_only:.1f} s that only distill: raise max_minutes, or lower "
            "data.sequence_length or teacher.distill_only_steps.",
            minutes + missing / 60,
        )
    return min(arguments.max_steps, num_distill_only + steps)
