"""`vora eval` and `vora.evaluate`: a model and data to a report. Only here is an evaluation chosen by its name."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from vora.checkpoint.layout import read_info
from vora.checkpoint.lineage import read_card
from vora.checkpoint.load import load_model
from vora.data.held_out import HeldOut
from vora.eval.evaluation import Evaluation, Job
from vora.eval.probe.conditions import CONDITIONS
from vora.eval.probe.probe import Probe
from vora.eval.report import Report, check_overwrites_nothing
from vora.eval.rows import Data, Rows
from vora.eval.tasks.evaluation import TASKS, TaskEvaluation, task_of
from vora.eval.tasks.exact import ExactAnswers
from vora.eval.tasks.text import TextAbility
from vora.eval.tasks.vqa import Vqa
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

OTHERS = ("exact", "probe", "text")  # evaluations beside the tasks


def evaluate(
    model: str | Path | tuple[VoraForConditionalGeneration, VoraProcessor],
    task: str | Evaluation,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model_name: str | Path | None = None,
    split: str | None = None,
    subset: str | None = None,
    image_folder: str | Path | None = None,
    columns: dict[str, str] | None = None,
    allow_urls: bool = False,
    half: str | None = None,
    held_out: HeldOut | None = None,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
    llm: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    unmerged: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Report:
    """Measure a model, with 95 % intervals. The same call goes on where a stopped one ended.

    >>> report = vora.evaluate("my-vora", "captions", "val.parquet", out="captions.json", max_samples=500)
    >>> report.metrics["cider_d"]["value"]

    Args:
        model: folder or hub id, or a loaded (model, processor).
        task: captions, vqa, classify, statements, exact, probe or text; or an `Evaluation`.
        data: files, folders or datasets.
        out: JSON file of the report; predictions go beside it as they come.
        model_name: of a loaded model: where it came from; by default what transformers noted when it was loaded.
        split, subset, image_folder, columns, allow_urls, half, held_out: see `Data`.
        min_image_tokens, max_image_tokens: budget per image, if not the model's own.
        llm: to put an adapter over, if not the one that it names.
        device, dtype: where a model that is not loaded yet is to run, and in what; by default the GPU if there is one,
            and its own.
        unmerged: of a model that is not loaded yet: see `load_model`.
        console: for progress; by default all is quiet.
        options: of `evaluation_of`. A probe's `of` may be left out where the data's columns tell the task.

    Raises:
        ValueError: an option does not fit the task, the data holds nothing to ask, `out` would overwrite something
            else, or the predictions found there are not of this model, data and task.
    """
    paths = [str(path) for path in ([data] if isinstance(data, str | Path) else data)]
    folder = None if image_folder is None else str(image_folder)
    source = Data(paths, split, subset, folder, columns, allow_urls, half, held_out)
    if "max_examples" in options:
        raise ValueError("max_examples is called max_samples now: rename it.")
    out = Path(out)
    check_overwrites_nothing(out, (".png",) if task == "probe" or isinstance(task, Probe) else ())
    if isinstance(task, Evaluation):
        if options:
            raise ValueError(f"{', '.join(options)}: give them to the Evaluation, not beside it.")
        evaluation = task
    else:
        if task == "probe" and options.get("of") is None:
            options["of"] = task_of(Rows(source))
        evaluation = evaluation_of(task, **options)
    if isinstance(model, str | Path):
        info = read_info(model)
        evaluation.check_data(source)  # before seconds of loading
        if console is not None and held_out is None and (names := trained_on(info.path, paths)):
            console.print(
                f"Warning: the model was trained on {', '.join(names)}, by its card. Measure on other data, or with "
                "--held-out-by RUN on what a run held out of it.", highlight=False, markup=False,
            )  # fmt: skip
        model_name = info.path if Path(model).is_dir() else model  # of a run, what it saved
        loaded, processor = load_model(
            info, llm=llm, min_image_tokens=min_image_tokens, max_image_tokens=max_image_tokens,
            device=device, dtype=dtype, unmerged=unmerged,
        )  # fmt: skip
    else:
        loaded, processor = model
        model_name = model_name or loaded.config._name_or_path
        processor.image_processor.set_budget(min_image_tokens, max_image_tokens)
    job = Job(loaded, processor, str(model_name), source, out, console or Console(quiet=True))
    return evaluation.run(job)


def trained_on(model: Path | str, paths: Sequence[str]) -> list[str]:
    """The paths of data whose files the card of a model names among those that it was trained on."""
    stages = (read_card(model) or {}).get("stages", [])
    named = [Path(one["name"]) for stage in stages for one in stage.get("data", [])]
    known = [path.name for path in named if path.suffix]  # folders and datasets have splits
    return [path for path in paths if any(fnmatch(Path(path).name, name) for name in known)]


def evaluation_of(
    task: str,
    *,
    of: str | None = None,
    against: Sequence[str] | None = None,
    generate: bool = False,
    base: str | None = None,
    prompt: str | None = None,
    labels: Sequence[str] | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """An evaluation by its name.

    Args:
        of: of the probe: the task that is probed.
        against: of the probe: what the right image is held against; None: other, blank, shuffled and none.
        generate: of the probe: let the model speak, too; slow.
        base: of text: the LLM to compare with; None: what the model's card names.
        prompt: of a task or the probe: instead of the task's own; {} is where a row's text goes.
        labels: of a task or the probe: names of all classes.
        max_samples: the first so many.
        seed: of intervals and of what a probe shows.

    Raises:
        ValueError: there is no such task, or an option is not one of its own or has a wrong value.
    """
    if task not in (*TASKS, *OTHERS):
        raise ValueError(f"There is no task {task!r}: choose among {', '.join((*TASKS, *OTHERS))}.")
    for name, value, where in (
        ("of", of, ("probe",)),
        ("against", against, ("probe",)),
        ("generate", generate or None, ("probe",)),
        ("base", base, ("text",)),
        ("prompt", prompt, (*TASKS, "exact", "probe")),
        ("labels", labels, (*TASKS, "exact", "probe")),
    ):
        if value is not None and task not in where:
            raise ValueError(f"--{name} is for the task {', '.join(where)}, and this is {task}: leave it out.")
    if task == "text":
        return TextAbility(base, max_samples, seed)
    options: dict[str, Any] = {
        "prompt": prompt,
        "labels": labels and list(labels),
        "max_samples": max_samples,
        "seed": seed,
    }
    if task == "exact":
        return ExactAnswers(Vqa(**options))
    if task != "probe":
        return TaskEvaluation(TASKS[task](**options))
    if of not in TASKS:
        cause = (
            "A probe needs `of` (--of), the task that is probed"
            if of is None
            else f"`of` (--of) {of} is no task that can be probed"
        )
        raise ValueError(f"{cause}: choose among {', '.join(TASKS)}.")
    return Probe(TASKS[of](**options), generate, tuple(against or CONDITIONS[1:]))
