"""Files that are damaged or made to do harm: what cannot be read is named, the rest is read, memory stays bounded."""

import json
import os
import random
import tarfile
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_readers import opened, write, write_tar
from test_schema import RED_PNG, content_of
from test_tables_and_folders import causes

from vora.data.columns import MOST_ROW_BYTES
from vora.data.page import write_page
from vora.data.readers import load_source
from vora.data.stats import dataset_statistics
from vora.data.stream import PackedSequences
from vora.eval.rows import Data, Rows, SkippedRows

GOOD = [b'{"text": "first"}', b'{"text": "last"}']


@pytest.fixture
def peak():
    """The most bytes that Python has held since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "a", "more": ' + b"[" * 900 + b"]" * 900 + b"}", "RecursionError"),
        (b'{"text": "a", "b": ' + b'{"a": "[\\"[", "b": [' * 9000 + b"]}" * 9000 + b"}", "nested too deeply"),
        (b'{"text": "' + b"a" * (MOST_ROW_BYTES + 9) + b'"}', "bytes, and the limit is"),
        (b'{"question": "a", "answer": NaN}', "fit no layout"),
        (b'{"question": NaN, "answer": "a"}', "fit no layout"),
        (b'{"image": "\\ud83d.png", "caption": "a"}', "half of a surrogate pair"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": "caf\xe9"}', "not in UTF-8: its byte 13 is 0xe9"),
    ],
)
def test_one_bad_row_is_bad_alone(tmp_path, kind, line, cause, peak):
    rows = [GOOD[0], line, GOOD[1]]
    (tmp_path / f"t.{kind}").write_bytes(b"\n".join(rows) if kind == "jsonl" else b"[" + b",\n".join(rows) + b"]")
    source = opened(tmp_path / f"t.{kind}")
    with pytest.raises(ValueError, match=cause):
        source[1]
    assert [content_of(source[number])[1] for number in (0, 2)] == [["text: first"], ["text: last"]]
    assert peak() < 300e6


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_that_are_no_longer_there_are_bad_ones(tmp_path, kind):
    """The file became shorter after it was opened, or says of itself that it has more rows."""
    rows, file = [{"text": f"row {number}"} for number in range(5)], tmp_path / f"t.{kind}"

    def put(some):
        if kind == "jsonl":
            return write(file, *some)
        datasets.Dataset.from_list(some).to_parquet(file)

    put(rows)
    source = opened(file)
    lengths, stamps = source.block_sizes.sum(), os.stat(file)
    put(rows[:3])
    os.utime(file, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    for number in (3, 4):
        with pytest.raises(ValueError, match="Its part of the file cannot be read: "):
            source[number]
    assert lengths == len(source) == 5


@pytest.mark.parametrize("ending", ["jsonl", "csv", "json"])
def test_a_line_that_does_not_end_is_not_read_whole(tmp_path, ending, peak):
    file = tmp_path / f"t.{ending}"
    with file.open("wb") as text:
        text.write({"jsonl": GOOD[0] + b"\n", "csv": b"text\nfirst\n", "json": b"[" + GOOD[0] + b","}[ending])
        text.truncate(1 << 30)
    if ending == "json":
        with pytest.raises(ValueError, match="broken at byte|larger than 64 MB"):
            opened(file)
    elif ending == "csv":
        with pytest.raises(ValueError, match="no table in UTF-8"):
            opened(file)
    else:
        assert "limit" in causes(source := opened(file))[1] and len(source) == 2
    assert peak() < 300e6


def test_large_lines_are_blocks_of_their_own(tmp_path, monkeypatch):
    """So that many of them are never in memory together, and one that is too large is not read."""
    monkeypatch.setattr("vora.data.source.MOST_BLOCK_BYTES", 1000)
    monkeypatch.setattr("vora.data.json_source.MOST_BLOCK_BYTES", 1000)
    source = opened(write(tmp_path / "t.jsonl", *({"text": "a" * size} for size in (300, 300, 300, 2000, 300, 900))))
    assert list(source.block_sizes) == [3, 1, 1, 1] and causes(source).keys() == {3}


def test_text_of_any_file_is_bounded(tmp_path):
    file = write(tmp_path / "t.parquet", {"text": "first"}, {"text": "a" * (MOST_ROW_BYTES + 1)}, {"text": "last"})
    assert "limit" in causes(opened(file))[1] and len(causes(opened(file))) == 1


def test_a_tar_that_claims_gigabytes_holds_bad_samples(tmp_path, peak):
    """GNU tar's sparse files: a few kB that are read as gigabytes."""
    file = write_tar(tmp_path / "a.tar", {"0.txt": b"first", "1.txt": b"", "2.txt": b"last", "3.bin": b"x" * 5000})
    with tarfile.open(file) as tar:
        place = tar.getmember("1.txt").offset
    data = bytearray(file.read_bytes())
    head = data[place : place + 512]
    head[156:157], head[483:495] = b"S", b"%011o\0" % (6 << 30)
    head[386:410] = b"%011o\0%011o\0" % (6 << 30, 0)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    data[place : place + 512] = head
    file.write_bytes(data)
    with tarfile.open(file) as tar:
        assert tar.getmember("1.txt").issparse() and tar.getmember("1.txt").size == 6 << 30
    source = opened(file)
    assert "sparse file" in causes(source)[1] and content_of(source[2])[1] == ["text: last"]
    large = write_tar(tmp_path / "b.tar", {"0.txt": b"a" * (MOST_ROW_BYTES + 1), "1.txt": b"last"})
    assert "limit" in causes(opened(large))[0] and causes(opened(large)).keys() == {0}
    assert peak() < 300e6


