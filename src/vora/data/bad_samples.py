"""Bad samples: named once in a file, counted, and too many of them stop a run."""

import json
from pathlib import Path

COUNTED_AT_LEAST = 1000  # samples read, as which fewer count: a first bad one is no tenth of all


class BadSamples:
    """Bad samples of a run, which several processes may name.

    Args:
        file: JSON Lines of `record`, the sample's name, and `cause`; None names none.
        max_share: more than this share of the samples read stops the run.
    """

    def __init__(self, file: Path | str | None, max_share: float) -> None:
        self.file, self.max_share = None if file is None else Path(file), max_share
        self.num_read, self.num_bad = 0, 0
        self._named: set[str] = set()
        self._read_to = 0
        if self.file is not None and self.file.exists():
            text = self.file.read_text()  # a killed run may have left its last line unfinished
            self.file.write_text(text[: text.rfind("\n") + 1])

    def add(self, name: str, cause: ValueError) -> None:
        """Count a bad sample and name it, once.

        Raises:
            ValueError: there are too many.
        """
        self.num_bad += 1
        if self.file is not None and name not in self._named:
            self._named |= self._named_since(self.file)
            if name not in self._named:
                self._named.add(name)
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as file:
                    file.write(json.dumps({"record": name, "cause": str(cause)}) + "\n")
        if self.num_bad > self.max_share * max(self.num_read, COUNTED_AT_LEAST):
            raise ValueError(
                f"{self.num_bad} of the {self.num_read} samples read are bad, the last one {name}: {cause} All are "
                f"named in {self.file}; mend or remove them, or raise data.max_bad_share."
            )

    def _named_since(self, path: Path) -> set[str]:
        """The samples that the file names since it was last read, by this process or another, in whole lines: one may
        be writing its last."""
        if not path.exists():
            return set()
        with path.open("rb") as file:
            file.seek(self._read_to)
            whole = file.read().rpartition(b"\n")[0]
        self._read_to += len(whole) + 1 if whole else 0
        return {json.loads(line)["record"] for line in whole.splitlines()}
