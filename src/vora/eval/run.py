"""`vora eval`: data and a model to a JSON file of metrics with intervals."""

import hashlib
import json
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vora.checkpoint.card import read_card
from vora.data.answers import tasks_of
from vora.eval.metrics.intervals import in_words
from vora.eval.prediction_cache import PredictionCache, fingerprint, fingerprints, model_fingerprint
from vora.eval.rows import Rows, SkippedRows
from vora.eval.scoring.predict import predict
from vora.eval.tasks.captions import Captions
from vora.eval.tasks.classify import Classify
from vora.eval.tasks.statements import Statements
from vora.eval.tasks.vqa import Vqa

TASKS = {task.name: task for task in (Captions, Vqa, Classify, Statements)}
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "pillow", "numpy")


def task_of(rows):
    """The name of the task that data is for, by the columns of its first readable row.

    Args:
        rows: `Rows`.

    Raises:
        ValueError: it is for several, or for none.
    """
    for row in rows.read(SkippedRows()):
        found = tasks_of(row.values)
        if len(found) == 1:
            return found[0]
        what = f"may be of {' or '.join(found)}" if found else "fit no task"
        raise ValueError(f"The columns {', '.join(sorted(row.values))} {what}: say which with --of.")
    raise ValueError(f"No row of {rows} can be read.")


def make_task(name, **options):
    """A task by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}: choose among {', '.join([*TASKS, 'probe', 'text'])}.")
    return TASKS[name](**options)


def evaluate(model, processor, task, paths, out, console, *, model_name, rows_options=None, settings=None):
    """Ask a model all examples of some files, score its answers, write a report.

    Args:
        task: a `Task`.
        paths: files, folders or datasets, as `load_source` takes them.
        out: JSON file of the report. The predictions go beside it as they come, to `.predictions.jsonl`; a run that
            finds some of its own goes on after them.
        model_name: folder or hub id that the model came from, for the report and to tell models apart.
        rows_options: for `Rows`.
        settings: {name: value} of what else the answers depend on, such as `max_image_tokens`.

    Returns:
        What the report holds.

    Raises:
        ValueError: the data holds no example, or the predictions found are not of this model, data and task.
    """
    start, out, bad = time.monotonic(), Path(out), SkippedRows()
    rows = Rows(paths, **(rows_options or {}))
    examples = examples_of(task, rows, bad)
    settings = {**(rows_options or {}), **(settings or {})}
    conditions = conditions_of(task, examples, model, processor, model_name, rows, settings)
    cache = open_cache(out.with_suffix(".predictions.jsonl"), conditions, len(examples), model, console)
    kept, lines = answered(model, processor, task, examples, cache, bad, console)
    if task.by_image:  # a set may have a row for each question about one image
        kept = [replace(example, group=line.get("image", example.group)) for example, line in zip(kept, lines)]
    scores = task.score(kept, lines)
    metrics = task.metrics(kept, scores)
    cache.rewrite([line | {"scores": score} for line, score in zip(lines, scores)]
                   + [line for line in cache.done.values() if "bad" in line])  # fmt: skip
    found = {"num_examples": len(kept), "metrics": metrics}
    return write_report(out, found, conditions, model, model_name, rows.files, bad, cache, start)


def examples_of(task, rows, bad):
    """A task's examples.

    Raises:
        ValueError: there is none.
    """
    examples = task.examples(rows, bad)
    if not examples:
        raise ValueError(f"{rows} holds no example of the task {task.name}.{bad.first()}")
    return examples


def conditions_of(task, examples, model, processor, model_name, rows, settings):
    """All that predictions depend on, for the `PredictionCache` and the report."""
    return {
        "task": task.name,
        "model": model_fingerprint(model_name),
        "data": fingerprints(rows.files),
        "settings": {
            "prompt": task.prompt,
            "max_new_tokens": task.max_new_tokens,
            "num_beams": task.num_beams,
            "candidates": _candidates_digest(examples),
            "asked": _hash([(example.prompt, example.references) for example in examples]),
            "max_examples": task.max_examples,
            "seed": task.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "min_image_tokens": processor.image_processor.min_image_tokens,
            "max_image_tokens": processor.image_processor.max_image_tokens,
            **settings,
        },
        "num_examples": len(examples),
    }


def open_cache(file, conditions, count, model, console):
    """The `PredictionCache` of a run that will have `count` lines; says where it goes on."""
    cache = PredictionCache(file, conditions, f"{commit_in_words(commit())} on {device_of(model)}")
    if cache.num_found:
        console.print(f"Going on after {cache.num_found:,} of {count:,} examples in {cache.file}")
    return cache


def write_report(out, found, conditions, model, model_name, files, bad, cache, start):
    """Write what was found, and all that it depends on.

    Args:
        found: `num_examples`, `metrics`, and whatever else a task has to say.
        start: `time.monotonic()` when it began.
    """
    report = {
        "task": conditions["task"],
        "num_bad": bad.count,
        **found,
        "model": str(model_name),
        **commit(),
        "predicted_at": cache.states,
        "recipe": recipe_of(model_name),
        "seed": conditions["settings"]["seed"],
        "settings": conditions["settings"],
        "data": [{"file": str(file), "fingerprint": fingerprint(file)} for file in files],
        "bad": bad.named,
        "predictions": cache.file.name,
        "num_resumed": cache.num_found,
        "seconds": round(time.monotonic() - start + cache.seconds, 2),
        "vora_version": sys.modules["vora"].__version__,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "device": device_of(model),
        "model_fingerprint": conditions["model"],
    }
    Path(out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


@contextmanager
def progress(console, name, total, completed=0):
    """Yields what is called with the number of examples done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task(name, total=total, completed=completed)
        yield lambda count: bar.advance(shown, count)


