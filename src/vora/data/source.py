"""Files as rows in blocks, of which only those in use are in memory.

A block is what is read at once: a row group of Parquet, some lines of JSON, some samples of a tar file. A source knows
how many rows each of its blocks holds, and nothing else of what is in them.
"""

import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from vora.data.columns import COLUMNS, MOST_ROW_BYTES, Row, RowOptions
from vora.data.guess import columns_read, folder_of_images, guessed_columns, images_not_read
from vora.data.schema import to_sample

ReadRow: TypeAlias = Callable[[Row, str, str, RowOptions], Any]  # row, its name, folder of its images
Rows: TypeAlias = Sequence[Row | ValueError]  # of a broken row, what is wrong with it
FIRST_ROWS = 512  # of which one must be of use
MOST_BLOCK_BYTES = 4 * MOST_ROW_BYTES  # of some lines; a larger line is a block alone, and is not read


class Source:
    """Rows in blocks; `source[i]` is what `read_row` makes of a row, by default a `Sample`. ValueError if there are no
    rows, a file cannot be read, or none of the first rows has a layout.

    Args:
        name: for messages.
        image_folder: where paths of images start; by default the folder of the file that names them, or the only one
            in it that has the first image (`guessed_folder`).
        max_samples: the first so many rows only.
        wanted: the columns that `read_row` looks at; files that allow it are read no further.
        is_checked: whether one of the first rows must be of use.
    """

    rows_per_block = 128  # where the file itself has no blocks
    digest: str | None = None  # of what rows are made of, where that is not in `files`

    def __init__(
        self,
        name: str,
        files: Iterable[str | Path],
        image_folder: str | Path | None = None,
        options: RowOptions = RowOptions(),
        max_samples: int | None = None,
        read_row: ReadRow = to_sample,
        wanted: Collection[str] = COLUMNS,
        is_checked: bool = True,
    ) -> None:
        self.name, self.files = name, [str(file) for file in files]
        self.image_folder = None if image_folder is None else str(image_folder)
        self.options, self.read_row, self.wanted = options, read_row, wanted
        blocks = [(f, *place, count) for f, file in enumerate(self.files) for *place, count in self._scanned(file)]
        sizes = np.array([block[-1] for block in blocks], np.int64)
        self.blocks = np.array([block[:-1] for block in blocks], np.int64)
        if max_samples is not None:
            sizes = np.diff(np.minimum(sizes.cumsum(), max_samples), prepend=0)
        self.blocks, self.block_sizes = self.blocks[sizes > 0], sizes[sizes > 0]
        self.starts = self.block_sizes.cumsum() - self.block_sizes
        rows = self._first_rows() if len(self) else []
        self.guessed_folder = None
        if rows and image_folder is None and len({Path(file).parent for file in self.files}) == 1:
            self.image_folder = self.guessed_folder = folder_of_images(rows, self._folder_of(0))
        self.guessed = guessed_columns(rows, options.columns, self._folder_of(0) if rows else None)
        if self.guessed:
            self.options = replace(options, columns={**options.columns, **self.guessed})
        self.columns_read, self.columns_not_read = columns_read(rows, self.options.columns)
        self.images_not_read = images_not_read(rows, self.columns_read, self.columns_not_read)
        self._cached: tuple[int | None, Rows] = (None, [])
        if len(self) == 0:
            raise ValueError(f"{name} holds 0 rows: an empty dataset cannot be trained on.")
        if is_checked:
            self._check_layout()

    def __len__(self) -> int:
        return int(self.block_sizes.sum())

    def __getitem__(self, index: int) -> Any:
        """Neighbours are fast: a block stays in memory until another is asked for."""
        index = range(len(self))[index]
        block = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self._cached[0] != block:
            self._cached = (block, self.read_block(block))
        return self.item(block, index - int(self.starts[block]), self._cached[1])

    def _first_rows(self) -> Rows:
        """The rows of the first block with all columns that the file has."""
        wanted, self.wanted = self.wanted, ()
        rows = self.read_block(0)
        self.wanted = wanted
        return rows

    def row_name(self, block: int, offset: int) -> str:
        """Where a row stands: file and number in it."""
        file = self.blocks[block, 0]
        first = np.searchsorted(self.blocks[:, 0], file)
        return f"{self.files[file]}:{self.starts[block] - self.starts[first] + offset}"

    def item(self, block: int, offset: int, rows: Rows) -> Any:
        """What a row of a block that `read_block` has read becomes; ValueError if it is not what a layout says."""
        row = rows[offset]
        if isinstance(row, ValueError):
            raise row
        try:
            return self.read_row(row, self.row_name(block, offset), self._folder_of(block), self.options)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
            raise ValueError(f"It is not built as its layout is: {type(error).__name__}: {error}") from None

    def _folder_of(self, block: int) -> str:
        """Where paths of a block's images start."""
        return self.image_folder or str(Path(self.files[self.blocks[block, 0]]).parent)

    def read_block(self, number: int) -> Rows:
        """The rows of a block. One that cannot be read is a block of bad rows: a long run goes on."""
        size = int(self.block_sizes[number])
        rows: Rows = []
        try:
            rows = self._read(self.files[self.blocks[number, 0]], *self.blocks[number, 1:].tolist())
            cause = f"{len(rows)} of {size} rows are there, so the file is damaged or has changed since it was opened"
        except (OSError, ValueError, RecursionError, pa.ArrowException, tarfile.TarError) as error:
            cause = " ".join(str(error).split())[:200]
        missing = [ValueError(f"Its part of the file cannot be read: {cause}")] * (size - len(rows))
        return [*rows, *missing] if missing else rows

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        """(places..., number of rows) of each block of a file."""
        raise NotImplementedError

    def _read(self, file: str, *place: int) -> Rows:
        raise NotImplementedError

    def _in_blocks(self, rows: Iterator[tuple[int, int]]) -> Iterator[Sequence[int]]:
        """(first byte, byte after the last, number of rows) of each block, of those bytes of each row."""
        first, last, count = 0, 0, 0
        for start, end in rows:
            if count and (count == self.rows_per_block or end - first > MOST_BLOCK_BYTES):
                yield first, last, count
                count = 0
            first, last, count = start if not count else first, end, count + 1
        if count:
            yield first, last, count

    def _check_layout(self) -> None:
        """Raise ValueError unless one of the first rows can be used, and the names in `columns` are not misspelt."""
        columns, count, is_used = self.options.columns, 0, False
        cause: ValueError | None = None
        known: set[str] = set()
        for block, size in enumerate(self.block_sizes):
            rows = self.read_block(block)
            known |= {name for row in rows if isinstance(row, dict) for name in row}
            for offset in range(size if not is_used else 0):
                try:
                    self.item(block, offset, rows)
                    is_used = True
                    break
                except ValueError as error:
                    cause = cause or error
            count += int(size)
            if count >= FIRST_ROWS or (is_used and known.issuperset(columns.values())):
                break
        for ours, theirs in columns.items():
            # rows to come may have it, unless it stands beside ours, which would be read instead
            if ours in self.wanted and theirs not in known and (count == len(self) or ours in known):
                raise ValueError(
                    f"columns: {ours} is to be read from {theirs!r}, but none of {count} rows of {self.name} has it; "
                    f"they have {', '.join(sorted(map(str, known)))}."
                )
        if not is_used:
            raise ValueError(f"{self.name}: none of its first {count} rows can be used. The first: {cause}")


def bytes_of(file: str, start: int, end: int) -> bytes:
    with open(file, "rb") as content:
        content.seek(start)
        return content.read(end - start)
