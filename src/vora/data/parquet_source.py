"""Parquet files, and the Arrow files of `datasets`."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vora.data.columns import IMAGE_COLUMNS, Row
from vora.data.files import SPLITS
from vora.data.images import looks_like_media
from vora.data.source import Source

BYTES_PER_BLOCK, MOST_ROWS = 8 << 20, 512  # larger row groups of Parquet are read in parts
LARGE_GROUP = 512 << 20  # bytes of a row group, above which reading its parts is worth a warning
IMAGES = frozenset(IMAGE_COLUMNS)


class Parquet(Source):
    """Parquet files; a row group is a block, or, where it is large, a part of one."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        with pq.ParquetFile(file) as parquet:
            groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
        if large := [group.total_byte_size for group in groups if group.total_byte_size > LARGE_GROUP]:
            warnings.warn(
                f"{file} has {len(large)} row groups of up to {max(large) >> 20:,} MB, each part of which is read "
                "from the group's beginning: write it again with row_group_size=100, and it is read much faster.",
                stacklevel=2,
            )
        for number, group in enumerate(groups):
            num_parts = max(-(-group.total_byte_size // BYTES_PER_BLOCK), -(-group.num_rows // MOST_ROWS), 1)
            size = max(1, -(-group.num_rows // num_parts))
            for first in range(0, group.num_rows, size):
                last = min(first + size, group.num_rows)
                yield number, first, last, last - first

    def _read(self, file: str, *place: int) -> pa.Table:
        group, first, last = place
        columns = self.options.columns
        wanted = {*self.wanted, *(theirs for ours, theirs in columns.items() if ours in self.wanted)}
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
            every = parquet.schema_arrow.names
            names = [name for name in every if name in wanted] or every
            if IMAGES <= {*self.wanted} and not IMAGES & {*names, *columns}:  # to be refused rather than missed
                names = [name for name in every if name in names or looks_like_media(name)]
            batches, done, at_once = [], 0, min(256, last - first)
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=names, use_threads=False):
                if done + len(batch) > first:
                    skipped = max(0, first - done)
                    batches.append(batch.slice(skipped, last - done - skipped))
                done += len(batch)
                if done >= last:
                    break
        table = pa.Table.from_batches(batches)
        try:
            table = table.take(np.arange(len(table)))  # a slice would keep whole batches in memory
        except pa.ArrowNotImplementedError:
            pass  # of some kinds of columns it can be no other
        return _named_classes(table)

    def row(self, rows: pa.Table, offset: int) -> Row:
        return rows.slice(offset, 1).to_pylist()[0]


class Arrow(Source):
    """Arrow files as `datasets` keeps them: what it prepared from the Hub, or saved to disk."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        count = len(_arrow_table(file))
        for start in range(0, count, self.rows_per_block):
            yield start, min(self.rows_per_block, count - start)

    def _read(self, file: str, *place: int) -> list[Row]:
        # opened anew each time, so that what was mapped into memory goes again
        return _named_classes(_arrow_table(file).slice(place[0], self.rows_per_block)).to_pylist()


def prepared_files(path: str, subset: str | None, split: str) -> list[str]:
    """The Arrow files of a dataset that was saved to disk, or is fetched from the Hub and prepared once.

    Raises:
        ValueError: there is none, or it is of another split.
    """
    import datasets

    try:
        if Path(path).is_dir():
            dataset = datasets.load_from_disk(path)
            its_own = None if isinstance(dataset, dict) else str(dataset.split)
            dataset = dataset[split] if isinstance(dataset, dict) else dataset
        else:
            dataset, its_own = datasets.load_dataset(path, subset, split=split), None
    except Exception as error:  # datasets and the Hub raise many kinds
        raise ValueError(
            f"{path} is neither a file nor a folder here, nor a dataset that can be loaded from the Hub: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    if its_own in {*SPLITS} - {split}:
        raise ValueError(
            f"{path} is the split {its_own!r} and holds no files of the split {split!r}: name the one it is."
        )
    files = [file["filename"] for file in dataset.cache_files]
    if sum(len(_arrow_table(file)) for file in files) != len(dataset):
        raise ValueError(f"{path}: {split!r} is a part of a split: name a whole one, and say max_samples for less.")
    return files


def _arrow_table(file: str) -> pa.Table:
    from datasets.table import MemoryMappedTable

    return MemoryMappedTable.from_file(file).table


def _named_classes(table: pa.Table) -> pa.Table:
    """A table whose class labels (a feature of `datasets`), alone or in lists, are names instead of numbers."""
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for column, feature in features.items():
        known, kind = _class_names(feature)
        if column in table.column_names and known is not None:
            values = [_named(value, known) for value in table.column(column).to_pylist()]
            table = table.set_column(table.column_names.index(column), column, pa.array(values, kind))
    return table


def _class_names(feature: Any) -> tuple[list[str] | None, Any]:
    """The names of a feature's classes and the type of a column of them; (None, None) of what has none."""
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        return feature["names"], pa.string()
    inner = feature.get("feature") if isinstance(feature, dict) else feature
    inner = inner[0] if isinstance(inner, list) and len(inner) == 1 else inner
    if not isinstance(inner, dict):
        return None, None
    names, kind = _class_names(inner)
    return names, names and pa.list_(kind)


def _named(value: Any, names: list[str]) -> Any:
    """Of a label that is withheld, which is -1, None."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if value is not None and 0 <= value < len(names) else None
