"""`vora eval`: data and a model to a JSON file of metrics with intervals."""

import hashlib
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vora.adapt.card import read_card
from vora.eval.ledger import Ledger, fingerprint, model_fingerprint
from vora.eval.predict import predict
from vora.eval.presence import Presence
from vora.eval.rows import Bad, Rows
from vora.eval.tasks import Captions, Classify, Statements, Vqa

TASKS = {task.name: task for task in (Captions, Vqa, Classify, Statements, Presence)}
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "pillow", "numpy")


def make_task(name, **options):
    """A task by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}: choose among {', '.join(TASKS)}.")
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
    start, out, bad = time.monotonic(), Path(out), Bad()
    rows = Rows(paths, **(rows_options or {}))
    examples = task.examples(rows, bad)
    if not examples:
        cause = (
            f" The first of {bad.count} bad rows, {bad.named[0]['name']}: {bad.named[0]['cause']}" if bad.count else ""
        )
        raise ValueError(f"{', '.join(map(str, paths))} holds no example of the task {task.name}.{cause}")
    conditions = {
        "task": task.name,
        "model": model_fingerprint(model_name),
        "data": {Path(file).name: fingerprint(file) for file in rows.files},
        "settings": {
            "prompt": task.prompt,
            "max_new_tokens": task.max_new_tokens,
            "candidates": _told_apart(examples),
            "max_examples": task.max_examples,
            "seed": task.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "min_image_tokens": processor.image_processor.min_image_tokens,
            "max_image_tokens": processor.image_processor.max_image_tokens,
            **(rows_options or {}),
            **(settings or {}),
        },
        "num_examples": len(examples),
    }
    ledger = Ledger(out.with_suffix(".predictions.jsonl"), conditions)
    if ledger.num_found:
        console.print(f"Going on after {ledger.num_found:,} of {len(examples):,} examples in {ledger.file}")
    earlier = ledger.seconds
    kept, lines = answered(model, processor, task, examples, ledger, bad, console)
    scores = task.score(kept, lines)
    metrics = task.metrics(kept, scores)
    ledger.rewrite([line | {"scores": score} for line, score in zip(lines, scores)]
                   + [line for line in ledger.done.values() if "bad" in line])  # fmt: skip
    report = {
        "task": task.name,
        "num_examples": len(kept),
        "num_bad": bad.count,
        "metrics": metrics,
        "model": str(model_name),
        **commit(),
        "recipe": recipe_of(model_name),
        "seed": task.seed,
        "settings": conditions["settings"],
        "data": [{"file": str(file), "fingerprint": fingerprint(file)} for file in rows.files],
        "bad": bad.named,
        "predictions": ledger.file.name,
        "num_resumed": ledger.num_found,
        "seconds": round(time.monotonic() - start + earlier, 2),
        "vora_version": sys.modules["vora"].__version__,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "model_fingerprint": conditions["model"],
    }
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def answered(model, processor, task, examples, ledger, bad, console):
    """A model's answers to examples, from a ledger as far as it has them, with a progress bar.

    Returns:
        (the examples that could be asked, their lines); the others are added to `bad`.

    Raises:
        ValueError: none could be asked.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task(task.name, total=len(examples), completed=len(ledger.done))
        predict(model, processor, task, examples, ledger, lambda count: bar.advance(shown, count))
    kept, lines = [], []
    for index, example in enumerate(examples):
        line = ledger.done[index]
        if "bad" in line:
            bad.add(line["name"], line["bad"])
        else:
            kept.append(example)
            lines.append(line)
    if not kept:
        raise ValueError(f"None of {len(examples)} examples could be asked. The first: {bad.named[0]['cause']}")
    return kept, lines


def _told_apart(examples):
    """How many answers examples may be chosen from, and a hash of these."""
    known = dict.fromkeys(example.candidates for example in examples)
    return {"most": max(map(len, known)), "hash": hashlib.sha256(repr(list(known)).encode()).hexdigest()[:16]}


def metrics_table(report):
    """A table of what a report says."""
    table = Table(title=f"{report['task']}: {report['num_examples']:,} examples, {report['num_bad']:,} bad")
    for name in ("metric", "value", "95 % interval"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, found in report["metrics"].items():
        low, high = found["interval"]
        shown = ["-" if found["value"] is None else f"{found['value']:.4f}"]
        table.add_row(name, *shown, "-" if low is None else f"{low:.4f} to {high:.4f}")
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


def recipe_of(model_name):
    """The recipes of a model's stages, as its card has them, the last one last; None where it has none."""
    stages = (read_card(model_name) or {}).get("stages", [])
    return [stage["recipe"] for stage in stages if stage.get("recipe")] or None


def _version(library):
    try:
        return version(library)
    except PackageNotFoundError:
        return None