def answered(model, processor, task, examples, cache, bad, console):
    """A model's answers to examples, from a ledger as far as it has them, with a progress bar.

    Returns:
        (the examples that could be asked, their lines); the others are added to `bad`.

    Raises:
        ValueError: none could be asked.
    """
    with progress(console, task.name, len(examples), len(cache.done)) as advance:
        predict(model, processor, task, examples, cache, advance)
    kept, lines = [], []
    for index, example in enumerate(examples):
        line = cache.done[index]
        if "bad" in line:
            bad.add(line["name"], line["bad"])
        else:
            kept.append(example)
            lines.append(line)
    if not kept:
        raise ValueError(f"None of {len(examples)} examples could be asked.{bad.first()}")
    return kept, lines


def _candidates_digest(examples):
    """How many answers examples may be chosen from, and a hash of these."""
    known = dict.fromkeys(example.candidates for example in examples)
    return {"most": max(map(len, known)), "hash": _hash(list(known))}


def _hash(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def metrics_table(report):
    """A table of what a report says."""
    table = Table(title=f"{report['task']}: {report['num_examples']:,} examples, {report['num_bad']:,} bad")
    for name in ("metric", "value", "95 % interval"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, found in report["metrics"].items():
        shown = "-" if found["value"] is None else f"{found['value']:.4f}"
        table.add_row(name, shown, in_words(found["interval"]))
    if len(states := report["predicted_at"]) > 1:
        table.caption = f"Warning: predictions come from {len(states)} states of code and device: {'; '.join(states)}."
    return table


def commit():
    """The git commit that this code is of and whether it was changed since; None where it has no history."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # another project's history around it is not its own
        changed = bool(git("status", "--porcelain", "--untracked-files=no", ".").strip())
        return {"commit": git("rev-parse", "HEAD").strip(), "commit_is_changed": changed}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "commit_is_changed": None}


def commit_in_words(facts):
    """What `commit` says, in words."""
    return f"{(facts['commit'] or 'unknown')[:12]}{' with changes' if facts['commit_is_changed'] else ''}"


def device_of(model):
    """The device that a model is on, by name."""
    return torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"


def check_overwrites_nothing(out, *beside):
    """Raise if what is to be written is there and holds something, and no run of ours wrote it.

    Args:
        out: JSON file of the report.
        beside: endings of further files of its name, such as `.png`.

    Raises:
        ValueError: names the file.
    """
    out = Path(out)
    if out.with_suffix(".predictions.jsonl").exists() or _is_report(out):
        return
    for file in (out, *map(out.with_suffix, beside)):
        if file.exists() and file.stat().st_size:
            raise ValueError(f"{file} is there and no report's: choose another -o, so that it is not overwritten.")


def _is_report(file):
    try:
        return "vora_version" in json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return False


def recipe_of(model_name):
    """The recipes of a model's stages, as its card has them, the last one last; None where it has none."""
    stages = (read_card(model_name) or {}).get("stages", [])
    return [stage["recipe"] for stage in stages if stage.get("recipe")] or None


def _version(library):
    try:
        return version(library)
    except PackageNotFoundError:
        return None
