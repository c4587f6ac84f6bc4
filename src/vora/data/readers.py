"""Files and datasets as rows in blocks, of which only those in use are in memory.

A block is what is read at once: a row group of Parquet, some lines of JSON, some samples of a tar file. A source knows
how many rows each of its blocks holds, and nothing else of what is in them.
"""

import io
import json
import re
import tarfile
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vora.build.fetch import wheel_files
from vora.data.files import SPLITS, files_of
from vora.data.prompts import DEFAULT_PROMPTS
from vora.data.schema import COLUMNS, IMAGE_COLUMNS, IMAGE_ENDINGS, looks_like_images, record_of_row, with_columns

EASY_VQA = "easy-vqa"
ROWS_PER_BLOCK = 128  # where the file itself has no blocks
BYTES_PER_BLOCK, MOST_ROWS = 8 << 20, 512  # larger row groups of Parquet are read in parts
LARGE_GROUP = 512 << 20  # bytes of a row group, above which reading its parts is worth a warning
IMAGES = frozenset(IMAGE_COLUMNS)
UNREAD_MEDIA = ("heic", "heif", "avif", "jxl", "jp2", "ppm", "npy", "mp4", "webm", "mov", "avi", "mkv", "mpeg", "mpg")
UNREAD_ROWS = 512  # of the first rows, of which one must be of use


class Source:
    """Rows in blocks.

    Args:
        name: of the source, for messages.
        files: paths.
        image_folder: where paths of images start; by default the folder of the file that names them.
        prompts: see `record_of_row`.
        columns: {our name: the file's name} of columns; what is named so goes before what has our names by chance.
        max_samples: the first so many rows only.
        read_row: what makes an item of a row; takes and raises what `record_of_row` does.
        wanted: the columns that it looks at; files that allow it are read no further.
        is_checked: whether one of the first rows must be of use.

    Raises:
        ValueError: no row is there, a file cannot be read, or none of the first rows has a layout.
    """

    def __init__(
        self,
        name,
        files,
        image_folder=None,
        prompts=DEFAULT_PROMPTS,
        columns=None,
        max_samples=None,
        read_row=record_of_row,
        wanted=COLUMNS,
        is_checked=True,
    ):
        self.read_row, self.wanted = read_row, wanted
        self.name, self.files = name, [str(file) for file in files]
        self.image_folder = None if image_folder is None else str(image_folder)
        self.prompts, self.columns = prompts, dict(columns or {})
        blocks = [(f, *place, count) for f, file in enumerate(self.files) for *place, count in self._scanned(file)]
        sizes = np.array([block[-1] for block in blocks], np.int64)
        self.blocks = np.array([block[:-1] for block in blocks], np.int64)
        if max_samples is not None:
            sizes = np.diff(np.minimum(sizes.cumsum(), max_samples), prepend=0)
        self.blocks, self.block_sizes = self.blocks[sizes > 0], sizes[sizes > 0]
        self.starts = self.block_sizes.cumsum() - self.block_sizes
        self._cached = (None, None)
        if len(self) == 0:
            raise ValueError(f"{name} holds 0 rows: an empty dataset cannot be trained on.")
        if is_checked:
            self._check_layout()

    def __len__(self):
        return int(self.block_sizes.sum())

    def __getitem__(self, index):
        """The `Record` of a row; neighbours are fast: a block stays in memory until another is asked for."""
        index = range(len(self))[index]
        block = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self._cached[0] != block:
            self._cached = (block, self.read_block(block))
        return self.record(block, index - int(self.starts[block]), self._cached[1])

    def row_name(self, block, offset):
        """Where a row stands: file and number in it."""
        file = self.blocks[block, 0]
        first = np.searchsorted(self.blocks[:, 0], file)
        return f"{self.files[file]}:{self.starts[block] - self.starts[first] + offset}"

    def record(self, block, offset, rows):
        """The record of a row of a block that `read_block` has read.

        Raises:
            ValueError: the row is not what a layout says.
        """
        row = rows[offset] if isinstance(rows, list) else self.row(rows, offset)
        if isinstance(row, ValueError):
            raise row
        folder = self.image_folder or str(Path(self.files[self.blocks[block, 0]]).parent)
        try:
            row = with_columns(dict(row), self.columns, alone=self.read_row is record_of_row)
            return self.read_row(row, self.row_name(block, offset), folder, self.prompts)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"It is not built as its layout is: {type(error).__name__}: {error}") from None

    def read_block(self, number):
        """The rows of a block: a list of dicts, and of ValueErrors for broken ones; or what `row` takes.

        A block that cannot be read is a block of bad rows: a long run goes on.
        """
        try:
            return self._read(self.files[self.blocks[number, 0]], *self.blocks[number, 1:].tolist())
        except (OSError, ValueError, RecursionError, pa.ArrowException, tarfile.TarError) as error:
            cause = ValueError(f"Its part of the file cannot be read: {' '.join(str(error).split())[:200]}")
            return [cause] * int(self.block_sizes[number])

    def row(self, rows, offset):
        """A row of a block, where that is no list, as a dict."""
        raise NotImplementedError

    def _scanned(self, file):
        """Yields (places..., number of rows) for each block of a file."""
        raise NotImplementedError

    def _read(self, file, *place):
        raise NotImplementedError

    def _check_layout(self):
        """Raise ValueError unless one of the first rows can be used, and the names in `columns` are not misspelt."""
        cause, count, is_used, known = None, 0, False, set()
        for block, size in enumerate(self.block_sizes):
            rows = self.read_block(block)
            known |= _columns_of(rows)
            for offset in range(size if not is_used else 0):
                try:
                    self.record(block, offset, rows)
                    is_used = True
                    break
                except ValueError as error:
                    cause = cause or error
            count += int(size)
            if count >= UNREAD_ROWS or (is_used and known.issuperset(self.columns.values())):
                break
        for ours, theirs in self.columns.items():
            # rows to come may have it, unless it stands beside ours, which would be read instead
            if ours in self.wanted and theirs not in known and (count == len(self) or ours in known):
                raise ValueError(
                    f"columns: {ours} is to be read from {theirs!r}, but none of {count} rows of {self.name} has it; "
                    f"they have {', '.join(sorted(map(str, known)))}."
                )
        if not is_used:
            raise ValueError(f"None of the first {count} rows of {self.name} can be used. The first: {cause}")


