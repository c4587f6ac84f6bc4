"""What a run leaves of its losses: the log, a plot, a short report."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vora.distill.objective import LOSSES
from vora.train.recipe_sections import Recipe

if TYPE_CHECKING:
    from vora.train.trainer import VoraTrainer


def read_log(log_file: str | Path) -> list[dict[str, Any]]:
    """The log lines of a run, oldest first; none of one that ended before its first."""
    file = Path(log_file)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def draw_losses(log_file: str | Path, image: str | Path) -> None:
    """Plot the losses against samples seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log_file)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in LOSSES:
        points = [(line["samples_seen"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points), label=name)
    axes.set(xlabel="samples seen", ylabel="loss", yscale="log")
    if lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=120)
    plt.close(figure)


def write_report(recipe: Recipe, trainer: "VoraTrainer", directory: Path) -> None:
    """A short report in Markdown of how the run went."""
    lines = read_log(directory / "log.jsonl")
    last = lines[-1] if lines else {}
    bad = directory / "bad_samples.jsonl"
    num_bad = len(bad.read_text().splitlines()) if bad.exists() else 0
    facts: list[tuple[str, Any]] = [
        ("stage", recipe.stage),
        ("model", recipe.model.llm or recipe.model.vora),
        ("teacher", recipe.teacher.name if recipe.teacher else "none"),
        ("steps", trainer.state.global_step),
        ("samples seen", last.get("samples_seen", trainer.num_samples_seen)),  # of all processes
        ("lm_loss, last", f"{last['lm_loss']:.4f}" if "lm_loss" in last else "none: images alone"),
        ("distill_loss, last", f"{last['distill_loss']:.4f}" if "distill_loss" in last else "none"),
        ("samples per second", f"{last['samples_per_second']:.1f}" if last else "not measured"),
        ("bad samples skipped", num_bad),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    (directory / "report.md").write_text(
        f"# Run {directory.name}\n\n| | |\n|---|---|\n{table}\n\n![losses](loss.png)\n\n"
        f"Merge it with `vora merge {directory} -o OUT`; the recipe is in recipe.yaml.\n"
    )
