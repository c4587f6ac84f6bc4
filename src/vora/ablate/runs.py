"""One run of the grid: trained, measured, or taken up where it stood.

RUN/log.jsonl, recipe.yaml, final/, ...    of `vora.train.run.train`, without its checkpoints once it has ended
RUN/run.json                              written last: the run is whole; the commit that it was trained at
RUN/failed.json                            why it could not end; it is tried again by the next command
RUN/eval/NAME.json                         reports of `vora eval`, each beside its predictions
"""

import gc
import json
import shutil
from pathlib import Path

import torch
from transformers import TrainerCallback

from vora.checkpoint.load import merge_run
from vora.checkpoint.run_directory import newest_checkpoint
from vora.eval.probe.probe import probe
from vora.eval.rows import Rows
from vora.eval.run import commit, evaluate, make_task
from vora.eval.tasks.text import text_ability
from vora.eval.tasks.text_items import open_items
from vora.train.recipe import load_recipe
from vora.train.run import train

NO_OPTIONS = {"name", "task", "metrics", "of", "against", "generate", "base", "data"}  # of an `EvaluateSection`
TASK_OPTIONS = ("prompt", "labels", "max_examples", "seed")  # the others are of `Rows`


class EnoughSamples(TrainerCallback):
    """Ends a run at the first log line with so many samples seen, for equal steps are not equal samples where the
    sequences of variants hold other numbers of them."""

    def __init__(self, samples):
        self.samples = samples

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (logs or {}).get("samples_seen", 0) >= self.samples:
            control.should_save = control.should_training_stop = True


def is_finished(run):
    """Whether a run's training has ended."""
    return (run.folder / "run.json").exists()


def check_same(run, samples):
    """Raise if a run's folder holds a run of another recipe than the specification's, or one that ended at others of
    its `samples`; where a run does not say at which, as those of before, it is taken as it is.

    Raises:
        ValueError: names the keys that differ.
    """
    file = run.folder / "recipe.yaml"
    if not file.exists() or not (is_finished(run) or newest_checkpoint(run.folder)):
        return  # nothing would be lost
    there, wanted = _flat(load_recipe(file).model_dump(mode="json")), _flat(run.recipe.model_dump(mode="json"))
    differ = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if differ:
        told = "; ".join(f"{key} was {there.get(key)}, is {wanted.get(key)}" for key in differ[:4])
        raise ValueError(
            f"{run.folder} was run by another recipe ({len(differ)} keys differ: {told}): choose another --out, or "
            "delete that folder to run it anew."
        )
    facts = json.loads((run.folder / "run.json").read_text()) if is_finished(run) else {}
    if (ended_at := facts.get("samples", samples)) != samples:
        raise ValueError(
            f"{run.folder} was ended by samples: {ended_at}, and the specification says {samples}: choose another "
            "--out, or delete that folder to run it anew."
        )


def train_run(run, samples, console):
    """Train a run, from its newest checkpoint if it has one; nothing to do if it has ended.

    Raises:
        InterruptedError: a signal stopped the run; the next command goes on.
    """
    if not is_finished(run):
        resume = newest_checkpoint(run.folder) is not None
        unfinished = run.folder / "final" if resume else run.folder  # killed before run.json: it may not be whole
        shutil.rmtree(unfinished, ignore_errors=True)
        callbacks = [] if samples is None else [EnoughSamples(samples)]
        train(run.recipe, run.folder, resume, console, callbacks)
        facts = {"variant": run.variant, "seed": run.seed, "samples": samples, **commit()}
        write_whole(run.folder / "run.json", facts)
    for checkpoint in run.folder.glob("checkpoint-*"):  # final/ has what was learned; optimizers fill disks
        shutil.rmtree(checkpoint)


