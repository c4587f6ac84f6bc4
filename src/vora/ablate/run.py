"""`vora ablate`: a specification to runs, a table and curves.

OUT/VARIANT/seed-N/                 each run; see `vora.ablate.runs`
OUT/table.md, table.json        each variant over its seeds, against the baseline
OUT/curves.png                  lm_loss against samples seen
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from vora.ablate.curves import Curve, read_curve
from vora.ablate.page import markdown
from vora.ablate.plot import draw_curves
from vora.ablate.runs import (
    check_same,
    check_unread,
    failure_of,
    forget_failure,
    free_memory,
    is_finished,
    measure_run,
    note_failure,
    report_of,
    train_run,
    write_whole,
)
from vora.ablate.spec import EvaluateSection, Run, Spec, load_spec, runs_of
from vora.ablate.table import summary
from vora.eval.report import commit, commit_in_words


def ablate(spec_file: str | Path, out: str | Path, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Run what has not been run yet of a grid, and draw its table and curves.

    Runs run one after another in this process: two side by side would share cores and memory, so that their seconds
    would say nothing; and each is seeded anew, so that it is the run that `vora train` would have made.

    Args:
        spec_file: see `Spec`.
        overrides: of the recipe, for all variants, such as `data.folder=FOLDER`.

    Returns:
        What table.json holds.

    Raises:
        ValueError: bad specification or recipe, data that cannot be read, or a folder in `out` that another recipe has
            made; before any work.
        InterruptedError: a signal stopped it; the same command goes on.
    """
    spec_file, out = Path(spec_file), Path(out)
    spec = load_spec(spec_file)
    runs = runs_of(spec, overrides, out)
    for run in runs:
        check_same(run, spec.samples)
    for section in spec.evaluate:  # what cannot be measured is said before hours of training
        check_unread(runs, section, spec_file.parent)
    command = shlex.join(["vora", "ablate", str(spec_file), *overrides, "--out", str(out)])
    out.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        done = is_finished(run) and all(report_of(run, section) for section in spec.evaluate)
        console.print(f"\\[{number}/{len(runs)}] {run.name}{': done before' if done else ''}", highlight=False)
        forget_failure(run)
        try:
            train_run(run, spec.samples, console)
            measure_run(run, spec.evaluate, spec_file.parent, console)
        except InterruptedError as stop:
            raise InterruptedError(f"{str(stop).partition(' Go on')[0]} Go on with: {command}") from None
        except Exception as error:  # whatever it was, the other runs are worth having
            console.print(f"[red]{run.name} failed:[/red] {escape(str(note_failure(run, error)))}", highlight=False)
        if not done and number < len(runs):
            free_memory()
            draw(spec, runs, out, spec_file.stem, command)  # what there is so far, for those who look meanwhile
    return draw(spec, runs, out, spec_file.stem, command)


def draw(spec: Spec, runs: Sequence[Run], out: Path, name: str, command: str) -> dict[str, Any]:
    """Table and curves of the runs that have ended."""
    curves: dict[tuple[str, int], Curve] = {}
    scores: dict[tuple[str, int], dict[str, float | None]] = {}
    failures: dict[tuple[str, int], str] = {}
    commits: dict[str, None] = {}
    missing: dict[str, None] = {}
    variants, baseline = spec.variants or {}, spec.baseline or ""
    for run in runs:
        if (cause := failure_of(run)) is not None:
            failures[run.key] = cause
        if not is_finished(run):
            continue
        try:
            curves[run.key] = read_curve(run.folder / "log.jsonl", spec.window)
        except ValueError as error:
            failures[run.key] = str(error)
            continue
        commits[trained_at(run)] = None
        scores[run.key], unknown = scores_of(run, spec.evaluate)
        missing |= dict.fromkeys(unknown)
    found = {
        "name": name,
        "command": command,
        **commit(),
        "trained_at": list(commits),
        "baseline": spec.baseline,
        "seeds": spec.seeds,
        "samples": spec.samples,
        "window": spec.window,
        "set": spec.set,
        **summary(variants, baseline, curves, scores, failures),
    }
    if len(commits) > 1:
        found["warnings"].append(f"Runs were trained at {len(commits)} states of the code: {', '.join(commits)}.")
    if missing:
        found["warnings"].append(f"No report has what evaluate's metrics name: {', '.join(missing)}.")
    write_whole(out / "table.json", found)
    (out / "table.md").write_text(markdown(found))
    draw_curves(curves, list(variants), baseline, out / "curves.png", name)
    return found


def scores_of(run: Run, sections: Sequence[EvaluateSection]) -> tuple[dict[str, float | None], list[str]]:
    """{column: value} of a run's measurements, and the names of metrics that its reports do not have."""
    scores: dict[str, float | None] = {}
    unknown: list[str] = []
    for section in sections:
        metrics = (report_of(run, section) or {}).get("metrics")
        if metrics is None:
            continue
        unknown += [name for name in section.metrics or () if name not in metrics]
        shown = [name for name in section.metrics or metrics if name in metrics]
        scores |= {f"{section.name} {name}": metrics[name]["value"] for name in shown}
    return scores, unknown


def trained_at(run: Run) -> str:
    """The commit of a run's training, in words."""
    return commit_in_words(json.loads((run.folder / "run.json").read_text()))


def num_failed(found: dict[str, Any]) -> int:
    """How many runs of a table could not end."""
    return sum(len(row["failed"]) for row in found["variants"])