def _columns_of(rows):
    """The names of columns in what `read_block` gives."""
    if not isinstance(rows, list):
        return set(rows.column_names)
    return {name for row in rows if isinstance(row, dict) for name in row}


class Parquet(Source):
    """Parquet files; a row group is a block, or, where it is large, a part of one."""

    def _scanned(self, file):
        with pq.ParquetFile(file) as parquet:
            groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
            if large := [group.total_byte_size for group in groups if group.total_byte_size > LARGE_GROUP]:
                warnings.warn(
                    f"{file} has {len(large)} row groups of up to {max(large) >> 20:,} MB, each part of which is read "
                    "from the group's beginning: write it again with row_group_size=100, and it is read much faster.",
                    stacklevel=2,
                )
            for group in range(parquet.num_row_groups):
                found = groups[group]
                num_parts = max(-(-found.total_byte_size // BYTES_PER_BLOCK), -(-found.num_rows // MOST_ROWS), 1)
                size = max(1, -(-found.num_rows // num_parts))
                for first in range(0, found.num_rows, size):
                    last = min(first + size, found.num_rows)
                    yield group, first, last, last - first

    def _read(self, file, group, first, last):
        wanted = {*self.wanted, *(theirs for ours, theirs in self.columns.items() if ours in self.wanted)}
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
            every = parquet.schema_arrow.names
            names = [name for name in every if name in wanted] or every
            if IMAGES <= {*self.wanted} and not IMAGES & {*names, *self.columns}:  # to be refused rather than missed
                names = [name for name in every if name in names or looks_like_images(name)]
            batches, place, at_once = [], 0, min(256, last - first)
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=names, use_threads=False):
                if place + len(batch) > first:
                    skipped = max(0, first - place)
                    batches.append(batch.slice(skipped, last - place - skipped))
                place += len(batch)
                if place >= last:
                    break
            table = pa.Table.from_batches(batches)
            try:
                table = table.take(np.arange(len(table)))  # a slice would keep whole batches in memory
            except pa.ArrowNotImplementedError:
                pass  # of some kinds of columns it can be no other
            return _named_classes(table)

    def row(self, rows, offset):
        return rows.slice(offset, 1).to_pylist()[0]


class Arrow(Source):
    """Arrow files as `datasets` keeps them: what it prepared from the Hub, or saved to disk."""

    def _scanned(self, file):
        count = len(_arrow_table(file))
        for start in range(0, count, ROWS_PER_BLOCK):
            yield start, min(ROWS_PER_BLOCK, count - start)

    def _read(self, file, start):
        # opened anew each time, so that what was mapped into memory goes again
        return _named_classes(_arrow_table(file).slice(start, ROWS_PER_BLOCK)).to_pylist()


def _arrow_table(file):
    from datasets.table import MemoryMappedTable

    return MemoryMappedTable.from_file(file).table


def _named_classes(table):
    """A table whose class labels (a feature of `datasets`), alone or in lists, are names instead of numbers."""
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for column, feature in features.items():
        known, kind = _class_names(feature)
        if column in table.column_names and known is not None:
            values = [_named(value, known) for value in table.column(column).to_pylist()]
            table = table.set_column(table.column_names.index(column), column, pa.array(values, kind))
    return table


def _class_names(feature):
    """The names of a feature's classes and the type of a column of them; (None, None) of what has none."""
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        return feature["names"], pa.string()
    inner = feature.get("feature") if isinstance(feature, dict) else feature
    inner = inner[0] if isinstance(inner, list) and len(inner) == 1 else inner
    if not isinstance(inner, dict):
        return None, None
    names, kind = _class_names(inner)
    return names, names and pa.list_(kind)


def _named(value, names):
    """Of a label that is withheld, which is -1, None."""
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    return names[value] if value is not None and 0 <= value < len(names) else None


class JsonLines(Source):
    """One JSON object per line."""

    def _scanned(self, file):
        start = place = count = 0
        with open(file, "rb") as lines:
            for line in lines:
                if line.strip():
                    count += 1
                place += len(line)
                if count == ROWS_PER_BLOCK:
                    yield start, place, count
                    start, count = place, 0
        yield start, place, count

    def _read(self, file, start, end):
        with open(file, "rb") as lines:
            lines.seek(start)
            return [_json_row(line) for line in lines.read(end - start).split(b"\n") if line.strip()]


class JsonArray(Source):
    """One JSON file that holds a list of objects, as LLaVA's; it is scanned once and read in parts."""

    def _scanned(self, file):
        start, count, end = None, 0, 0
        for place, end in _elements(file):
            start = place if start is None else start
            count += 1
            if count == ROWS_PER_BLOCK:
                yield start, end, count
                start, count = None, 0
        if count:
            yield start, end, count

    def _read(self, file, start, end):
        with open(file, "rb") as text:
            text.seek(start)
            rows = json.loads("[" + text.read(end - start).decode(errors="replace") + "]")
        return [_dict_or_error(row) for row in rows]


def _json_row(line):
    try:
        return _dict_or_error(json.loads(line))
    except ValueError as error:
        return ValueError(f"It is no JSON: {error}")


def _dict_or_error(row):
    return row if isinstance(row, dict) else ValueError(f"It is a {type(row).__name__}, not an object with keys.")


def _elements(file, chunk_bytes=1 << 24):
    """(first byte, byte after the last) of each element of a JSON list, with one chunk of the file in memory.

    Bytes are decoded one to one, so that places in the text are places in the file.
    """
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(file, encoding="latin-1", newline="") as text:
        buffer, before = text.read(chunk_bytes), 0
        place = space.match(buffer, 3 if buffer.startswith("\xef\xbb\xbf") else 0).end()
        if buffer[place : place + 1] != "[":
            raise ValueError(f"{file} is no list of JSON objects: one object per line is called .jsonl.")
        place += 1
        while True:
            place = space.match(buffer, place).end()
            if buffer[place : place + 1] == "]":
                return
            try:
                _, end = decoder.raw_decode(buffer, place)
            except ValueError as error:
                more = text.read(chunk_bytes)
                if not more:
                    raise ValueError(f"{file} is broken at byte {before + place}: {error}") from None
                before, buffer, place = before + place, buffer[place:] + more, 0
                continue
            yield before + place, before + end
            place = end


class WebDataset(Source):
    """Tar shards; files with the same name up to its first dot are one sample.

    An image's ending (jpg, png, ...) makes it an image, `txt` its caption; the keys of `json` are columns.
    """

    def _scanned(self, file):
        start = end = count = 0
        last, first_keys = None, set()
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    tar.members = []  # it would remember all
                    key = _split_key(member.name)[0]
                    if _belongs_to_a_sample(member) and key != last:
                        if key in first_keys:
                            raise ValueError(
                                f"The files of sample {key} do not follow each other in {file}: pack it again with "
                                "tar --sort=name."
                            )
                        if len(first_keys) < 1000:
                            first_keys.add(key)
                        if count == ROWS_PER_BLOCK:
                            yield start, end, count
                            start, count = end, 0
                        count, last = count + 1, key
                    end = member.offset_data + (member.size + 511) // 512 * 512
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no whole tar file (compressed ones are to be unpacked): {error}") from None
        with open(file, "rb") as shard:
            shard.seek(end)
            rest = shard.read(512)
        if end > Path(file).stat().st_size or rest not in (b"", bytes(512)):
            raise ValueError(f"{file} is cut off in or after its last sample {last}: fetch or write it again.")
        yield start, end, count

    def _read(self, file, start, end):
        with open(file, "rb") as shard:
            shard.seek(start)
            data = shard.read(end - start)
        samples = []
        with tarfile.open(fileobj=io.BytesIO(data + bytes(1024)), mode="r:") as tar:
            for member in filter(_belongs_to_a_sample, tar):
                key, ending = _split_key(member.name)
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][ending] = tar.extractfile(member).read()
        return [_row_of_files(key, files) for key, files in samples]


def _belongs_to_a_sample(member):
    return member.isfile() and not Path(member.name).name.startswith("._")  # macOS packs such beside each file


def _split_key(path):
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return folder + slash + stem, ending.lower()


def _row_of_files(key, files):
    row, images, unread = {"id": key}, [], []
    for ending, data in sorted(files.items(), key=_as_people_count):
        last = ending.rpartition(".")[2]
        if last in IMAGE_ENDINGS:
            images.append(data)
        elif last == "txt":
            row["text"] = data.decode(errors="replace").strip()  # beside an image, a caption
        elif last == "json":
            values = _json_row(data)
            if isinstance(values, ValueError):
                return values
            row |= values
        elif last in UNREAD_MEDIA:
            unread.append(ending)
    if unread and not images and row.keys().isdisjoint({*IMAGE_COLUMNS, "messages", "conversations"}):
        return ValueError(
            f"It has no image, and its files {', '.join(unread)} are not read: known are txt, json and "
            f"{', '.join(IMAGE_ENDINGS)}."
        )
    if images:
        row = {name: value for name, value in row.items() if name not in IMAGE_COLUMNS} | {"images": images}
    return row


def _as_people_count(named):
    """2.png before 10.png."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", named[0])]


class EasyVqa(Source):
    """The images and questions of the package easy-vqa 1.0 (MIT): 64-pixel shapes, 13 answers.

    Args:
        split: `train` (4,000 images, 38,575 questions) or `test` (1,000 and 9,673).
    """

    def __init__(self, split, max_samples=None, **options):
        self.folder = wheel_files("easy-vqa==1.0") / "easy_vqa" / "data" / split
        by_image = defaultdict(list)
        for question, answer, image in json.loads((self.folder / "questions.json").read_text()):
            by_image[image].append((question, answer))
        self.images = sorted(by_image.items())
        super().__init__(EASY_VQA, [self.folder / "questions.json"], max_samples=max_samples, **options)

    def _scanned(self, file):
        yield 0, len(self.images)

    def _read(self, file, start):
        return [
            {"image": f"images/{image}.png", "questions": [q for q, _ in pairs], "answers": [a for _, a in pairs]}
            for image, pairs in self.images
        ]

    def row_name(self, block, offset):
        return str(self.folder / "images" / f"{self.images[offset][0]}.png")


KINDS = {".parquet": Parquet, ".jsonl": JsonLines, ".json": JsonArray, ".tar": WebDataset, ".arrow": Arrow}


def load_source(path, split="train", prompts=DEFAULT_PROMPTS, max_samples=None, **options):
    """Open what a recipe's source names.

    Args:
        path: the name `easy-vqa`; a file or a pattern such as `shards/*.tar`; a folder of files, named after splits or
            not, in itself or in `data/`; a folder of `datasets.save_to_disk`; or the id of a dataset on the Hub.
        split: of those the folder or the dataset has.
        max_samples: the first so many rows only.
        options: `subset` of a dataset; `image_folder`, `columns`, `read_row`, `wanted` as for `Source`.

    Returns:
        A `Source`: a sequence of `Record`s.

    Raises:
        ValueError: nothing usable is there.
    """
    options = {name: value for name, value in options.items() if value is not None}
    subset = options.pop("subset", None)
    if path == EASY_VQA:
        return EasyVqa(
            split, max_samples, **{name: options[name] for name in ("read_row", "wanted") if name in options}
        )
    options |= {"prompts": prompts, "max_samples": max_samples}
    files = files_of(str(path), split, tuple(KINDS))
    if files is None:
        return Arrow(str(path), _prepared_files(str(path), subset, split), **options)
    kinds = {_kind_of(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{path} mixes {', '.join(sorted(kind.__name__ for kind in kinds))}: name files of one kind.")
    try:
        return kinds.pop()(str(path), files, **options)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"Cannot read {path}: {' '.join(str(error).split())[:300]}") from None


def _kind_of(file):
    """The class that reads a file. JSON Lines are often called .json: they begin with an object, not with a list."""
    kind = KINDS[file.suffix.lower()]
    if kind is JsonArray:
        with file.open("rb") as text:
            kind = JsonLines if text.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{" else JsonArray
    return kind


def _prepared_files(path, subset, split):
    """The Arrow files of a dataset that was saved to disk, or is fetched from the Hub and prepared once."""
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
