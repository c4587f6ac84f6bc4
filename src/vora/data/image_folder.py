"""A folder of images: each with its caption in a text file beside it, or in a folder that is named as its class."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vora.data.columns import MOST_ROW_BYTES, Row, too_large
from vora.data.files import SPLITS, named_as, split_in
from vora.data.images import IMAGE_ENDINGS
from vora.data.source import Source

log = logging.getLogger("vora")


class ImageFolder(Source):
    """Images in folders, in the order of their paths. Where some have a text file of their name beside them, as
    `0.txt` beside `0.jpg`, those are captions; where none has, the first folder below the root is an image's class."""

    def __init__(self, name: str, root: Path, **further: Any) -> None:
        found, self.has_captions = _images_below(root)
        self.paths = b"\0".join(found)  # of a million images a tenth of what a list of texts takes
        kind = "captions" if self.has_captions else "classes"
        self.digest = f"{kind} {hashlib.sha256(self.paths).hexdigest()[:16]}"
        super().__init__(name, [root], **further | {"image_folder": str(root)})

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        def places() -> Iterator[tuple[int, int]]:
            start = 0
            while start < len(self.paths):
                end = self.paths.find(b"\0", start)
                end = len(self.paths) if end < 0 else end
                yield start, end
                start = end + 1

        return self._in_blocks(places())

    def _read(self, file: str, *place: int) -> list[Row | ValueError]:
        return [self._row(Path(file), path) for path in self._names(*place)]

    def _row(self, root: Path, path: str) -> Row | ValueError:
        if not self.has_captions:
            return {"image": path, "label": path.split("/")[0]}
        beside = (root / path).with_suffix(".txt")
        if not beside.exists() and (loud := beside.with_suffix(".TXT")).exists():
            beside = loud
        try:
            with beside.open("rb") as text:
                caption = text.read(MOST_ROW_BYTES + 1)
            if len(caption) > MOST_ROW_BYTES:
                return too_large(beside.stat().st_size, f"Its {beside.name}")
            return {"image": path, "caption": caption.decode("utf-8-sig").strip()}
        except FileNotFoundError:
            return ValueError(f"It has no caption: there is no {beside.name} beside it.")
        except OSError as error:
            return ValueError(f"Its {beside.name} cannot be read: {error.strerror}.")
        except UnicodeDecodeError as error:
            place = error.start
            return ValueError(f"Its {beside.name} is not in UTF-8: byte {place} is 0x{caption[place]:02x}.")

    def row_name(self, block: int, offset: int) -> str:
        return str(Path(self.files[0], self._names(*self.blocks[block, 1:].tolist())[offset]))

    def _names(self, start: int, end: int) -> list[str]:
        return [os.fsdecode(path) for path in self.paths[start:end].split(b"\0")]


def image_root(folder: Path, split: str, kinds: Sequence[str]) -> Path | None:
    """The folder whose images belong to a split: the one named as it, else the folder itself. None if it has no
    images, or files of data `kinds` somewhere, which say what images are. ValueError if other splits are in it."""
    endings = {Path(name).suffix.lower() for _, names in _walk(folder) for name in names}
    if not endings & {f".{ending}" for ending in IMAGE_ENDINGS} or endings & {*kinds}:
        return None
    folders = [one.name for one in sorted(folder.iterdir()) if one.is_dir() and not _is_hidden(one.name)]
    if own := [one for one in folders if _is_named(one, split)]:
        if left := [one for one in folders if not _are_splits([one], split)]:
            log.warning("%s: only the images in %s are read, not those in %s", folder, own[0], _some(left))
        return folder / own[0]
    if not _are_splits(folders, split):
        return folder
    raise ValueError(
        f"{folder} holds no files of the split {split!r}, only images of {_some(folders)}: name one of them as "
        f"the split or the path, or, if they are classes, put them into a folder {split!r} in it."
    )


def _are_splits(folders: Sequence[str], split: str) -> bool:
    """Whether folders are splits rather than classes: one is named as a split, but for digits, as train2017, or more
    than one of four has a split's name in it, as seg_train or testA; a steam_train among many is a class."""
    known = (*SPLITS, split)
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])|(?i:sets?$|(?<=train)val)", "_", name) for name in folders]
    alike = [name for name in names if any(split_in(name, one) for one in known)]
    letters = [re.sub(r"[\W\d_]", "", name) for name in alike]
    return len(alike) * 4 > len(folders) or any(_is_named(name, one) for name in letters for one in known)


def _is_named(name: str, split: str) -> bool:
    return re.fullmatch(named_as(split), name) is not None


def _is_hidden(name: str) -> bool:
    """Also what macOS packs beside everything."""
    return name.startswith(".") or name == "__MACOSX"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of all folders that are not hidden, each once: first those that lie there, then
    those that links name and that lie elsewhere."""
    above = {os.path.realpath(root), *map(str, Path(os.path.realpath(root)).parents)}
    seen, links = set[str](), [str(root)]
    while links:
        for folder, folders, names in os.walk(links.pop(0)):
            real = os.path.realpath(folder)
            if real in seen or (real in above and folder != str(root)):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            links += [place for name in folders if os.path.islink(place := os.path.join(folder, name))]
            yield folder, [name for name in names if not _is_hidden(name)]


def _images_below(root: Path) -> tuple[list[bytes], bool]:
    """(paths below a folder, sorted; whether some have a text file beside them). ValueError if there are neither
    captions nor classes."""
    found: list[bytes] = []
    captioned = False
    for folder, names in _walk(root):
        images = [name for name in names if _is_image(name)]
        texts = {name[:-4] for name in names if name.endswith((".txt", ".TXT"))}
        captioned = captioned or any(name.rpartition(".")[0] in texts for name in images)
        below = os.path.relpath(folder, root)
        found += [os.fsencode(os.path.normpath(os.path.join(below, name))) for name in images]
    classes = {path.partition(b"/")[0] if b"/" in path else b"" for path in found}
    if not captioned and (len(classes) < 2 or b"" in classes):
        raise ValueError(
            f"The {len(found)} images in {root} have neither captions nor classes: put a text file of the same name "
            "(.txt) beside each, or each into one of several folders named as its class. Where all steps only "
            "distill, any text will do."
        )
    return sorted(found), captioned


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS))
