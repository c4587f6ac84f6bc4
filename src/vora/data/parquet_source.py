"""Parquet files, and the Arrow files of `datasets`."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vora.build.hub import did_you_mean, loading, may_be_hub_id
from vora.data.columns import IMAGE_COLUMNS, Row
from vora.data.files import SPLITS, say_once
from vora.data.images import looks_like_media
from vora.data.source import Source, bytes_of

BYTES_PER_BLOCK, MOST_ROWS = 8 << 20, 512  # larger row groups of Parquet are read in parts
MOST_GROUP_BYTES = 1 << 30  # of a row group that is read in parts without a warning
MOST_ROWS_PER_BYTE = 1000  # of a file; equal rows are packed so tightly, and no others
IMAGES = frozenset(IMAGE_COLUMNS)


class Parquet(Source):
    """Parquet files; a row group is a block, or, where it is large, a part of one."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        metadata, count = _metadata(file, os.stat(file).st_mtime_ns), 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            count += group.num_rows
            _check_count(file, count)
            if group.total_byte_size > MOST_GROUP_BYTES:
                gigabytes = group.total_byte_size / 1e9
                say_once(
                    f"{file}: a row group of {group.num_rows:,} rows has {gigabytes:.1f} GB, and is read "
                    "from its beginning for each part of it: write the file anew with row_group_size=1000"
                )
            num_parts = max(-(-group.total_byte_size // BYTES_PER_BLOCK), -(-group.num_rows // MOST_ROWS), 1)
            size = max(1, -(-group.num_rows // num_parts))
            for first in range(0, group.num_rows, size):
                last = min(first + size, group.num_rows)
                yield number, first, last, last - first

    def _read(self, file: str, *place: int) -> list[Row]:
        group, first, last = place
        columns = self.options.columns
        wanted = {*self.wanted, *(theirs for ours, theirs in columns.items() if ours in self.wanted)}
        metadata = _metadata(file, os.stat(file).st_mtime_ns)
        with pq.ParquetFile(file, metadata=metadata, pre_buffer=False, buffer_size=1 << 20) as parquet:
            every = parquet.schema_arrow.names
            names = [name for name in every if name in wanted] or every
            if IMAGES <= {*self.wanted} and not IMAGES & {*names, *columns}:  # to be refused rather than missed
                names = [name for name in every if name in names or looks_like_media(name)]
            rows: list[Row] = []
            done, at_once = 0, min(256, last - first)
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=names, use_threads=False):
                if done + len(batch) > first:
                    skipped = max(0, first - done)
                    rows += _rows_of(pa.Table.from_batches([batch]).slice(skipped, last - done - skipped))
                done += len(batch)
                if done >= last:
                    break
        return rows


class Arrow(Source):
    """Arrow files as `datasets` keeps them: what it prepared from the Hub, or saved to disk."""

    def _scanned(self, file: str) -> Iterator[Sequence[int]]:
        count = len(_arrow_table(file))
        _check_count(file, count)
        for start in range(0, count, self.rows_per_block):
            yield start, min(self.rows_per_block, count - start)

    def _read(self, file: str, *place: int) -> list[Row]:
        # opened anew each time, so that what was mapped into memory goes again
        table = _arrow_table(file).slice(place[0], self.rows_per_block)
        table.validate(full=True)  # a flipped bit of an offset would have bytes read that are not there
        return _rows_of(table)


def prepared_files(path: str, subset: str | None, split: str) -> list[str]:
    """The Arrow files of a dataset that was saved to disk, or is fetched from the Hub and prepared once; ValueError if
    there is none, or it is of another split."""
    import datasets

    try:
        if Path(path).is_dir():
            dataset = datasets.load_from_disk(path)
            its_own = None if isinstance(dataset, dict) else str(dataset.split)
            dataset = dataset[split] if isinstance(dataset, dict) else dataset
        elif not may_be_hub_id(path):
            raise ValueError(f"there is no file or folder {Path(path).absolute()}.{did_you_mean(path)}")
        else:
            with loading(path, "The dataset"):
                dataset, its_own = datasets.load_dataset(path, subset, split=split), None
    except Exception as error:  # datasets and the Hub raise many kinds
        raise ValueError(
            f"{path} is neither a file nor a folder here, nor a dataset that can be loaded from the Hub: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    if its_own in {*SPLITS} - {split}:
        raise ValueError(
            f"{path} is the split {its_own!r} and holds no files of the split {split!r}: name the one it is."
        )
    files = [file["filename"] for file in dataset.cache_files]
    if sum(len(_arrow_table(file)) for file in files) != len(dataset):
        raise ValueError(f"{path}: {split!r} is a part of a split: name a whole one, and say max_samples for less.")
    return files


def _check_count(file: str, count: int) -> None:
    """Raise ValueError where a file says that it has more rows than can be in it: each would be given a place."""
    size = os.path.getsize(file)
    if count > MOST_ROWS_PER_BYTE * size:
        raise ValueError(f"{file} claims {count:,} rows in {size:,} bytes: it is damaged, so write it anew.")


@lru_cache(maxsize=64)
def _metadata(file: str, changed: int) -> pq.FileMetaData:
    """A file's list of row groups, which is as long as they are many: it is not read anew for each of them."""
    return pq.read_metadata(file)


def _arrow_table(file: str) -> pa.Table:
    from datasets.table import MemoryMappedTable

    try:
        return MemoryMappedTable.from_file(file).table
    except pa.ArrowInvalid:
        if bytes_of(file, 0, 6) != b"ARROW1":
            raise
        raise ValueError(
            f"{file} is Arrow's file format, as Feather's, and its stream format is read: write Parquet."
        ) from None


def _rows_of(table: pa.Table) -> list[Row]:
    """The rows of a table, in which class labels (a feature of `datasets`), alone or in lists, are names."""
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    rows = table.to_pylist()
    for column, feature in features.items():
        if column in table.column_names and (names := _class_names(feature)):
            for row in rows:
                row[column] = _named(row[column], names)
    return rows


def _class_names(feature: Any) -> list[str] | None:
    """The names of the classes that a feature holds, itself or in lists; None of what has none."""
    match feature:
        case {"_type": "ClassLabel", "names": names}:
            return names
        case {"feature": inner} | [inner]:
            return _class_names(inner)
    return None


def _named(value: Any, names: list[str]) -> Any:
    """Of a label that is withheld, which is -1, None."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if value is not None and 0 <= value < len(names) else None
