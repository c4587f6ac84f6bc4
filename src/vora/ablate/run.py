"""`vora ablate`: a specification to runs, a table and curves.

OUT/ARM/seed-N/                 each cell; see `vora.ablate.cells`
OUT/table.md, table.json        each arm over its seeds, against the baseline
OUT/curves.png                  lm_loss against samples seen
"""

import json
import shlex
from pathlib import Path

from rich.markup import escape

from vora.ablate.cells import (
    base_of,
    failure_of,
    forget_failure,
    free_memory,
    is_finished,
    measure_cell,
    note_failure,
    refuse_other,
    refuse_unread,
    report_of,
    train_cell,
    write_whole,
)
from vora.ablate.curves import read_curve
from vora.ablate.page import markdown
from vora.ablate.picture import draw_curves
from vora.ablate.spec import cells_of, load_spec
from vora.ablate.table import summary
from vora.eval.run import commit, commit_in_words, make_task


def ablate(spec_file, out, overrides, console):
    """Run what has not been run yet of a grid, and draw its table and curves.

    Cells run one after another in this process: two side by side would share cores and memory, so that their seconds
    would say nothing; and each is seeded anew, so that it is the run that `vora train` would have made.

    Args:
        spec_file: see `Spec`.
        overrides: of the recipe, for all arms, such as `data.folder=FOLDER`.

    Returns:
        What table.json holds.

    Raises:
        ValueError: bad specification or recipe, data that cannot be read, or a folder in `out` that another recipe has
            made; before any work.
        InterruptedError: a signal stopped it; the same command goes on.
    """
    spec_file, out = Path(spec_file), Path(out)
    spec = load_spec(spec_file)
    cells = cells_of(spec, overrides, out)
    for cell in cells:
        refuse_other(cell, spec.samples)
    for asked in spec.evaluate:  # what cannot be measured is told before hours of training
        if asked.task != "text":
            make_task(asked.of or asked.task, prompt=asked.prompt)
        for cell in cells if asked.task == "text" else ():
            base_of(cell, asked)
        refuse_unread(cells, asked, spec_file.parent)
    command = shlex.join(["vora", "ablate", str(spec_file), *overrides, "--out", str(out)])
    out.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(cells, 1):
        done = is_finished(cell) and all(report_of(cell, asked) for asked in spec.evaluate)
        console.print(f"\\[{number}/{len(cells)}] {cell.name}{': done before' if done else ''}", highlight=False)
        forget_failure(cell)
        try:
            train_cell(cell, spec.samples, console)
            measure_cell(cell, spec.evaluate, spec_file.parent, console)
        except InterruptedError as stop:
            raise InterruptedError(f"{str(stop).partition(' Go on')[0]} Go on with: {command}") from None
        except Exception as error:  # whatever it was, the other cells are worth having
            console.print(f"[red]{cell.name} failed:[/red] {escape(str(note_failure(cell, error)))}", highlight=False)
        if not done and number < len(cells):
            free_memory()
            draw(spec, cells, out, spec_file.stem, command)  # what there is so far, for those who look meanwhile
    return draw(spec, cells, out, spec_file.stem, command)


def draw(spec, cells, out, name, command):
    """Table and curves of the cells that have ended."""
    curves, scores, failures, commits, missing = {}, {}, {}, {}, {}
    for cell in cells:
        key = (cell.arm, cell.seed)
        if (cause := failure_of(cell)) is not None:
            failures[key] = cause
        if not is_finished(cell):
            continue
        try:
            curves[key] = read_curve(cell.folder / "log.jsonl", spec.window)
        except ValueError as error:
            failures[key] = str(error)
            continue
        commits[trained_at(cell)] = None
        scores[key], unknown = scores_of(cell, spec.evaluate)
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
        **summary(spec.arms, spec.baseline, curves, scores, failures),
    }
    if len(commits) > 1:
        found["warnings"].append(f"Cells were trained at {len(commits)} states of the code: {', '.join(commits)}.")
    if missing:
        found["warnings"].append(f"No report has what evaluate's metrics name: {', '.join(missing)}.")
    write_whole(out / "table.json", found)
    (out / "table.md").write_text(markdown(found))
    draw_curves(curves, list(spec.arms), spec.baseline, out / "curves.png", name)
    return found


def scores_of(cell, asked):
    """{column: value} of a cell's measurements, and the names of metrics that its reports do not have.

    Args:
        asked: list of `EvaluateSection`.
    """
    scores, unknown = {}, []
    for one in asked:
        metrics = (report_of(cell, one) or {}).get("metrics")
        if metrics is None:
            continue
        unknown += [name for name in one.metrics or () if name not in metrics]
        shown = [name for name in one.metrics or metrics if name in metrics]
        scores |= {f"{one.name or one.task} {name}": metrics[name]["value"] for name in shown}
    return scores, unknown


def trained_at(cell):
    """The commit of a cell's training, in words."""
    return commit_in_words(json.loads((cell.folder / "cell.json").read_text()))


def num_failed(found):
    """How many cells of a table could not end."""
    return sum(len(row["failed"]) for row in found["arms"])