def measure_run(run, asked, beside, console):
    """Do those of a specification's measurements that have not been done yet.

    Args:
        asked: list of `EvaluateSection`.
        beside: folder that paths of data may start from.
    """
    todo = [one for one in asked if report_of(run, one) is None]
    if not todo:
        return
    model, processor = merge_run(run.folder)
    if torch.cuda.is_available():
        model = model.to("cuda")
    for one in todo:
        out, options = _report_file(run, one), one.model_dump(exclude=NO_OPTIONS)
        if not _was_asked_alike(out, one):
            for stale in out.parent.glob(f"{out.stem}.*"):
                stale.unlink()
        out.parent.mkdir(exist_ok=True)
        write_whole(_asked_file(out), one.model_dump(mode="json"))
        chosen = {key: options.pop(key) for key in TASK_OPTIONS}
        data = _data_of(run, one, beside)
        given = {"model_name": run.folder / "final", "rows_options": options}
        if one.task == "text":
            given |= {"base": base_of(run, one), "max_examples": chosen["max_examples"], "seed": chosen["seed"]}
            text_ability(model, processor, data, out, console, **given)
        elif one.task == "probe":
            task = make_task(one.of, **chosen)
            given |= {"against": one.against or ["other"], "generate": bool(one.generate)}
            probe(model, processor, task, data, out, console, **given)
        else:
            evaluate(model, processor, make_task(one.task, **chosen), data, out, console, **given)


def check_unread(runs, asked, beside):
    """Raise if data cannot be opened on which runs are to be measured yet.

    Raises:
        ValueError: names the measurement.
    """
    todo = [run for run in runs if report_of(run, asked) is None]
    options = asked.model_dump(exclude=NO_OPTIONS | set(TASK_OPTIONS))
    for data in dict.fromkeys(tuple(_data_of(run, asked, beside)) for run in todo):
        try:
            (open_items if asked.task == "text" else Rows)(data, **options)
        except ValueError as error:
            raise ValueError(f"evaluate's {asked.name or asked.task}: its data cannot be read: {error}") from None


def base_of(run, asked):
    """The LLM that a run's text is held against.

    Raises:
        ValueError: neither the measurement nor the run's recipe names one.
    """
    base = asked.base or run.recipe.model.llm
    if base is None:
        raise ValueError(f"{run.name}: the recipe goes on from model.vora; say evaluate's base, the LLM that text is "
                         "held against.")  # fmt: skip
    return base


def report_of(run, asked):
    """The report of a measurement, or None if it has not been done, or by other words."""
    file = _report_file(run, asked)
    if not file.exists() or not _was_asked_alike(file, asked):
        return None
    return json.loads(file.read_text())


def note_failure(run, error):
    """Write down why a run could not end."""
    known = isinstance(error, (ValueError, OSError, ArithmeticError))
    cause = ("" if known else f"{type(error).__name__}: ") + " ".join(str(error).split())
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / "failed.json", {"variant": run.variant, "seed": run.seed, "cause": cause})
    return cause


def failure_of(run):
    """Why a run could not end; None if it did not fail."""
    file = run.folder / "failed.json"
    return json.loads(file.read_text())["cause"] if file.exists() else None


def forget_failure(run):
    (run.folder / "failed.json").unlink(missing_ok=True)


def free_memory():
    """What a run leaves is given back before the next one, as if each had a process of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_whole(file, values):
    """Write JSON so that whoever reads finds all of it or the file before."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(values, indent=1) + "\n")
    unfinished.replace(file)


def _report_file(run, asked):
    return run.folder / "eval" / f"{asked.name or asked.task}.json"


def _asked_file(report):
    return report.with_suffix(".asked.json")


def _was_asked_alike(report, asked):
    """Whether a report answers what is asked; which of its figures are shown is no matter."""
    file = _asked_file(report)
    if not file.exists():
        return False
    before = {key: value for key, value in json.loads(file.read_text()).items() if value is not None}
    before.pop("metrics", None)
    return before == asked.model_dump(mode="json", exclude_none=True, exclude={"metrics"})


def _data_of(run, asked, beside):
    """The paths of a measurement's data."""
    paths = [asked.data] if isinstance(asked.data, str) else asked.data
    return [_data_path(path, run.recipe.data.folder, beside) for path in paths]


def _data_path(path, folder, beside):
    for start in (folder, beside):
        if start is not None and list(Path(start).glob(path) if not Path(path).is_absolute() else ()):
            return str(Path(start, path))
    return path


def _flat(values, before=""):
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + str(key): value}
    return flat
