"""Predictions as they come, in a file from which a stopped evaluation goes on."""

import hashlib
import json
import os
from pathlib import Path

NUM_SAMPLES, SAMPLE_BYTES = 256, 4096  # of a file, for its fingerprint


class PredictionCache:
    """One JSON object per line: first what was asked of whom, then one per example, flushed batch by batch.

    Args:
        file: where the lines are.
        conditions: {name: value} of all that predictions depend on.
        predicted_at: by which code on which device lines are added, in words; each line says so.

    Raises:
        ValueError: the file was begun under other conditions; those that differ are named.
    """

    def __init__(self, file, conditions, predicted_at="unknown"):
        self.file, self.done, self.seconds, self.predicted_at = Path(file), {}, 0.0, predicted_at
        self.others = []  # states of other ledgers of the report
        conditions = json.loads(json.dumps(conditions))
        lines = self._whole_lines()
        if not lines:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps({"conditions": conditions}) + "\n")
        else:
            self._check_same(lines[0].get("conditions"), conditions)
        for line in lines[1:]:
            self.seconds += line.get("seconds", 0.0)
            if "bad" not in line:  # those are asked again: an image may be readable now
                self.done[line["index"]] = line
        self.num_found = len(self.done)

    def add(self, lines):
        """Append what a batch gave; each line has an `index`."""
        lines = [line | {"predicted_at": self.predicted_at} for line in lines]
        with self.file.open("a") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.done |= {line["index"]: line for line in lines}

    @property
    def states(self):
        """By which code on which devices lines came about; those of before it was written down are of unknown ones."""
        return list(dict.fromkeys([line.get("predicted_at", "unknown") for line in self.done.values()] + self.others))

    def count_in(self, other):
        """Take the seconds and the states of another ledger of the same report for one's own."""
        self.seconds += other.seconds
        self.others += other.states

    def rewrite(self, lines):
        """All lines anew, with their scores, in the order of the examples."""
        header = self.file.read_text().split("\n", 1)[0]
        beside = self.file.with_name(self.file.name + ".new")
        beside.write_text(header + "\n" + "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        os.replace(beside, self.file)

    def _whole_lines(self):
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

    def _check_same(self, found, wanted):
        if found is None:
            raise ValueError(f"{self.file} is no file of predictions: delete it, or choose another -o.")
        found, wanted = _flat(found), _flat(wanted)
        differ = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if differ:
            told = "; ".join(f"{name} was {_short(found.get(name))}, is {_short(wanted.get(name))}" for name in differ)
            raise ValueError(
                f"{self.file} holds predictions made under other conditions: {told}. Choose another -o, or delete it."
            )


def _flat(conditions, before=""):
    """`{"settings": {"seed": 0}}` to `{"settings.seed": 0}`."""
    flat = {}
    for name, value in conditions.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat


def _short(value):
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."


def fingerprint(file):
    """Size and a hash of samples of a file, spread over it: a model of many gigabytes is told in milliseconds."""
    file = Path(file)
    size, found = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as data:
        for number in range(NUM_SAMPLES):
            data.seek(number * max(0, size - SAMPLE_BYTES) // max(1, NUM_SAMPLES - 1))
            found.update(data.read(SAMPLE_BYTES))
    return f"{size}-{found.hexdigest()[:16]}"


def fingerprints(files):
    """{name: fingerprint} of files in the order in which they are read; of several, each name with its number."""
    numbers = [f"{number} " if len(files) > 1 else "" for number in range(len(files))]
    return {number + Path(file).name: fingerprint(file) for number, file in zip(numbers, files)}


def model_fingerprint(name):
    """Of a folder's configuration and weights; of a hub id, its name."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    kinds = (".json", ".safetensors", ".jinja", ".gguf", ".bin", ".model")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds and file.is_file()]
    return hashlib.sha256(" ".join(f"{file.name} {fingerprint(file)}" for file in files).encode()).hexdigest()[:16]
