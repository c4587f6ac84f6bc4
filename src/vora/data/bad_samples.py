"""Bad samples: named once in a file, counted, and too many of them stop a run."""

import json
from pathlib import Path

COUNTED_AT_LEAST = 1000  # samples read, as which fewer count: a first bad one is no tenth of all


class BadSamples:
    """Bad samples of a run, which several processes may name in a file of JSON Lines: `record`, the sample's name, and
    `cause`. More than `max_share` of the samples read stop the run."""

    def __init__(self, file: Path | str | None, max_share: float) -> None:
        self.file, self.max_share = None if file is None else Path(file), max_share
        self.num_read, self.num_bad = 0, 0
        self._named: set[str] = set()
        self._read_to = 0
        if self.file is not None and self.file.exists():
            text = self.file.read_text()  # a killed run may have left its last line unfinished
            self.file.write_text(text[: text.rfind("\n") + 1])

    def add(self, name: str, cause: ValueError) -> None:
        """Count a bad sample and name it, once; ValueError if there are too many."""
        self.num_bad += 1
        if self.file is not None and name not in self._named:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab+") as file:
                file.seek(self._read_to)  # what this process or another has named since, in whole lines
                whole = file.read().rpartition(b"\n")[0]
                self._read_to += len(whole) + 1 if whole else 0
                self._named |= {json.loads(line)["record"] for line in whole.splitlines()}
                if name not in self._named:
                    self._named.add(name)
                    file.write(json.dumps({"record": name, "cause": str(cause)}).encode() + b"\n")
        if self.num_bad > self.max_share * max(self.num_read, COUNTED_AT_LEAST):
            raise ValueError(
                f"{self.num_bad} of the {self.num_read} samples read are bad, the last one {name}: {cause} All are "
                f"named in {self.file}; mend or remove them, or raise data.max_bad_share."
            )
