"""`vora data`: a recipe's mixture, read as training will read it."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModel

from vora.build.hub import remote_code
from vora.data.few_answers import few_answers
from vora.data.guess import line_to_paste
from vora.data.page import SOURCE_COLUMNS, column_rows, filling, source_rows, write_page
from vora.data.stats import dataset_statistics, write_summary
from vora.data.stream import PackedSequences
from vora.distill.teacher import Teacher, normalisation_of
from vora.model.processing_vora import VoraProcessor
from vora.train.from_recipe import open_sources, packed_sequences, training_arguments, with_sequence_length
from vora.train.plan.meta_model import vit_config_of
from vora.train.recipe_sections import DataSection, Recipe
from vora.train.stages import build_processor, check_student_name

NUM_CAUSES = 3  # the commonest, said in the terminal


def preview(
    recipe: Recipe, out: Path, num_shown: int, max_samples: int | None, num_workers: int, console: Console
) -> dict[str, Any]:
    """Leave summary.json, samples.html (of `num_shown` samples) and bad_samples.jsonl in a folder; return the summary.
    Of each source at most `max_samples` rows are read; a ValueError where one holds nothing usable."""
    if out.is_dir() and any(out.iterdir()) and not (out / "summary.json").exists():
        raise ValueError(f"{out} is not empty and no report's: choose another --out, so that nothing is overwritten.")
    sequences, processor = sequences_to_read(recipe, max_samples)
    columns = (TextColumn("reading"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, sequences.maker.sources)))
        summary, bad = dataset_statistics(
            sequences, source_names(recipe.data), num_workers, lambda count: bar.advance(task, count)
        )
    write_summary(summary, bad, out)
    shown = list(islice(sequences.named_samples(), min(num_shown, summary["num_samples"])))
    write_page(out / "samples.html", summary, bad, shown, processor)
    console.print(table_of(summary))
    print_columns(summary, console)
    for cause, count in Counter(one["cause"] for one in bad).most_common(NUM_CAUSES):
        console.print(f"{count:,} bad: {cause}", highlight=False, markup=False)
    if summary["num_bad"] > recipe.data.max_bad_share * (summary["num_samples"] + summary["num_bad"]):
        console.print(f"[bold red]A run would stop:[/bold red] more than {recipe.data.max_bad_share:.0%} are bad.")
    if warning := few_answers(sequences.maker.sources):
        console.print(f"Warning: {warning}", highlight=False, markup=False)
    console.print(f"Look at {out / 'samples.html'}; every bad sample is in {out / 'bad_samples.jsonl'}.")
    return summary


def sequences_to_read(recipe: Recipe, max_samples: int | None) -> tuple[PackedSequences, VoraProcessor]:
    """The sequences of a recipe's data, of at most so many rows of each source, and the processor, without a run."""
    recipe = recipe.model_copy(deep=True)
    for source in recipe.data.sources:
        limits = [limit for limit in (source.max_samples, max_samples) if limit is not None]
        source.max_samples = min(limits, default=None)
    sources = open_sources(recipe.data)
    check_student_name(recipe)
    processor = build_processor(recipe, vit_without_weights(recipe))
    recipe.training = {"max_steps": 1, "use_cpu": True, "seed": recipe.training.get("seed", 42)}
    arguments = training_arguments(recipe, ".")
    recipe = with_sequence_length(recipe, sources, processor, arguments)
    return packed_sequences(recipe, sources, processor, arguments), processor


def vit_without_weights(recipe: Recipe) -> Teacher | None:
    """The ViT that a recipe names, on the meta device: its patches and its normalisation are all that data needs."""
    name = recipe.model.encoder or (recipe.teacher.name if recipe.teacher else None)
    if name is None:
        return None
    config = vit_config_of(name, "model.encoder" if recipe.model.encoder else "teacher.name")
    with torch.device("meta"):
        vit = AutoModel.from_config(config, **remote_code())
        return Teacher(vit, **normalisation_of(name))


def source_names(data: DataSection) -> list[str]:
    """A name for each source: its path, and its split or number where paths alone are the same."""
    paths = [source.path for source in data.sources]
    with_splits = [f"{source.path} ({source.split})" for source in data.sources]
    numbered = [f"{number}: {name}" for number, name in enumerate(with_splits)]
    return next(names for names in (paths, with_splits, numbered) if len(set(names)) == len(names))


def table_of(summary: dict[str, Any]) -> Table:
    """The summary as a table for the terminal."""
    table = Table(title=f"{summary['num_samples']:,} samples, {summary['num_bad']:,} bad")
    table.add_column(SOURCE_COLUMNS[0], overflow="fold")
    for name in SOURCE_COLUMNS[1:]:  # a long name over two lines, so that sources have room in 80 columns
        table.add_column(name, justify="right", overflow="fold", max_width=9)
    for row in source_rows(summary):
        table.add_row(*row)
    table.caption = f"{filling(summary)}; {summary['samples_per_second']:,.0f} samples read per second"
    return table


def print_columns(summary: dict[str, Any], console: Console) -> None:
    """What each source's columns are taken for, and of guessed ones the line that says it otherwise."""
    for number, (name, read, unread) in enumerate(column_rows(summary)):
        console.print(f"{name}: {read}; not read: {unread}", highlight=False, markup=False)
        one = summary["sources"][number]
        if one["guessed_columns"]:
            said = line_to_paste({ours: one["columns"][ours] for ours in one["guessed_columns"]})
            text = f"  If that is wrong, correct and add: data.sources.{number}.columns='{said}'"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
