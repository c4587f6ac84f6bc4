"""`export.json`, in which `vora export` says of a folder what it wrote there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

EXPORT_INFO = "export.json"


@dataclass(frozen=True)
class Export:
    """A folder that `vora export` wrote; of its other fields `export.json` has all."""

    to: ClassVar[str]  # as the command calls it
    folder: Path


OneExport = TypeVar("OneExport", bound=Export)


def write_export_info(export: Export, folder: Path) -> None:
    """Say in a folder what lies there."""
    values = {key: value for key, value in asdict(export).items() if key != "folder"}
    (folder / EXPORT_INFO).write_text(json.dumps(values, indent=1) + "\n")


def read_export_info(folder: Path, kind: type[OneExport]) -> OneExport:
    """What `vora export` wrote into a folder; ValueError where it is not of this kind."""
    try:
        return kind(folder, **json.loads((folder / EXPORT_INFO).read_text()))
    except OSError:
        what = "is missing there"
    except (ValueError, TypeError):
        what = "there is of something else"
    raise ValueError(f"{folder} is no folder of `vora export --to {kind.to}`: {EXPORT_INFO} {what}.")