def test_row_groups_are_listed_once(tmp_path, monkeypatch):
    """The list at the end of a file is as long as its groups are many: read for each, it makes reading quadratic."""
    file, read_lists = write(tmp_path / "t.parquet", *({"text": str(i)} for i in range(60)), row_group_size=1), []
    monkeypatch.setattr(
        pq, "read_metadata", lambda name, whole=pq.read_metadata: read_lists.append(name) or whole(name)
    )
    source = opened(file)
    assert [content_of(sample)[1] for sample in source] == [[f"text: {i}"] for i in range(60)]
    assert len(source.block_sizes) == 60 and len(read_lists) == 1
    write(file, *({"text": "new " * 9} for i in range(60)), row_group_size=1)  # another file by the same name
    assert content_of(opened(file)[59])[1] == ["text: " + "new " * 9]


def test_a_flipped_bit_of_an_arrow_file_ends_in_words(tmp_path):
    """In a process of its own: without a check it ends in a fault of memory."""
    rows = [{"question": f"what {i}?", "answers": [str(i), "x"], "image": {"bytes": RED_PNG}} for i in range(40)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    data, draw = file.read_bytes(), random.Random(0)
    offsets = (40).to_bytes(4, "little")  # the last of a column's offsets ends it
    for place in [data.find(offsets, 1000) + 2, *(draw.randrange(len(data)) for _ in range(30))]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        child = os.fork()
        if not child:
            try:
                causes(opened(file))
            except ValueError:
                pass
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, place


def test_half_a_surrogate_pair_stops_neither_the_page_nor_an_evaluation(tmp_path, processor):
    rows = [{"text": "first"}, {"text": "\ud83d"}, {"\udc80": "a"}, {"image": "\ud83d.png", "caption": "a"}]
    rows += [{"messages": [{"role": "user", "content": "\ud83d"}]}, {"text": "last", "\udc80": "a"}]
    file = write(tmp_path / "t.jsonl", *rows)
    stream = PackedSequences([opened(file)], processor, 64)
    summary, bad = dataset_statistics(stream, ["\udc80.jsonl"])
    assert [one["record"].rpartition(":")[2] for one in bad] == ["1", "2", "3", "4"]
    write_page(tmp_path / "page.html", summary, bad, [("\udc80", next(stream.named_samples())[1])], processor)
    assert "t.jsonl:4" in (tmp_path / "page.html").read_text(encoding="utf-8")
    found = list(Rows(Data([file])).read(skipped := SkippedRows()))
    assert [row.values["text"] for row in found] == ["first", "last"] and skipped.count == 4
    assert json.loads(json.dumps(skipped.named))[0]["name"] == "t.jsonl:1"


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_more_rows_than_a_file_can_hold_are_refused_at_once(tmp_path, kind, monkeypatch):
    """Each would be given a place: a batch of Arrow without a column may claim any number of rows."""
    file, table = tmp_path / f"data.{kind}", pa.table({"text": pa.nulls(10_000_000)})
    if kind == "parquet":
        pq.write_table(table, file)
        monkeypatch.setattr("vora.data.parquet_source.MOST_ROWS_PER_BYTE", 100)  # as a forged count would go beyond it
    else:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=r"claims [\d,]+ rows in [\d,]+ bytes: it is damaged"):
        load_source(str(file))
