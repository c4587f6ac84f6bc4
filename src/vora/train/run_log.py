"""What a run leaves of its losses: the log, a plot, a short report."""

from pathlib import Path
from typing import Any

from vora.checkpoint.run_directory import best_checkpoint, read_lines, replace_text
from vora.distill.objective import LOSSES
from vora.report.markdown import table
from vora.report.plots import run_figure, save_figure
from vora.train.recipe_sections import Recipe
from vora.train.validation import LOOKS

EVALUATED = tuple(f"eval_{name}" for name in ("loss", *LOSSES, LOOKS))


def read_log(log_file: str | Path) -> list[dict[str, Any]]:
    """The log lines of a run, oldest first, as `read_lines` reads them."""
    return read_lines(Path(log_file))


def draw_losses(directory: Path) -> None:
    """Write loss.png, the losses against samples seen."""
    lines, measured = read_log(directory / "log.jsonl"), read_log(directory / "validation.jsonl")
    names = ("loss", *LOSSES) if measured else LOSSES  # the sum is drawn where validation has one to compare
    if any("lm_loss" in line for line in lines):  # of steps that only distill it is of fewer losses
        lines = [{key: line[key] for key in line if key != "loss" or "lm_loss" in line} for line in lines]
    losses = {name: name for name in names} | {f"eval_{name}": f"{name}, validation" for name in names}
    save_figure(run_figure([*lines, *measured], losses, {f"eval_{LOOKS}": LOOKS}), directory / "loss.png")


def write_report(
    recipe: Recipe, num_steps: int, num_samples: int, directory: Path, warning: str | None = None
) -> None:
    """`draw_losses`, and report.md, in short how the run went."""
    draw_losses(directory)
    lines, measured = read_log(directory / "log.jsonl"), read_log(directory / "validation.jsonl")
    last = lines[-1] if lines else {}
    facts = {
        "stage": recipe.stage,
        "model": recipe.model.llm or recipe.model.vora,
        "teacher": recipe.teacher.name if recipe.teacher else "none",
        "steps": num_steps,
        "samples seen": last.get("samples_seen", num_samples),  # of all processes
        "lm_loss, last": f"{last['lm_loss']:.4f}" if "lm_loss" in last else "none: images alone",
        "distill_loss, last": f"{last['distill_loss']:.4f}" if "distill_loss" in last else "none",
        "samples per second": f"{last['samples_per_second']:.1f}" if last else "not measured",
        "bad samples skipped": len(read_log(directory / "bad_samples.jsonl")),
    }
    if measured:
        facts |= {f"{name}, last": f"{measured[-1][name]:.4f}" for name in measured[-1] if name in EVALUATED}
    if best := best_checkpoint(directory):
        facts["best checkpoint"] = f"{best.folder.name}, by {best.metric}: {best.value:.4f}"
    warning = f"**Warning**: {warning}\n\n" if warning else ""
    replace_text(
        directory / "report.md",
        f"# Run {directory.name}\n\n{warning}{table(('', ''), facts.items())}\n\n![losses](loss.png)\n\n"
        f"Merge it with `vora merge {directory} -o OUT`; the recipe is in recipe.yaml.\n",
    )
