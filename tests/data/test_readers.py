"""Every kind of file becomes the same samples, and files that cannot be used say why."""

import decimal
import io
import json
import math
import tarfile
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_schema import BLUE, LAYOUTS, RED, RED_PNG, TELL, content_of, turns

from vora.data.columns import RowOptions
from vora.data.json_source import elements
from vora.data.packing import tokenize_sample
from vora.data.readers import load_source
from vora.data.tar_source import row_of_files

EXPECTED = {
    "captions.jsonl": [
        ([RED], ["user: |Tell. / assistant: A red field."]),
        ([BLUE], ["user: |Tell. / assistant: A blue field.", "user: |Tell. / assistant: All is blue."])],
    "questions.jsonl": [
        ([RED], ["user: |what colour? / assistant: red"]),
        ([BLUE], ["user: |what colour? / assistant: blue", "user: |is it red? / assistant: no"])],
    "messages.jsonl": [
        ([RED, BLUE], ["system: Be brief. / user: |and |: which is red? / assistant: the first / user: sure? / "
                       "assistant: yes"]),
        ([BLUE], ["user: |what colour? / assistant: blue"])],
    "llava.json": [
        ([RED], ["user: |what colour? / assistant: red / user: sure? / assistant: yes"]),
        ([RED, BLUE], ["user: is | or|blue? / assistant: the second"]),
        ([], ["user: how many legs has an ant? é中 / assistant: six"])],
    "text_only.jsonl": [
        ([], ["user: hello / assistant: good day"]),
        ([], ["user: Translate.\nrouge / assistant: red"]),
        ([], ["user: two and two? / assistant: four"]),
        ([], ["text: plain words to go on"])],
    "cauldron.jsonl": [([RED], ["user: |what colour? / assistant: red / user: sure? / assistant: yes"])],
    "recap.parquet": [
        ([RED], ["user: |Describe. / assistant: A red field."]),
        ([BLUE], ["user: Describe.| / assistant: A blue field."])],
    "frames.parquet": [
        ([RED], ["user: |Describe. / assistant: A red field."]),
        ([[RED, BLUE, RED]], ["user: |What happens? / assistant: It blinks."])],
    "shard-000.tar": [
        ([RED], ["user: |Tell. / assistant: A red field."]),
        ([BLUE], ["user: |what colour? / assistant: blue"]),
        ([RED, BLUE], ["user: ||same? / assistant: no"])],
}  # fmt: skip


def opened(path, split="train", columns=None, **further):
    return load_source(path, split, RowOptions(TELL, columns or {}), **further)


def read(*arguments, **further):
    return [content_of(sample) for sample in opened(*arguments, **further)]


def answers(source):
    return [sample.conversations[0][1]["content"] for sample in source]


def write(path, *rows, **options):
    """Rows in the kind of file that its ending says; the path again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tar(path, files):
    """{name: content}, a folder where the name ends in a slash; the path again."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.size = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE, len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", EXPECTED)
def test_each_layout_reads_as_it_is_and_becomes_tokens_and_labels(name, processor):
    source = opened(LAYOUTS / name, image_folder=LAYOUTS / "images" if name == "llava.json" else None)
    assert [content_of(source[i]) for i in range(len(source))] == EXPECTED[name]
    assert content_of(source[0]) == EXPECTED[name][0]  # nothing of a block is used up
    for sample in source:
        for conversation in sample.conversations:
            found = tokenize_sample(sample, processor, [conversation])
            learned = processor.tokenizer.decode(found["targets"][found["targets"] != -100])
            said = [m["content"] for m in conversation if m["role"] in ("assistant", "text")]
            expected = "".join(answer + "<|im_end|>" for answer in said)
            assert learned == (expected[1:] if conversation[0]["role"] == "text" else expected)  # nothing before its p
            places = found["input_ids"] == processor.image_token_id
            assert places.sum() == sum(grid.prod() for grid in found.get("image_grid_thw", []))


