"""What every evaluation is: something with a name that measures a model on data and gives a `Report`."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vora.checkpoint.lineage import read_card
from vora.eval.metrics.intervals import Estimate
from vora.eval.prediction_cache import PredictionCache, fingerprint
from vora.eval.report import Report, commit, commit_in_words, device_name
from vora.eval.rows import Rows, SkippedRows
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor


@dataclass(frozen=True)
class Data:
    """Where examples come from.

    Args:
        paths: files, folders or datasets, as `vora.data.readers.load_source` takes them.
        split: of folders and datasets; None: the first of `vora.eval.rows.SPLITS` that is there.
        subset: of a dataset on the Hub.
        image_folder: where paths of images start.
        columns: {our name: the files' name}.
        allow_urls: fetch images that rows name by URL; otherwise such rows are bad.
    """

    paths: Sequence[str]
    split: str | None = None
    subset: str | None = None
    image_folder: str | None = None
    columns: dict[str, str] | None = None
    allow_urls: bool = False

    def rows(self) -> Rows:
        return Rows(self.paths, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """All but the paths, as `Rows` takes them and reports name them."""
        return {name: value for name, value in asdict(self).items() if name != "paths"}

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))


@dataclass
class Job:
    """One evaluation at work on one model.

    Args:
        model_name: folder or hub id that the model came from, for the report and to tell models apart.
        out: JSON file of the report. The predictions go beside it as they come, to `.predictions.jsonl`; a run that
            finds some of its own goes on after them.
    """

    model: VoraForConditionalGeneration
    processor: VoraProcessor
    model_name: str
    data: Data
    out: Path
    console: Console
    skipped: SkippedRows = field(default_factory=SkippedRows)
    began: float = field(default_factory=time.monotonic)

    def open_cache(
        self, conditions: dict[str, Any], count: int, ending: str = ".predictions.jsonl"
    ) -> PredictionCache:
        """The predictions that there are, and the place of those to come; says where it goes on.

        Args:
            count: lines that there will be.

        Raises:
            ValueError: the file's predictions were made under other conditions.
        """
        state = f"{commit_in_words(commit())} on {device_name(self.model.device)}"
        cache = PredictionCache(self.out.with_suffix(ending), conditions, state)
        if cache.num_found:
            self.console.print(f"Going on after {cache.num_found:,} of {count:,} examples in {cache.file}")
        return cache

    @contextmanager
    def progress(self, name: str, total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
        """A progress bar; yields what is called with the number of examples done."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as bar:
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
        """Write the `Report`.

        Args:
            conditions: of `open_cache`, with `task`, `model` (a fingerprint) and `settings`.
            files: that were read.
            details: see `Report`.
        """
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
            vora_version=sys.modules["vora"].__version__,
            device=device_name(self.model.device),
            model_fingerprint=conditions["model"],
            details=details,
        )
        report.write(self.out)
        return report


class Evaluation(ABC):
    """Something to measure: a task, the probe, text ability. `vora.eval.run.evaluation_of` makes one by its name."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    def check_data(self, data: Data) -> None:
        """Raise ValueError where data cannot be opened, before any work."""
        data.rows()

    @abstractmethod
    def run(self, job: Job) -> Report:
        """Measure.

        Raises:
            ValueError: the data holds nothing to ask, or the predictions found are not of this model and data.
        """
