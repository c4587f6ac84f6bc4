"""Which files a path means, and which of them belong to a split."""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

log = logging.getLogger("vora")

SPLITS = ("train", "validation", "valid", "val", "test", "dev", "eval")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


def files_of(path: str, split: str, kinds: Sequence[str]) -> list[Path] | None:
    """The files of some `kinds` (endings, as `.parquet`) that a path means: of a file, a pattern, or a folder with
    files, in itself, in `data/`, or in a folder named as the split, or none, if it has none of any split; None if it
    is a dataset's folder or id. ValueError if they are of other splits, or some of them are compressed."""
    place = Path(path)
    if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
        raise ValueError(f"{path} is a model's folder, and no data: name files of data here, and models by -m.")
    if place.is_file():
        if place.suffix.lower() not in kinds:
            raise ValueError(f"{path} is none of the kinds {', '.join(kinds)}: rename or convert it.")
        return [place]
    if not place.is_dir() and any(mark in path for mark in "*?["):
        found = sorted(Path(place.anchor or ".").glob(path[len(place.anchor) :]))
        files = _readable(found, kinds)
        _check_not_compressed(found, files, kinds)
        if not found:
            raise ValueError(f"{path} matches 0 files: check the folder before it, or leave that source out.")
        if not files:
            raise ValueError(f"{path} matches {len(found)} files, none of the kinds {', '.join(kinds)}.")
        return files
    if not place.is_dir() or (place / "state.json").exists() or (place / "dataset_dict.json").exists():
        return None
    own = [one for one in sorted(place.iterdir()) if one.is_dir() and re.fullmatch(named_as(split), one.name)]
    every: list[Path] = []
    for folder in (*own, place, place / "data"):
        found = sorted(folder.glob("*"))
        every += found
        files = [file for file in _readable(found, kinds) if file.name != "dataset_info.json"]
        if folder not in own and any(split_in(file.stem, known) for file in files for known in (*SPLITS, split)):
            others = [file for file in files if not any(split_in(file.stem, known) for known in (*SPLITS, split))]
            files = [file for file in files if split_in(file.stem, split)]
            if files and others:
                say_once(
                    f"{folder}: the {len(others)} files that name no split are NOT read, such as {others[0].name}"
                )
            found = [file for file in found if split_in(file.stem, split)]
        if files:
            _check_not_compressed(found, files, kinds)
            return files
    if not _readable(every, kinds):
        _check_not_compressed(every, [], kinds)
        return []
    raise no_files(path, split, kinds)


@cache
def say_once(text: str) -> None:
    """Warn; a command opens its data several times."""
    log.warning(text)


def no_files(path: str, split: str, kinds: Sequence[str]) -> ValueError:
    """What says that a folder has nothing to read."""
    return ValueError(
        f"{path} holds no files of the split {split!r} of the kinds {', '.join(kinds)}: check data.sources."
    )


def _readable(files: Iterable[Path], kinds: Sequence[str]) -> list[Path]:
    """Those that are read, without hidden ones: macOS puts ._x beside x."""
    return [file for file in files if file.suffix.lower() in kinds and not file.name.startswith(".")]


def _check_not_compressed(found: Iterable[Path], chosen: Sequence[Path], kinds: Sequence[str]) -> None:
    """Raise ValueError for compressed files that belong to the chosen ones, and would be missed."""
    wanted, names = {file.suffix.lower() for file in chosen} or {*kinds} - {".tar"}, {file.name for file in chosen}
    packed = [file for file in found if file.suffix.lower() in COMPRESSED and file.stem not in names]
    packed = [file for file in packed if Path(file.stem).suffix.lower() in wanted]
    if packed:
        raise ValueError(f"{len(packed)} compressed files, such as {packed[0]}, are not read: unpack them first.")


def named_as(split: str) -> str:
    """A pattern of a split's name: train, Train or training."""
    return rf"(?i:{re.escape(split)}(ing)?)"


def split_in(name: str, split: str) -> bool:
    """Whether a split's name stands in another, between what are no letters."""
    return re.search(rf"(?<![a-zA-Z]){named_as(split)}(?![a-zA-Z])", name) is not None