def test_kinds_of_files_and_folders_agree(tmp_path):
    rows = [json.loads(line) for line in (LAYOUTS / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("question", "answer"):
            row[name + "s"] = [row.pop(name)] if name in row else row[name + "s"]
        row["image"] = {"bytes": (LAYOUTS / row["image"]).read_bytes(), "path": None}
    dataset = datasets.Dataset.from_list(rows, split="train").cast_column("image", datasets.Image())
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        dataset.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    for place in ("hub", "hub/data/train-00000-of-00001.parquet", "hub/data/te*.parquet", "saved", "splits"):
        assert read(str(tmp_path / place)) == EXPECTED["questions.jsonl"], place
    with pytest.raises(ValueError, match="no files of the split 'dev'"):
        opened(tmp_path / "hub", "dev")
    with pytest.raises(ValueError, match="is the split 'train' and holds no files of the split 'validation'"):
        opened(tmp_path / "saved", "validation")
    for number in range(3):  # shards without names of splits are all read
        write_tar(tmp_path / f"{number:05d}.tar", {"0.txt": b"a", "1.txt": b"b"})
    assert len(opened(tmp_path)) == 6 and len(opened(tmp_path, max_samples=3)) == 3


def test_many_blocks_keep_their_order_and_names(tmp_path, monkeypatch):
    monkeypatch.setattr("vora.data.parquet_source.BYTES_PER_BLOCK", 2000)  # large row groups are read in parts
    rows = [{"question": f"number [{i}], {{? é", "answer": str(i), "label": math.nan} for i in range(1000)]
    plain = {"compression": "none", "use_dictionary": False}
    write(tmp_path / "a.jsonl", *rows)
    write(tmp_path / "b.json", *rows)
    write(tmp_path / "c.parquet", *rows, row_group_size=77)
    write(tmp_path / "d.parquet", *rows, **plain)
    write_tar(tmp_path / "e.tar", {f"{number:04d}.json": json.dumps(row).encode() for number, row in enumerate(rows)})
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "f")
    for place in ("a.jsonl", "b.json", "c.parquet", "d.parquet", "e.tar", "f"):
        source = opened(tmp_path / place)
        assert len(source.block_sizes) > 4 and len(source) == 1000, place
        assert answers(source) == [str(i) for i in range(1000)] and source[777].name.endswith(":777")
    assert list(elements(tmp_path / "b.json", chunk_bytes=37)) == list(elements(tmp_path / "b.json"))


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_row_in_another_encoding_is_bad_and_the_others_are_read(tmp_path, kind):
    """As it is, and not learned with characters that stand for nothing."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("naïve", "café", "ça")]
    encoded = [line.encode("latin-1" if number == 1 else "utf-8") for number, line in enumerate(lines)]
    data = b"\n".join(encoded) if kind == "jsonl" else b"[" + b",\n".join(encoded) + b"]"
    (tmp_path / f"a.{kind}").write_bytes(data)
    source = opened(tmp_path / f"a.{kind}")
    assert [content_of(source[number])[1] for number in (0, 2)] == [["text: naïve"], ["text: ça"]]
    with pytest.raises(ValueError, match="not in UTF-8: its byte 13 is 0xe9"):
        source[1]


def test_class_labels_alone_and_in_lists_are_names(tmp_path):
    names = datasets.ClassLabel(names=["ox", "ass"])
    lists = datasets.Sequence(names)
    features = datasets.Features({"question": datasets.Value("string"), "answer": names, "answers": lists})
    rows = {"question": ["a?", "b?", "c?"], "answer": [1, 0, -1], "answers": [[1, 1, 0], [0], [-1]]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for place in ("train.parquet", "saved"):
        for column in ("answer", "answers"):
            source = opened(tmp_path / place, columns={column: column})
            assert answers([source[0], source[1]]) == ["ass", "ox"]
            with pytest.raises(ValueError, match="fit no layout|answer is empty"):
                source[2]  # a class that is withheld


def test_tars_as_people_pack_them(tmp_path):
    long, text = "a" * 150, b"A red field."
    files = {"./x/": b"", "./x/._0.png": RED_PNG, "./x/0.png": RED_PNG, "./x/0.txt": text}
    files |= {f"./x/{long}.png": RED_PNG, f"./x/{long}.txt": text, "y/": b""}
    assert read(write_tar(tmp_path / "a.tar", files)) == [EXPECTED["captions.jsonl"][0]] * 2
    mixed = {"0.png": RED_PNG, "1.png": RED_PNG, "0.txt": text, "1.txt": text}
    with pytest.raises(ValueError, match="do not follow each other.*--sort=name"):
        opened(write_tar(tmp_path / "b.tar", mixed))
    named = {f"{i}.png": bytes([i]) for i in (0, 1, 10, 11, 2)}
    assert [image[0] for image in row_of_files("0", named)["images"]] == [0, 1, 2, 10, 11]
    # samples that are not read whole are bad
    files = {"0.mp4": b"x", "0.txt": b"a clip", "1.txt": b"a text", "2.txt": b"caf\xe9"}
    files |= {"3.json": b'{"text": "hi"}', "3.md5": b"x"}  # beside a whole row
    source = opened(write_tar(tmp_path / "t.tar", files))
    with pytest.raises(ValueError, match="no image, and its files mp4 are not read"):
        source[0]
    with pytest.raises(ValueError, match="txt is not in UTF-8: byte 3 is 0xe9"):
        source[2]
    assert [content_of(source[number])[1] for number in (1, 3)] == [["text: a text"], ["text: hi"]]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jsonl", b"", "0 rows"),
        ("b.jsonl", b"not json\n[1]\n", "none of its first 2 rows .* no JSON"),
        ("c.json", b'"what?"', "no list of JSON objects"),
        ("d.json", b'[{"question": "what?", "answer": "x"}, {"quest', "broken at byte"),
        ("e.parquet", b"PAR1 not really", "Cannot read"),
        ("f.tar", (LAYOUTS / "shard-000.tar").read_bytes()[:1100], "cut off|no whole tar"),
        ("g.xls", b"a,b\n", "none of the kinds"),
        ("h.csv", b"question,answer\n", "0 rows"),
        ("i.csv", "question,answer\na,b\n".encode("utf-16"), "no table in UTF-8"),
        ("j.csv", b"text,text\na,b\n", "2 columns of the name 'text'"),
        ("k.json", b'{"info": {}, "images": [{"id": 1, "file_name": "a.jpg"}]}', "is one JSON object, and a list of"),
        ("l.json", b'{\n "images": [{"id": 1}]\n}', "is one JSON object, and a list of rows"),
        ("h.json", '[{"text": "é"}]'.encode("utf-16"), "no list of JSON objects in UTF-8"),
        ("nothing-here", None, "neither a file nor a folder"),
        ("*.tar.gz", None, "matches 0 files"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_work_starts(tmp_path, name, content, cause):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=cause):
        opened(tmp_path / name)


def test_numbers_files_and_names_as_other_programs_write_them(tmp_path):
    feather.write_feather(pa.table({"text": ["a"]}), tmp_path / "a.arrow")
    with pytest.raises(ValueError, match="is Arrow's file format, as Feather's"):
        opened(tmp_path / "a.arrow")
    numbers = pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")])
    pq.write_table(pa.table({"question": ["how much?"] * 2, "answer": numbers}), tmp_path / "a.parquet")
    assert answers([opened(tmp_path / "a.parquet")[number] for number in (0, 1)]) == ["1.5", "2"]
    Image.new("RGB", (4, 4), RED).save(tmp_path / "my dog.png")
    write(tmp_path / "a.jsonl", {"image": f"file://{tmp_path}/my%20dog.png", "caption": "a"})
    assert opened(tmp_path / "a.jsonl")[0].open_images()[0].size == (4, 4)
    write(tmp_path / "b.jsonl", {"image": "file://my dog.png", "caption": "a"})  # from where the file lies
    assert opened(tmp_path / "b.jsonl")[0].images == [str(tmp_path / "my dog.png")]
    two = row_of_files("img", {"v1.jpg": RED_PNG, "v1.txt": b"a", "v2.txt": b"b"})
    assert "several texts, v2.txt among them" in str(two)
    beside = row_of_files("img", {"jpg": RED_PNG, "json": b'{"text": "b"}', "txt": b"a"})
    assert beside["text"] == "a"
    lines = [{"categories": ["cat"], "image": "my dog.png", "caption": "a"}, {"image": "my dog.png", "caption": "b"}]
    (tmp_path / "lines.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(opened(tmp_path / "lines.json")) == 2


def test_a_row_group_that_is_read_again_and_again_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vora.data.parquet_source.MOST_GROUP_BYTES", 1000)
    pq.write_table(pa.table({"text": ["a" * 99] * 20}), tmp_path / "a.parquet", use_dictionary=False)
    assert len(opened(tmp_path / "a.parquet")) == 20 and "write the file anew with row_group_size" in caplog.text


def test_bad_rows_among_good_ones_refuse_no_source(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{broken\n{"text": "b"}\n')
    source = opened(tmp_path / "a.jsonl")
    assert len(source) == 3 and source[2].conversations
    with pytest.raises(ValueError, match="It is no JSON"):
        source[1]
    rows = [{"question": "?", "answer": ""}] * 3 + [{"question": "?", "answer": "yes"}]
    source = opened(write(tmp_path / "t.parquet", *rows, row_group_size=1))
    assert list(source.block_sizes) == [1] * 4 and content_of(source[3])[1] == ["user: ? / assistant: yes"]
    monkeypatch.setattr("vora.data.source.FIRST_ROWS", 3)
    with pytest.raises(ValueError, match="none of its first 3 rows can be used"):
        opened(tmp_path / "t.parquet")


def test_paths_of_images_start_beside_the_file_that_names_them(tmp_path):
    for folder, colour in (("a", RED), ("b", BLUE)):
        write(tmp_path / folder / "t.jsonl", {"image": "0.png", "caption": folder})
        Image.new("RGB", (4, 4), colour).save(tmp_path / folder / "0.png")
    assert [images for images, _ in read(f"{tmp_path}/*/t.jsonl")] == [[RED], [BLUE]]


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train.jsonl", "Test.jsonl"), ("training.jsonl", "testing.jsonl"), ("TRAIN-0.jsonl", "x_test.JSONL"),
     ("train/0.jsonl", "test.jsonl"), ("Training/0.json", "Test/0.json")],  # JSON Lines by another name
)  # fmt: skip
def test_splits_are_found_wherever_and_however_they_are_named(tmp_path, train, test):
    for name in (train, test):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / "lines.jsonl", {"text": name}).rename(tmp_path / name)
    assert read(tmp_path) == [([], [f"text: {train}"])] and read(tmp_path, "test") == [([], [f"text: {test}"])]


def test_hidden_files_are_left_out_and_compressed_ones_refused_where_they_belong_to_the_data(tmp_path):
    refused = partial(pytest.raises, ValueError)
    file = write(tmp_path / "data" / "train.jsonl", {"text": "good"})
    (tmp_path / "old.jsonl.gz").write_bytes(b"")  # beside the folder with the data
    for name in ("._train.jsonl", "images.tar.gz", "train.jsonl.gz", "test.jsonl.gz"):
        (tmp_path / "data" / name).write_bytes(b"\x00\x05\x16\x07")
    assert len(opened(tmp_path)) == len(opened(tmp_path / "data")) == 1
    (tmp_path / "data" / "train-2.jsonl.gz").write_bytes(b"")
    for path in (tmp_path, tmp_path / "data", f"{tmp_path}/data/train*"):
        with refused(match="1 compressed files, such as .*train-2.jsonl.gz, are not read: unpack"):
            opened(path)
    for packed in (tmp_path / "data").iterdir():
        packed.unlink()
    with refused(match="1 compressed files, such as .*old.jsonl.gz, are not read"):
        opened(tmp_path)
    write(file, {"text": "good"})
    with refused(match="no files of the split 'test'"):
        opened(tmp_path, "test")


@pytest.mark.parametrize("column", ["image_path", "img", "image_url", "pic", "filename"])
def test_images_in_other_columns_are_guessed_or_named_or_refused(tmp_path, column):
    """Else the row would be learned without its image."""
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    for kind in ("jsonl", "parquet"):
        file = write(tmp_path / f"t.{kind}", {column: "a.png", "question": "what?", "answer": "red"})
        assert opened(file).guessed == {"image": column}
        assert read(file)[0][0] == read(file, columns={"image": column})[0][0] == [RED]
        two = write(tmp_path / f"u.{kind}", {column: "a.png", "photo": "a.png", "question": "what?", "answer": "red"})
        with pytest.raises(ValueError, match=f"Its column '{column}' seems to hold an image.*image: {column}"):
            opened(two)


@pytest.mark.parametrize("column", ["videos", "audios"])
def test_columns_that_are_not_understood_are_seen_in_parquet_too(tmp_path, column):
    file = write(tmp_path / "t.parquet", {"messages": turns("what?", "x"), column: ["clip.mp4"]})
    with pytest.raises(ValueError, match="clip.mp4|column 'audios' holds sound"):
        read(file)


def test_named_columns_are_checked_as_far_as_they_are_known(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    file = write(tmp_path / "t.jsonl", {"image": "a.png", "caption": "raw"})
    with pytest.raises(ValueError, match="caption is to be read from 'recpa', but none of 1 rows .* have caption"):
        opened(file, columns={"caption": "recpa"})
    row = {"question": "q", "answer": "a"}
    later = read(write(tmp_path / "u.jsonl", *[row] * 600, row | {"pic": "a.png"}), columns={"image": "pic"})
    assert later[0][0] == [] and later[600][0] == [RED]
