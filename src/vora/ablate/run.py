"""`vora ablate`: a specification to runs, a table and curves.

OUT/VARIANT/seed-N/        each run; see `vora.ablate.runs`
OUT/table.md, table.json   each variant over its seeds, against the baseline
OUT/curves.png             lm_loss, or distill_loss where nothing else is learned, against samples seen
"""

import gc
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from vora.ablate.curves import Curve, read_curve
from vora.ablate.page import markdown
from vora.ablate.plot import draw_curves
from vora.ablate.runs import check_same, check_unread, measure_run, report_of, train_run, write_whole
from vora.ablate.spec import Run, Spec, chosen_of, load_spec, runs_of
from vora.ablate.table import Key, summary, unequal_models
from vora.eval.report import commit, commit_in_words
from vora.train.estimate import print_estimate
from vora.train.run_log import EVALUATED, read_log


def ablate(
    spec_file: str | Path, out: str | Path, overrides: Sequence[str], console: Console,
    seeds: Sequence[str] | None = None, variants: Sequence[str] | None = None, max_samples: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run what has not been run yet of a grid, draw its table and curves, and return what table.json holds; `seeds`,
    `variants` and `max_samples` as of `chosen_of`.

    Runs run one after another in this process: two side by side would share cores and memory, so that their seconds
    would say nothing; and each is seeded anew, so that it is the run that `vora train` would have made.

    Raises:
        ValueError: bad specification or recipe, data that cannot be read, or a folder in `out` that another recipe has
            made; before any work.
        InterruptedError: a signal stopped it; the same command goes on.
    """
    spec_file, out = Path(spec_file), Path(out)
    spec = chosen_of(load_spec(spec_file), seeds, variants, max_samples)
    runs = runs_of(spec, overrides, out)
    spec.set = [*spec.set, *overrides]  # as the page tells
    for run in runs:
        check_same(run, spec.samples)
    for section in spec.evaluate:  # what cannot be measured is said before hours of training
        check_unread(runs, section, spec_file.parent)
    part = {"--seeds": seeds, "--variants": variants, "--max-samples": max_samples and [str(max_samples)]}
    options = [word for option, values in part.items() if values for word in (option, ",".join(values))]
    command = shlex.join(["vora", "ablate", str(spec_file), *overrides, "--out", str(out), *options])
    out.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not run.is_finished]
    if todo and not console.quiet:
        end = "" if spec.samples is None else f", but for its end after {spec.samples:,} samples"
        console.print(f"{len(todo)} of {len(runs)} runs are to be trained, each as this one{end}:", highlight=False)
        print_estimate(todo[0].recipe, Path(spec.recipe).parent, console)
    failures: dict[Key, str] = {}
    for number, run in enumerate(runs, 1):
        done = run.is_finished and all(report_of(run, section) for section in spec.evaluate)
        console.print(f"\\[{number}/{len(runs)}] {run.name}{': done before' if done else ''}", highlight=False)
        try:
            train_run(run, spec.samples, console)
            measure_run(run, spec.evaluate, spec_file.parent, console)
        except InterruptedError as stop:
            raise InterruptedError(f"{str(stop).partition(' Go on')[0]} Go on with: {command}") from None
        except Exception as error:  # whatever it was, the other runs are worth having
            known = isinstance(error, (ValueError, OSError, ArithmeticError))
            cause = ("" if known else f"{type(error).__name__}: ") + " ".join(str(error).split())
            failures[run.variant, run.seed] = cause
            console.print(f"[red]{run.name} failed:[/red] {escape(cause)}", highlight=False)
        if not done and number < len(runs):
            gc.collect()  # memory is given back before the next run, as if each had a process of its own
            torch.cuda.empty_cache()
            draw(spec, runs, failures, out, spec_file.stem, command)  # what there is, for those who look meanwhile
    return draw(spec, runs, failures, out, spec_file.stem, command)


def draw(
    spec: Spec, runs: Sequence[Run], failures: Mapping[Key, str], out: Path, name: str, command: str
) -> dict[str, Any]:
    """Table and curves of the runs that have ended; `failures` are of those that could not."""
    curves: dict[Key, Curve] = {}
    scores: dict[Key, dict[str, float | None]] = {}
    commits: dict[str, None] = {}
    unknown: dict[str, None] = {}
    num_trained: dict[str, int] = {}
    failures, variants, baseline = dict(failures), spec.variants or {}, spec.baseline or ""
    for run in runs:
        if not run.is_finished:
            continue
        key = run.variant, run.seed
        try:
            curves[key] = read_curve(run.folder / "log.jsonl", spec.window)
        except ValueError as error:
            failures[key] = str(error)
            continue
        facts = json.loads((run.folder / "run.json").read_text())
        commits[commit_in_words(facts)] = None
        num_trained[run.variant] = facts.get("num_trained", 0)
        scores[key] = _of_validation(run.folder / "validation.jsonl")
        for section in spec.evaluate:
            if report := report_of(run, section):
                values = report["metrics"]
                shown = section.metrics or list(values)
                scores[key] |= {f"{section.name} {one}": values[one]["value"] for one in shown if one in values}
                unknown |= dict.fromkeys(one for one in shown if one not in values)
    if len({curve.loss for curve in curves.values()}) > 1:  # no loss is of all
        for key in [key for key, curve in curves.items() if curve.loss != "lm_loss"]:
            failures[key] = "it only distills, and has no lm_loss to compare: lower teacher.distill_only_steps"
            del curves[key]
    found = {
        "name": name,
        "command": command,
        **commit(),
        "trained_at": list(commits),
        "baseline": baseline,
        **spec.model_dump(include={"seeds", "samples", "window", "set"}),
        **summary(variants, baseline, curves, scores, failures),
    }
    found["warnings"] += unequal_models(num_trained)
    if len(commits) > 1:
        found["warnings"].append(f"Runs were trained at {len(commits)} states of the code: {', '.join(commits)}.")
    if unknown:
        found["warnings"].append(f"No report has what evaluate's metrics name: {', '.join(unknown)}.")
    write_whole(out / "table.json", found)
    (out / "table.md").write_text(markdown(found))
    draw_curves(curves, list(variants), baseline, out / "curves.png", name)
    return found


def _of_validation(file: Path) -> dict[str, float | None]:
    """What a run was last measured on while it trained, if it was, but for the sum of its losses: variants may add up
    others."""
    last = (read_log(file) or [{}])[-1]
    names = [name for name in EVALUATED if name in last and name != "eval_loss"]
    return {f"validation {name.removeprefix('eval_')}": last[name] for name in names}


def num_failed(found: dict[str, Any]) -> int:
    """How many runs of a table could not end."""
    return sum(len(row["failed"]) for row in found["variants"])
