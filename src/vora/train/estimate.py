"""What a run will take, said before it starts: in one line, or with what it will read (`vora train --dry-run`)."""

import os
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vora.checkpoint.run_directory import find_checkpoint, last_step
from vora.data.page import token_runs
from vora.data.readers import check_is_there
from vora.data.stats import dataset_statistics
from vora.report.words import duration
from vora.train.from_recipe import (
    check_fsdp,
    check_one_gpu_per_process,
    check_recipe,
    check_sequence_length,
    training_arguments,
)
from vora.train.plan.device import device_at_hand, processor_at_hand
from vora.train.plan.meta_model import llm_config_of, meta_model, vit_config_of
from vora.train.plan.plan import plan
from vora.train.preview import sequences_to_read, source_names
from vora.train.recipe_sections import Recipe
from vora.train.schedule import check_schedule
from vora.train.sharding import check_sharding
from vora.train.stages import check_names, trainable_table
from vora.train.training_values import check_libraries

NUM_SHOWN, MOST_CONVERSATIONS = 2, 3  # samples of a dry run, and conversations of each
ROWS_READ = 50  # of each source, to find them in
WORDS = {"label": ("learned", "green"), "image": ("seen", "yellow")}  # of kinds of tokens, and their colours
LONG = 48 * 3600  # seconds after which a run is better thought over


def dry_run(recipe: Recipe, directory: Path, resume: bool, beside: Path, console: Console) -> None:
    """Print what trains, what it takes, and two samples as the model will read them; nothing is written. A ValueError
    where the run would not start, but for a run that is in its directory already, of which a warning is printed."""
    _check_startable(recipe, directory)
    try:
        done = _steps_done(directory, resume)
    except ValueError as error:
        done = 0
        console.print(f"Warning: {error}", highlight=False, markup=False)
    try:
        console.print(trainable_table(meta_model(recipe, beside)[0], recipe.stage))
    except ValueError as error:  # LLaVA's way, of which nothing is counted
        console.print(f"No table of what trains, and no estimate: {error}", highlight=False, markup=False)
    else:
        print_estimate(recipe, beside, console, done)
    print_samples(recipe, console)
    console.print(f"\nNothing was trained: without --dry-run it would be, into {directory}.", highlight=False)


def print_samples(recipe: Recipe, console: Console) -> None:
    """Print the first samples as the model will read them, what it learns of them apart. A ValueError where the first
    rows are all bad."""
    sequences, processor = sequences_to_read(recipe, ROWS_READ)
    summary, bad = dataset_statistics(sequences, source_names(recipe.data))
    if not summary["num_samples"]:
        raise ValueError(f"All of the first {len(bad)} samples are bad. The first: {bad[0]['cause']}")
    found = islice(sequences.named_samples(), min(NUM_SHOWN, summary["num_samples"]))
    for number, (name, sample) in enumerate(found, 1):
        console.print(f"\n[bold]Sample {number}[/bold]: {escape(name)}, {len(sample['input_ids'])} tokens")
        conversations = token_runs(sample, processor.tokenizer, processor.image_token_id)
        for kind, text in chain.from_iterable(conversations[:MOST_CONVERSATIONS]):
            word, color = WORDS.get(kind, ("given", "default"))
            console.print(f"  {word:8}[{color}]{escape(repr(text)[1:-1])}[/{color}]", highlight=False)
        if (more := len(conversations) - MOST_CONVERSATIONS) > 0:
            console.print(f"  and {more} conversations more", highlight=False)
    if bad:
        seen = summary["num_samples"] + len(bad)
        console.print(f"\n{len(bad)} of the first {seen} samples are bad: `vora data` names them.", highlight=False)


def check_start(recipe: Recipe, directory: Path, resume: bool) -> int:
    """Raise where a run would not start, as far as that is known before anything is loaded; return the steps that are
    done."""
    _check_startable(recipe, directory)
    return _steps_done(directory, resume)


def _check_startable(recipe: Recipe, directory: Path) -> None:
    check_recipe(recipe)
    for source in [*recipe.data.sources, *(recipe.data.validation.sources if recipe.data.validation else [])]:
        check_is_there(source.path, source.split)
    check_names(recipe)
    if recipe.model.llm is not None:
        check_sequence_length(recipe, llm_config_of(recipe.model.llm, "model.llm"))
    if recipe.teacher is not None:
        vit_config_of(recipe.teacher.name, "teacher.name")
    arguments = training_arguments(recipe, directory)
    check_schedule(recipe, arguments)
    check_libraries(arguments)
    check_one_gpu_per_process(arguments)
    check_sharding(arguments)
    check_fsdp(recipe, bool(arguments.fsdp))


def _steps_done(directory: Path, resume: bool) -> int:
    checkpoint = find_checkpoint(directory, resume)
    return 0 if checkpoint is None else last_step(checkpoint)


def print_estimate(recipe: Recipe, beside: Path, console: Console, num_done: int = 0) -> None:
    """Say in one line what a run will take from here on, in one process of it alone, and warn where that is days or
    does not fit."""
    if os.environ.get("RANK", "0") != "0":
        return
    bf16 = bool(recipe.training.get("bf16"))
    device = processor_at_hand(bf16) if recipe.training.get("use_cpu") else device_at_hand(bf16)
    num_devices = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        found = plan(recipe, device, num_devices, beside=beside)
    except Exception as error:  # whatever keeps it from counting keeps no run from training
        console.print(f"No estimate: {error}", highlight=False, markup=False)
        return
    validates = recipe.data.validation is not None and recipe.training.get("eval_strategy") not in ("no", False)
    for line in in_lines(found, num_done, validates):
        console.print(line, highlight=False, markup=False)


def in_lines(found: dict[str, Any], num_done: int = 0, validates: bool = False) -> list[str]:
    """What `plan` found as a line, and its warnings. It counts with an assumed share of the device's peak."""
    beside = "; validation takes its own time" if validates else ""
    left = max(0, found["steps"] - num_done)
    seconds = 3600 * found["hours"] * left / found["steps"]
    memory, has = found["memory_bytes"]["total"] / 1e9, found["device_memory_bytes"] / 1e9
    where = f"{found['num_devices']} x {found['device']}"
    lines = [
        f"Estimate: {duration(seconds)} for {left:,} steps of {found['rows_per_step']:,} "
        f"sequences (some {found['samples_per_step']:,.0f} samples a step) on {where}, {memory:,.1f} of {has:,.0f} "
        f"GB of memory{beside}. Other work of the machine makes it longer."
    ]
    if seconds >= LONG:
        lines.append(
            f"Warning: that is {duration(seconds)}. `vora plan` says what bounds it; fewer training.max_steps, a "
            "smaller LLM or a GPU take less."
        )
    if not found["fits"]:
        lines.append(
            "Warning: that memory is not there: lower training.per_device_train_batch_size or data.sequence_length, "
            "or set training.gradient_checkpointing=true."
        )
    return lines
