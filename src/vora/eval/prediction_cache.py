"""Predictions as they come, in a file from which a stopped evaluation goes on."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.generic import flatten_dict

FINGERPRINT = re.compile(r"(\d+-)?[0-9a-f]{16}")

Line = dict[str, Any]  # one prediction: `index`, `name`, and what the evaluation writes down

NUM_SAMPLES, SAMPLE_BYTES = 256, 4096  # of a file, for its fingerprint


class PredictionCache:
    """One JSON object per line: first the conditions, {name: value} of all that predictions depend on, then one `Line`
    per example, flushed batch by batch; each says by which code on which device it was `predicted_at`. `done` is
    {index: line}, `num_found` how many were there, `seconds` what these took. ValueError if the file was begun under
    other conditions; those that differ are named."""

    def __init__(self, file: Path, conditions: dict[str, Any], predicted_at: str = "unknown") -> None:
        self.file, self.predicted_at = Path(file), predicted_at
        self.done: dict[int, Line] = {}
        self.seconds = 0.0
        self.other_states: list[str] = []  # of other caches of the report
        conditions = json.loads(json.dumps(conditions))
        lines = self._whole_lines()
        if not lines:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_bytes(_encoded([{"conditions": conditions}]))
        else:
            self._check_same(lines[0].get("conditions"), conditions)
        for line in lines[1:]:
            self.seconds += line.get("seconds", 0.0)
            if "bad" not in line:  # those are tried again: an image may be readable now
                self.done[line["index"]] = line
        self.num_found = len(self.done)

    def add(self, lines: Iterable[Line]) -> None:
        """Append what a batch gave; each line has an `index`."""
        lines = [line | {"predicted_at": self.predicted_at} for line in lines]
        with self.file.open("ab") as file:
            file.write(_encoded(lines))
        self.done |= {line["index"]: line for line in lines}

    @property
    def states(self) -> list[str]:
        """By which code on which devices lines came about; those of before it was written down are of unknown ones."""
        states = [line.get("predicted_at", "unknown") for line in self.done.values()]
        return list(dict.fromkeys(states + self.other_states))

    def count_in(self, other: "PredictionCache") -> None:
        """Take the seconds and the states of another cache of the same report for one's own."""
        self.seconds += other.seconds
        self.other_states += other.states

    def rewrite(self, lines: Iterable[Line]) -> None:
        """All lines anew, with their scores, in the order of the examples."""
        header = self.file.read_bytes().split(b"\n", 1)[0]
        beside = self.file.with_name(self.file.name + ".new")
        beside.write_bytes(header + b"\n" + _encoded(lines))
        os.replace(beside, self.file)

    def _whole_lines(self) -> list[Line]:
        """What the file holds; half a line at its end, where a process died, is cut off."""
        if not self.file.exists():
            return []
        data = self.file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.file.write_bytes(whole)
        try:
            return [json.loads(line) for line in whole.splitlines() if line]
        except ValueError as error:
            raise ValueError(
                f"{self.file} is no file of predictions ({error}): delete it, or choose another -o."
            ) from None

    def _check_same(self, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
        if found is None:
            raise ValueError(f"{self.file} is no file of predictions: delete it, or choose another -o.")
        found, wanted = flatten_dict(found), flatten_dict(wanted)
        differ = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if differ:
            changes = "; ".join(_change(name, found.get(name), wanted.get(name)) for name in differ)
            cause = f"{self.file} holds predictions made under other conditions: {changes}"
            raise ValueError(f"{cause}. Choose another -o, or delete it.")


def _change(name: str, before: Any, now: Any) -> str:
    """What differs, in words; what is known by a fingerprint is only said to be another."""
    if any(isinstance(value, str) and FINGERPRINT.fullmatch(value) for value in (before, now)):
        return f"{name} was another"
    return f"{name} was {json.dumps(before)[:120]}, is {json.dumps(now)[:120]}"


def _encoded(lines: Iterable[Line]) -> bytes:
    """JSON lines; a lone surrogate becomes its escape, which JSON reads as the same."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "backslashreplace")


def fingerprint(file: str | Path) -> str:
    """Size and a hash of samples of a file, spread over it: a model of many gigabytes is told in milliseconds. Of a
    folder, names and sizes of what is in it."""
    file = Path(file)
    if file.is_dir():
        inside = sorted((str(one.relative_to(file)), one.stat().st_size) for one in file.rglob("*") if one.is_file())
        return f"{len(inside)}-{hashlib.sha256(repr(inside).encode()).hexdigest()[:16]}"
    size, found = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as data:
        for number in range(NUM_SAMPLES):
            data.seek(number * max(0, size - SAMPLE_BYTES) // max(1, NUM_SAMPLES - 1))
            found.update(data.read(SAMPLE_BYTES))
    return f"{size}-{found.hexdigest()[:16]}"


def fingerprints(files: Sequence[str | Path]) -> dict[str, str]:
    """{name: fingerprint} of files in the order in which they are read; of several, each name with its number."""
    numbers = [f"{number} " if len(files) > 1 else "" for number in range(len(files))]
    return {number + Path(file).name: fingerprint(file) for number, file in zip(numbers, files)}


def model_fingerprint(name: str | Path) -> str:
    """Of a folder's configuration and weights; of a hub id, its name."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    kinds = (".json", ".safetensors", ".jinja", ".gguf", ".bin", ".model")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds and file.is_file()]
    return hashlib.sha256(" ".join(f"{file.name} {fingerprint(file)}" for file in files).encode()).hexdigest()[:16]
