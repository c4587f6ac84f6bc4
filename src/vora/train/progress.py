"""What a run shows while it runs and leaves when it ends: bar, log, loss plot, report."""

import json
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from vora.distill.objective import LOSSES


class ProgressCallback(TrainerCallback):
    """A bar with both losses, speeds and the share of time spent waiting for data; log lines also go to a file."""

    def __init__(self, console, log_file):
        self.console, self.log_file = console, Path(log_file)
        self.bar = self.task = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.log_file.exists():  # lines after the checkpoint that the run resumes from are repeated: drop them
            lines = [json.loads(line) for line in self.log_file.read_text().splitlines()]
            kept = [line for line in lines if line["step"] <= state.global_step]
            self.log_file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}")]
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, redirect_stdout=False)
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # also of a run that is shorter than the distance between two lines
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or "samples_per_second" not in (logs or {}):
            return
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        losses = [f"{name} {logs[name]:.3f}" for name in LOSSES if name in logs]
        speed = f"{logs['samples_per_second']:.1f} samples/s  {logs['tokens_per_second']:.0f} tokens/s"
        text = "  ".join([*losses, speed, f"{logs['data_wait_share']:.0%} waiting for data"])
        self.bar.update(self.task, description=text)
        if not self.console.is_terminal:  # a bar needs a terminal; a file gets lines
            self.console.print(f"step {state.global_step}/{state.max_steps}  {text}", soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.stop()


def read_log(log_file):
    """The log lines of a run, oldest first; none of one that ended before its first."""
    file = Path(log_file)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def draw_losses(log_file, image):
    """Plot the losses against samples seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(log_file)
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
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


def write_report(recipe, trainer, directory):
    """A short report in Markdown of how the run went."""
    lines = read_log(directory / "log.jsonl")
    last = lines[-1] if lines else {}
    bad = directory / "bad_samples.jsonl"
    num_bad = len(bad.read_text().splitlines()) if bad.exists() else 0
    rows = [
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
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    (directory / "report.md").write_text(
        f"# Run {directory.name}\n\n| | |\n|---|---|\n{table}\n\n![losses](loss.png)\n\n"
        f"Merge it with `vora merge {directory} -o OUT`; the recipe is in recipe.yaml.\n"
    )
