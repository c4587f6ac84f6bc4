"""One run of the grid: trained, measured, or resumed where it stood.

RUN/log.jsonl, recipe.yaml, final/, ...   of `vora.train.run.train`, without its checkpoints once it has ended
RUN/run.json                              written last: the run is whole; the commit that it was trained at
RUN/eval/NAME.json                        reports of `vora eval`, each beside its predictions
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.utils.generic import flatten_dict

from vora.ablate.spec import EvaluateSection, Run
from vora.checkpoint.load import merge_run
from vora.checkpoint.run_directory import newest_checkpoint
from vora.data.held_out import HeldOut
from vora.eval.report import commit
from vora.eval.rows import Data
from vora.eval.run import evaluate
from vora.model.processing_vora import VoraProcessor
from vora.train.from_recipe import held_out_of
from vora.train.recipe import load_recipe
from vora.train.run import train


class EnoughSamples(TrainerCallback):
    """Ends a run at the first log line with so many samples seen, for equal steps are not equal samples where the
    sequences of variants hold other numbers of them."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if (logs or {}).get("samples_seen", 0) >= self.samples:
            control.should_save = control.should_training_stop = True
            control.should_evaluate |= args.eval_strategy != "no"


def check_same(run: Run, samples: int | None) -> None:
    """Raise ValueError if a run's folder holds a run of another recipe than the specification's, or one that was ended
    by another number of samples."""
    file = run.folder / "recipe.yaml"
    if not file.exists() or not (run.is_finished or newest_checkpoint(run.folder)):
        return  # nothing would be lost
    cure = "choose another --out, or delete that folder to run it anew."
    there, wanted = (flatten_dict(recipe.model_dump(mode="json")) for recipe in (load_recipe(file), run.recipe))
    differ = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if differ:
        changes = "; ".join(f"{key} was {there.get(key)}, is {wanted.get(key)}" for key in differ[:4])
        raise ValueError(f"{run.folder} was run by another recipe ({len(differ)} keys differ: {changes}): {cure}")
    ended = json.loads((run.folder / "run.json").read_text())["samples"] if run.is_finished else samples
    if ended != samples:
        raise ValueError(f"{run.folder} was ended by samples: {ended}, and the specification says {samples}: {cure}")


def train_run(run: Run, samples: int | None, console: Console) -> None:
    """Train a run, from its newest checkpoint if it has one; nothing to do if it has ended. InterruptedError where a
    signal stopped it."""
    if not run.is_finished:
        resume = newest_checkpoint(run.folder) is not None
        unfinished = run.folder / "final" if resume else run.folder  # killed before run.json: it may not be whole
        shutil.rmtree(unfinished, ignore_errors=True)
        trainer = train(run.recipe, run.folder, resume, console, [] if samples is None else [EnoughSamples(samples)])
        num_trained = sum(p.numel() for p in trainer.model.student.parameters() if p.requires_grad)  # without heads
        facts = {"variant": run.variant, "seed": run.seed, "samples": samples, "num_trained": num_trained, **commit()}
        write_whole(run.folder / "run.json", facts)
    for checkpoint in run.folder.glob("checkpoint-*"):  # final/ has what was learned; optimizers fill disks
        shutil.rmtree(checkpoint)


def measure_run(run: Run, sections: Sequence[EvaluateSection], beside: Path, console: Console) -> None:
    """Do those of a specification's measurements that have not been done yet; data's paths may start `beside` it."""
    todo = [section for section in sections if report_of(run, section) is None]
    if not todo:
        return
    model, processor = merge_run(run.folder)
    assert isinstance(processor, VoraProcessor)  # a run has a tokenizer
    if torch.cuda.is_available():
        model = model.to("cuda")
    for section in todo:
        out, data = _report_file(run, section), _data_of(run, section, beside)
        if not _is_same_request(out, section):
            for stale in out.parent.glob(f"{out.stem}.*"):
                stale.unlink()
        out.parent.mkdir(exist_ok=True)
        write_whole(out.with_suffix(".request.json"), section.model_dump(mode="json"))
        evaluation = section.evaluation(base_of(run, section), data)
        name = run.folder / "final"
        options = data.options | {"held_out": data.held_out}
        console.print(f"Measuring {section.name}", highlight=False)
        evaluate((model, processor), evaluation, data.paths, out, model_name=name, console=console, **options)


def check_unread(runs: Sequence[Run], section: EvaluateSection, beside: Path) -> None:
    """Raise ValueError if what is to be measured yet cannot be: no base for text, or data that cannot be opened."""
    opened = []
    for run in runs:
        base, data = base_of(run, section), _data_of(run, section, beside)
        if report_of(run, section) is None and data not in opened:
            try:
                section.evaluation(base, data).check_data(data)
            except ValueError as error:
                raise ValueError(f"evaluate's {section.name}: its data cannot be read: {error}") from None
            opened.append(data)


def base_of(run: Run, section: EvaluateSection) -> str | None:
    """The LLM that a run's text is held against, None of other measurements; ValueError where nothing names it."""
    if section.task != "text":
        return None
    if base := section.base or run.recipe.model.llm:
        return base
    raise ValueError(
        f"{run.name}: the recipe goes on from model.vora; say evaluate's base, the LLM that text is held against."
    )


def report_of(run: Run, section: EvaluateSection) -> dict[str, Any] | None:
    """The report of a measurement; None if it has not been done, or was another of that name."""
    file = _report_file(run, section)
    return json.loads(file.read_text()) if file.exists() and _is_same_request(file, section) else None


def write_whole(file: Path, values: dict[str, Any]) -> None:
    """Write JSON so that whoever reads finds all of it or the file before."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(values, indent=1) + "\n")
    unfinished.replace(file)


def _report_file(run: Run, section: EvaluateSection) -> Path:
    return run.folder / "eval" / f"{section.name}.json"


def _is_same_request(report: Path, section: EvaluateSection) -> bool:
    """Whether a report answers what a section asks for; which of its figures are shown is no matter."""
    file = report.with_suffix(".request.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    given = {key: value for key, value in before.items() if value is not None and key != "metrics"}
    return given == section.model_dump(mode="json", exclude_none=True, exclude={"metrics"})


def _held_out(run: Run, section: EvaluateSection) -> HeldOut | None:
    if not section.held_out:
        return None
    if (found := held_out_of(run.recipe.data)) is None:
        raise ValueError(f"evaluate's {section.name}: held_out needs a recipe with data.validation.share.")
    return found


def _data_of(run: Run, section: EvaluateSection, beside: Path) -> Data:
    """A measurement's data; its paths start in the recipe's folder of data, or beside the specification."""
    folders = [Path(folder) for folder in (run.recipe.data.folder, beside) if folder is not None]

    def found(path: str) -> str:
        if Path(path).is_absolute():
            return path
        return next((str(folder / path) for folder in folders if list(folder.glob(path))), path)

    if section.data is None:
        source, *others = run.recipe.data.sources
        if others:
            raise ValueError(f"evaluate's {section.name}: the recipe has {len(others) + 1} sources: say data.")
        given = source.model_dump(include={"split", "subset", "image_folder", "columns"}) | {"data": source.path}
        # a file has no splits, whatever a source's default is
        section = section.model_copy(update=given | ({"split": None} if Path(found(source.path)).is_file() else {}))
    paths = [section.data] if isinstance(section.data, str) else section.data or []
    return Data(
        list(map(found, paths)),
        image_folder=section.image_folder and found(section.image_folder),
        **section.model_dump(include={"split", "subset", "columns", "allow_urls"}),
        held_out=_held_out(run, section),
    )
