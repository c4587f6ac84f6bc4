"""What an evaluation found, and all that it depends on: a JSON file, and a table for people."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.table import Table

from vora.eval.metrics.intervals import Estimate, in_words

NUM_SHOWN = 3  # answers, in the terminal
# that predictions may depend on
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "pillow", "numpy")


class Commit(TypedDict):
    """The git commit that this code is of, and whether it was changed since; None where it has no history, as an
    installed package, of which the version tells."""

    commit: str | None
    commit_is_changed: bool | None
    vora_version: str


@dataclass
class Report:
    """The content of a report's JSON file."""

    task: str  # name of the evaluation
    num_bad: int  # rows and questions that were left out; `bad` names the first of them with the cause
    num_examples: int  # that the metrics are of
    metrics: dict[str, Estimate]
    model: str
    commit: str | None
    commit_is_changed: bool | None
    predicted_at: list[str]  # states of code and device that the predictions come from
    recipe: list[dict[str, Any]] | None
    seed: int
    settings: dict[str, Any]
    data: list[dict[str, str]]
    bad: list[dict[str, str]]
    predictions: str  # the file of them, beside the report
    num_resumed: int  # predictions that were there already
    seconds: float  # of all starts together
    vora_version: str
    device: str
    model_fingerprint: str
    versions: dict[str, str] = field(
        default_factory=lambda: {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    )
    details: dict[str, Any] = field(default_factory=dict)  # of this evaluation alone; at the file's top level

    def to_dict(self) -> dict[str, Any]:
        """As the JSON file has it."""
        values = asdict(self)
        first = {name: values.pop(name) for name in ("task", "num_bad", "num_examples")}
        return first | values.pop("details") | values

    def write(self, file: Path) -> None:
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        file.write_bytes(text.encode("utf-8", "backslashreplace"))  # a lone surrogate becomes its escape

    def files(self, out: Path) -> list[Path]:
        """All that lies in the folder of `out`, the JSON file, for this report."""
        names = (".predictions.jsonl", ".generated.jsonl", ".png")
        return [out, *(file for name in names if (file := beside(out, name)).exists())]

    def examples(self, out: Path) -> list[str]:
        """The first answers in words, as the predictions beside `out` have them; none where answers were only read."""
        texts = []
        with beside(out, ".predictions.jsonl").open(encoding="utf-8") as file:
            for line in map(json.loads, islice(file, 1, 1 + NUM_SHOWN)):
                said = line.get("generated", line.get("chosen"))
                if said is not None:
                    all_right = line["references"]
                    right = max(all_right, key=all_right.count)
                    if more := len({*all_right}) - 1:
                        right += f" (or one of {more} more)"
                    asked, said, right = (repr(text)[1:-1] for text in (line["prompt"], said, right))  # one line each
                    texts.append(f"{line['name']}: {asked}\n  said   {said}\n  right  {right}")
        return texts

    def table(self) -> Table:
        """The metrics, for a console."""
        held_out = " of held-out images" if self.settings.get("held_out") else ""
        table = Table(title=f"{self.task}: {self.num_examples:,} examples{held_out}, {self.num_bad:,} bad")
        for name in ("metric", "value", "95 % interval"):
            table.add_column(name, justify="left" if name == "metric" else "right")
        for name, found in self.metrics.items():
            shown = "-" if found["value"] is None else f"{found['value']:.4f}"
            table.add_row(name, shown, in_words(found["interval"]))
        if len(states := self.predicted_at) > 1:
            table.caption = (
                f"Warning: predictions come from {len(states)} states of code and device: {'; '.join(states)}."
            )
        return table


def beside(out: Path, ending: str) -> Path:
    """A file of a report's own, such as `a.png` of `a.json`, and `a.x.png` of `a.x`."""
    return out.with_name(out.name.removesuffix(".json") + ending)


def check_overwrites_nothing(out: Path, endings: tuple[str, ...] = ()) -> None:
    """Raise ValueError if `out`, the JSON file of a report, or a file of its name with one of the endings, such as
    `.png`, is there and holds something, and no run of ours wrote it."""
    twin = out.with_suffix("") if out.suffix == ".json" else out.with_name(f"{out.name}.json")
    if _is_report(twin):
        raise ValueError(f"{twin} is a report whose predictions would have the same name: choose another -o.")
    if beside(out, ".predictions.jsonl").exists() or _is_report(out):
        return
    for file in (out, *(beside(out, ending) for ending in endings)):
        if file.exists() and file.stat().st_size:
            raise ValueError(f"{file} is there and no report's: choose another -o, so that it is not overwritten.")


def _is_report(file: Path) -> bool:
    try:
        return "vora_version" in json.loads(file.read_text())
    except (OSError, ValueError, TypeError):
        return False


def commit() -> Commit:
    """The `Commit` of this package."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # another project's history around it is not its own
        changed = bool(git("status", "--porcelain", "--untracked-files=no", ".").strip())
        found: Any = {"commit": git("rev-parse", "HEAD").strip(), "commit_is_changed": changed}
    except (OSError, subprocess.CalledProcessError):
        found = {"commit": None, "commit_is_changed": None}
    return found | {"vora_version": sys.modules["vora"].__version__}


def commit_in_words(facts: Mapping[str, Any]) -> str:
    """The commit of a `Commit`, or the version where there is none; older facts have neither."""
    if facts["commit"] is None:
        return f"version {facts.get('vora_version', 'unknown')}"
    return f"{facts['commit'][:12]}{' with changes' if facts['commit_is_changed'] else ''}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
