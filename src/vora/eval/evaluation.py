"""What every evaluation is: something with a name that measures a model on data and gives a `Report`."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vora.checkpoint.lineage import read_card
from vora.eval.metrics.intervals import Estimate
from vora.eval.prediction_cache import PredictionCache, fingerprint
from vora.eval.report import Report, beside, commit, commit_in_words, device_name
from vora.eval.rows import Data, Rows, SkippedRows
from vora.eval.scoring.read_prompts import has_unmerged_lora
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor


@dataclass
class Job:
    """One evaluation at work on one model. Its predictions go beside the report as they come, to `.predictions.jsonl`;
    a run that finds some of its own goes on after them."""

    model: VoraForConditionalGeneration
    processor: VoraProcessor
    model_name: str  # folder or hub id that the model came from, for the report and to tell models apart
    data: Data
    out: Path  # JSON file of the report
    console: Console
    skipped: SkippedRows = field(default_factory=SkippedRows)
    began: float = field(default_factory=time.monotonic)

    def open_cache(
        self, conditions: dict[str, Any], count: int, ending: str = ".predictions.jsonl"
    ) -> PredictionCache:
        """The predictions that there are, and the place of those to come, `count` in all; says where it goes on.
        ValueError where the file's predictions were made under other conditions."""
        precision = str(self.model.dtype).removeprefix("torch.")
        state = f"{commit_in_words(commit())} on {device_name(self.model.device)} in {precision}"
        cache = PredictionCache(beside(self.out, ending), conditions, state)
        if cache.num_found:
            self.console.print(f"Going on after {cache.num_found:,} of {count:,} examples in {cache.file}")
        return cache

    @contextmanager
    def progress(self, name: str, total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
        """A progress bar; yields what is called with the number of examples done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            shown = bar.add_task(name, total=total, completed=completed)
            yield lambda count: bar.advance(shown, count)

    def report(
        self,
        num_examples: int,
        metrics: dict[str, Estimate],
        conditions: dict[str, Any],
        cache: PredictionCache,
        files: Sequence[str | Path],
        **details: Any,
    ) -> Report:
        """Write the `Report`; `conditions` have, as of `open_cache`, `task`, `model` (a fingerprint), `settings`."""
        stages = (read_card(self.model_name) or {}).get("stages", [])
        report = Report(
            task=conditions["task"],
            num_bad=self.skipped.count,
            num_examples=num_examples,
            metrics=metrics,
            model=self.model_name,
            **commit(),
            predicted_at=cache.states,
            recipe=[stage["recipe"] for stage in stages if stage.get("recipe")] or None,
            seed=conditions["settings"]["seed"],
            settings=conditions["settings"],
            data=[{"file": str(file), "fingerprint": fingerprint(file)} for file in files],
            bad=self.skipped.named,
            predictions=cache.file.name,
            num_resumed=cache.num_found,
            seconds=round(time.monotonic() - self.began + cache.seconds, 2),
            device=device_name(self.model.device),
            model_fingerprint=conditions["model"],
            details=details,
        )
        report.write(self.out)
        return report


def computed_as(model: VoraForConditionalGeneration) -> dict[str, Any]:
    """What of a model's settings its predictions depend on, beside its weights."""
    unmerged = {"unmerged": True} if has_unmerged_lora(model) else {}
    return {"dtype": str(model.dtype).removeprefix("torch."), **unmerged}


class Evaluation(ABC):
    """Something to measure: a task, the probe, text ability. `vora.eval.run.evaluation_of` makes one by its name."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    def check_data(self, data: Data) -> None:
        """Raise ValueError where data cannot be opened, before any work."""
        Rows(data)

    @abstractmethod
    def run(self, job: Job) -> Report:
        """ValueError where the data holds nothing to ask, or the predictions found are not of this model and data."""
