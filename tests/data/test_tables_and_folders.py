"""Tables as text, folders of images, and columns by other names: the same samples as of files that are made for it."""

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image
from test_readers import answers, opened, read, write
from test_schema import BLUE, LAYOUTS, RED

from vora.data.columns import RowOptions
from vora.data.csv_source import Dialect, records
from vora.data.guess import guessed_columns, line_to_paste
from vora.data.readers import load_source
from vora.data.stream import ADDED, PackedSequences
from vora.eval.prediction_cache import fingerprint
from vora.eval.rows import Data, Rows, SkippedRows

QUOTED = 'id,question,answer\n1,"a, ""b""\nc?",x\n\n2,é?,y\n'


@pytest.fixture
def images(tmp_path):
    for colour in ("red", "blue"):
        shutil.copy(LAYOUTS / "images" / f"{colour}.png", tmp_path)
    return tmp_path


def causes(source):
    found = {}
    for number in range(len(source)):
        try:
            source[number]
        except ValueError as error:
            found[number] = str(error)
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", QUOTED),
        ("b.csv", "\ufeff" + QUOTED.replace("\n", "\r\n").replace('""\r\nc', '""\nc')),  # as Excel writes it
        ("c.csv", 'id;question;answer\n1;"a, ""b""\nc?";x\n2;é?;y'),
        ("d.tsv", 'id\tquestion\tanswer\n1\t"a, ""b""\nc?"\tx\n2\té?\ty\n'),
    ],
)
def test_tables_as_programs_write_them(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    expected = ['user: a, "b"\nc? / assistant: x', "user: é? / assistant: y"]
    assert read(tmp_path / name) == [([], [one]) for one in expected]


def test_cells_are_texts_lists_numbers_and_nothing(images):
    rows = ["image,captions,label,question,answers", 'red.png,"[""a"", ""b""]",,,']
    rows += ['blue.png,,,what?,"[""x"", ""x""]"', "red.png,,7,,", """red.png,"['a', 'b']",,,"""]
    (images / "t.csv").write_text("\n".join(rows))
    source = opened(images / "t.csv")
    assert [answers([source[0]]), answers([source[1]])] == [["a"], ["x"]]
    assert causes(source).keys() == {2, 3}
    assert "label 7 is a number" in causes(source)[2] and "captions are no list in JSON" in causes(source)[3]


def test_a_tsv_is_split_at_tabs_and_an_image_may_be_a_list(images):
    (images / "t.tsv").write_text("question, a; or, b\tanswer\nwhat, then?\tred, or; blue\n")
    source = opened(images / "t.tsv", columns={"question": "question, a; or, b"})
    assert answers([source[0]]) == ["red, or; blue"] and "what, then?" in str(source[0].conversations)
    (images / "t.csv").write_text('image,question,answer\n"[""red.png"", ""blue.png""]",same?,no\nred.png,b?,yes\n')
    assert [len(opened(images / "t.csv")[number].images) for number in (0, 1)] == [2, 1]
    (images / "v.csv").write_text('video,question,answer\n"[""red.png"", ""blue.png""]",what?,blinks\n')
    assert [len(video) for video in opened(images / "v.csv")[0].images] == [2]


def test_a_caption_is_text_or_a_list_of_texts(images):
    rows = ['"[""a dog"", ""two dogs""]"', "[a dog]", "[2020]", '"[""a"", 1]"']  # the first as Flickr30k's own table
    (images / "t.csv").write_text("filename,raw\n" + "".join(f"red.png,{row}\n" for row in rows))
    source = opened(images / "t.csv")
    found = [[turns[1]["content"] for turns in source[number].conversations] for number in range(len(rows))]
    assert found == [["a dog", "two dogs"], ["[a dog]"], ["[2020]"], ['["a", 1]']]


def test_spaces_before_cells_and_rows_of_empty_cells_are_left_out(images):
    (images / "t.csv").write_text('image, caption\nred.png, "a, b"\n,\n\nblue.png,  c\n,\n')
    assert answers(opened(images / "t.csv")) == ["a, b", "c"]
    (images / "t.csv").write_text('image,caption\nred.png, "Hello" said the man\n')  # a text, by its first line
    assert answers(opened(images / "t.csv")) == [' "Hello" said the man']


@pytest.mark.parametrize("label", ["3", "-1", "3.0", "²", "1e3", " 7", "0.5", "1" * 5000])
def test_a_label_that_is_a_number_names_no_class(images, label):
    (images / "t.csv").write_text(f"image,label\nred.png,ox\nred.png,{label}\n")
    assert "label" in (cause := causes(opened(images / "t.csv"))[1]) and "is a number: give the name" in cause


def test_labels_with_digits_in_them_are_names(images):
    names = ["B-52", "m²", "nan", "inf", "1_000", "3 oxen", "三"]
    (images / "t.csv").write_text("image,label\n" + "".join(f"red.png,{name}\n" for name in names))
    assert answers(opened(images / "t.csv")) == names


def test_broken_rows_of_a_table_take_no_others_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr("vora.data.source.Source.rows_per_block", 2)
    monkeypatch.setattr("vora.data.csv_source.MOST_ROW_BYTES", 200)
    lines = [b"question,answer", b"a,0", b'"b" c,1', b"d,2,3", b"caf\xe9,4", b"e," + b"x" * 300, b'"f,6', b"g,7"]
    lines += [b"h,%d" % number for number in range(8, 60)]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    source = opened(tmp_path / "t.csv")
    found = causes(source)
    assert found.keys() == {1, 2, 3, 4, 5} and len(source) == 59
    assert "is no row" in found[1] and "3 cells, but the first line names 2" in found[2]
    assert "question is not in UTF-8: its byte 3 is 0xe9" in found[3] and "300 bytes" in found[4].replace("303", "300")
    assert answers([source[number] for number in (0, 6, 58)]) == ["0", "7", "59"]
    with (tmp_path / "t.csv").open("rb") as text:  # places that follow each other, to the last byte
        places = [(start, end) for start, end, _ in records(text, Dialect(","))]
    assert places[0][0] == 0 and places[-1][1] == (tmp_path / "t.csv").stat().st_size
    assert all(one[1] == after[0] for one, after in zip(places, places[1:]))


def test_a_folder_with_captions_beside_its_images(images):
    (images / "red.txt").write_text("A red field.\n", encoding="utf-8-sig")
    (images / "blue.txt").write_bytes(b"caf\xe9")
    for name in ("none.png", "._red.png"):
        shutil.copy(images / "red.png", images / name)
    (images / "more").mkdir()
    for name in ("blue.png", "blue.txt"):
        shutil.copy(LAYOUTS / "images" / "blue.png", images / "more" / "blue.png")
        (images / "more" / "blue.txt").write_text("A blue field.")
    source = opened(images)
    assert read(f"{images}/more")[0] == ([BLUE], ["user: |Tell. / assistant: A blue field."])
    assert [Path(source.row_name(0, number)).name for number in range(4)] == [
        "blue.png", "blue.png", "none.png", "red.png"]  # fmt: skip
    assert answers([source[1], source[3]]) == ["A blue field.", "A red field."]
    assert "is not in UTF-8: byte 3" in causes(source)[0] and "there is no none.txt" in causes(source)[2]


def test_a_folder_of_classes_and_its_splits(images):
    for name in ("train/ox/1.png", "train/ox/deep/2.png", "train/an ass/1.JPG", "val/ox/1.png"):
        (images / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), RED).save(images / "set" / name)
    with pytest.raises(ValueError, match="1 images in .* have neither captions nor classes"):
        opened(images / "set", "val")
    assert answers(opened(images / "set")) == ["an ass", "ox", "ox"]
    assert answers(opened(images / "set" / "train")) == ["an ass", "ox", "ox"]
    with pytest.raises(ValueError, match="no files of the split 'test', only images of train, val"):
        opened(images / "set", "test")
    with pytest.raises(ValueError, match="2 images in .* have neither captions nor classes"):
        shutil.rmtree(images / "set")
        opened(images)
    (images / "sub").mkdir()
    write(images / "sub" / "t.jsonl", {"image": "../red.png", "caption": "x"})  # says what the images are
    with pytest.raises(ValueError, match="holds no files of the split"):
        opened(images)


def test_links_to_folders_and_loud_endings_are_read(images):
    make_images(images / "stored", "ox/1.png", "ass/1.png")
    (images / "set" / "ass").mkdir(parents=True)
    (images / "set" / "ox").symlink_to(images / "stored" / "ox", target_is_directory=True)
    (images / "set" / "ass" / "more").symlink_to(images / "stored" / "ass", target_is_directory=True)
    for name, place in {"ass/again": "set", "ass/above": "", "alias": "set/ass"}.items():  # without end, or twice
        (images / "set" / name).symlink_to(images / place, target_is_directory=True)
    make_images(images / "set", "ass/2.png")
    source = opened(images / "set")
    assert answers(source) == ["ass", "ass", "ox"] and source[0].images[0].endswith("set/ass/2.png")
    make_images(images / "loud", "0.JPG")
    (images / "loud" / "0.TXT").write_text("a dog")
    assert answers(opened(images / "loud")) == ["a dog"]


def test_files_that_name_no_split_beside_some_that_do_are_said(tmp_path, caplog):
    for name in ("train_a", "test_a", "captions"):
        write(tmp_path / f"{name}.jsonl", {"text": name})
    assert len(opened(tmp_path)) == 1
    assert "the 1 files that name no split are NOT read, such as captions.jsonl" in caplog.text


def make_images(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), RED).save(root / path)
    return root


OTHERS = {
    "more": ("train/ox/1.png", "train/ass/2.png", "test/ox/3.png", "unlabeled/4.png"),
    "numbered": ("Training/ox/1.png", "Training/ass/2.png", "test1/3.png"),
    "packed on macOS": ("train/ox/1.png", "train/ass/2.png", "val/ox/3.png", "__MACOSX/train/ox/._1.png"),
}


@pytest.mark.parametrize("paths", OTHERS.values(), ids=OTHERS)
def test_a_split_is_read_alone_whatever_lies_beside_it(tmp_path, paths, caplog):
    make_images(tmp_path, *paths)
    (tmp_path / "__MACOSX").mkdir(exist_ok=True)
    (tmp_path / "__MACOSX" / "._labels.csv").write_text("x")
    assert answers(opened(tmp_path)) == ["ass", "ox"]
    assert ("not those in unlabeled" in caplog.text) is ("unlabeled/4.png" in paths) and "MACOSX" not in caplog.text


@pytest.mark.parametrize(
    ("folders", "split"),
    [
        (("train2017", "val2017"), "train"),
        (("seg_pred", "seg_test", "seg_train"), "train"),
        (("extra", "test", "train"), "validation"),
        (("a", "b", "c", "d", "e", "f", "g", "test1"), "train"),
        (("my-train", "my-unlabeled"), "train"),
        (("testA", "testB", "trainA", "trainB"), "train"),
        (("a", "b", "c", "d", "e", "f", "trainval"), "train"),
    ],
)
def test_folders_that_look_like_splits_are_no_classes(tmp_path, folders, split):
    make_images(tmp_path, *(f"{name}/1.png" for name in folders))
    with pytest.raises(ValueError, match=f"no files of the split '{split}', only images of {', '.join(folders)}: "):
        opened(tmp_path, split)
    for name in folders:  # with captions too
        (tmp_path / name / "1.txt").write_text("a caption")
    with pytest.raises(ValueError, match="no files of the split"):
        opened(tmp_path, split)
    assert answers(opened(tmp_path / folders[0])) == answers(opened(tmp_path, folders[0])) == ["a caption"]


def test_a_class_may_have_a_name_of_a_split_in_it(tmp_path):
    names = ["bike", "boat", "bus", "car", "steam_train"]
    make_images(tmp_path, *(f"{name}/1.png" for name in names))
    assert answers(opened(tmp_path)) == names


def test_evaluation_reads_tables_and_folders_too(images):
    for colour in ("red", "blue"):
        (images / colour).mkdir()
        shutil.move(images / f"{colour}.png", images / colour)
    rows = Rows(Data([images]))
    found = list(rows.read(skipped := SkippedRows()))
    assert [row.values["label"] for row in found] == ["blue", "red"] and not skipped.count
    assert [row.images()[0].getpixel((0, 0)) for row in found] == [BLUE, RED]
    before = fingerprint(rows.files[0])
    (images / "t.csv").write_text("photo,Query,response\nred/red.png,what?,red\n")
    assert fingerprint(images) != before
    (row,) = Rows(Data([images / "t.csv"])).read(skipped)
    assert row.values == {"question": "what?", "answer": "red"} and row.images()[0].getpixel((0, 0)) == RED


def test_a_name_that_is_no_text_is_a_bad_row_that_is_named(images):
    (images / "red.txt").write_text("A red field.")
    try:
        shutil.copy(images / "red.png", os.fsencode(images) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    source = opened(images)
    assert answers([source[2]]) == ["A red field."] and "there is no caf" in causes(source)[1]


@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_a_stream_of_them_resumes_exactly(tmp_path, processor, kind, monkeypatch):
    monkeypatch.setattr("vora.data.source.Source.rows_per_block", 8)
    for number in range(50):
        Image.new("RGB", (4 + number % 9, 5), (5 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    if kind == "csv":
        table = "".join(f'{number}.png,"number\n{number}"\n' for number in range(50))
        (tmp_path / "t.csv").write_text("image,caption\n" + table)

    def stream(**options):
        return PackedSequences([load_source(tmp_path)], processor, 96, **options)

    def first(packed, count):
        return [[one["input_ids"].tolist() for one in sequence] for sequence in islice(packed, count)]

    whole, begun, resumed = stream(), stream(num_workers=1), stream()
    expected = first(whole, 30)
    assert first(begun, 11) == expected[:11]
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    assert first(resumed, 19) == expected[11:] and resumed.state_dict() == whole.state_dict()


def test_no_stream_resumes_on_other_columns_or_images(tmp_path, processor):
    for number in range(4):
        make_images(tmp_path, f"f/{number % 2}/{number}.png")
    file = write(tmp_path / "t.jsonl", *({"question": "what?", "response": "a", "chosen": "b"} for _ in range(4)))

    def stream(**columns):
        sources = [load_source(file, options=RowOptions(columns=columns)), load_source(tmp_path / "f")]
        return PackedSequences(sources, processor, 96)

    guessed = json.loads(json.dumps(stream().state_dict()))
    stream(answer="response").load_state_dict(guessed)
    with pytest.raises(ValueError, match="columns of the sources was .*response.* and is .*chosen"):
        stream(answer="chosen").load_state_dict(guessed)
    (tmp_path / "f/0/0.png").rename(tmp_path / "f/0/1.png")
    with pytest.raises(ValueError, match="images of the folders was .*classes"):
        stream().load_state_dict(guessed)
    before = {name: value for name, value in guessed["data"].items() if name not in ADDED}
    stream(answer="chosen").load_state_dict(guessed | {"data": before})  # of a checkpoint that did not say
    (tmp_path / "f/0/1.png").rename(tmp_path / "f/0/0.png")
    stream().load_state_dict(guessed)
    (tmp_path / "f/0/0.txt").write_text("a caption")
    with pytest.raises(ValueError, match="images of the folders was .*classes.* and is .*captions"):
        stream().load_state_dict(guessed)


IMAGE = {"bytes": b"x", "path": None}
CHAT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("row", "guessed"),
    [
        ({"img": IMAGE, "query": "a?", "response": "b"}, {"image": "img", "question": "query", "answer": "response"}),
        ({"Image": "a.png", "Caption": "b"}, {"image": "Image", "caption": "Caption"}),
        ({"image": IMAGE, "alt_text": "a", "url": "http://x.org"}, {"caption": "alt_text"}),
        ({"picture_path": "a.jpg", "species": "ox"}, {"image": "picture_path", "label": "species"}),
        ({"jpg": b"x", "id": 3, "dialog": CHAT}, {"image": "jpg", "messages": "dialog"}),
        ({"image": "a.png", "question": "a?", "Answer Text": 3}, {"answer": "Answer Text"}),
        ({"prompt": "a", "completion": "b"}, {"question": "prompt", "answer": "completion"}),
        ({"content": "words", "meta": {"a": 1}}, {"text": "content"}),
        ({"image": IMAGE, "question": "a?", "answer": "b", "response": "c"}, {}),  # our own names say it all
        ({"text": "a", "query": "b", "response": "c"}, {}),
        ({"left_image": IMAGE, "right_image": IMAGE, "caption": "a"}, {}),  # which one, or both?
        ({"image": IMAGE, "score": 0.5}, {}),
    ],
)  # fmt: skip
def test_columns_are_guessed_where_ours_are_missing(row, guessed):
    assert guessed_columns([ValueError("a bad row"), row], {}) == guessed
    assert line_to_paste({"answer": "Answer Text", "image": "img"}) == '{answer: "Answer Text", image: img}'


def test_a_column_that_is_named_leaves_the_others_to_be_guessed():
    row = {"photo": "a.png", "blurb": "a red dot", "description": "something else"}
    assert guessed_columns([row], {"caption": "blurb"}) == {"image": "photo"}
    with pytest.raises(ValueError, match="captoin is no column of ours.*did you mean caption"):
        RowOptions(columns={"captoin": "blurb"})


def test_a_column_of_any_name_holds_images_where_these_are_files(images, caplog):
    """Beside a text, which would be learned without them; where it cannot be known, the column is named."""
    for name, image in (("file", "red.png"), ("path", ["blue.png"]), ("Filepath", "red.png")):
        source = opened(write(images / f"{name}.jsonl", {name: image, "text": "a shape"}))
        assert source.guessed == {"image": name} and len(source[0].images) == 1 and not source.images_not_read
    assert "NOT read" not in caplog.text
    for row, unread in (
        ({"file": "none.png"}, ["file"]),  # not there
        ({"before": "red.png", "after": "blue.png"}, ["before", "after"]),  # which one, or both?
    ):
        source = opened(write(images / "t.jsonl", row | {"text": "a shape", "note": "see red.PNG or any gif"}))
        assert not source.guessed and not source[0].images and [*source.images_not_read] == unread
        for name in unread:
            assert f"column '{name}' names images, such as {row[name]}, and is NOT read" in caplog.text
            assert f"columns: {{image: {name}}}" in caplog.text
    assert not opened(write(images / "t.jsonl", {"image": "red.png", "text": "a", "from": "b.png"})).images_not_read


def test_a_folder_of_images_beside_a_table_is_found_where_it_is_the_only_one(images, tmp_path, caplog):
    for folder in ("photos", "drawings", "empty"):
        (tmp_path / "set" / folder).mkdir(parents=True)
    (images / "red.png").rename(tmp_path / "set" / "photos" / "red.png")
    table = write(tmp_path / "set" / "t.jsonl", {"file": "red.png", "text": "a shape"})
    source = opened(table)
    photos = str(tmp_path / "set" / "photos")
    assert source.guessed == {"image": "file"} and source.guessed_folder == photos
    assert source[0].open_images()[0].size and f"its images lie in {photos}, image_folder: {photos}" in caplog.text
    given = opened(write(tmp_path / "set" / "own.jsonl", {"image": "red.png", "text": "a"}), image_folder=photos)
    assert given.guessed_folder is None and given[0].open_images()
    shutil.copy(Path(photos, "red.png"), tmp_path / "set" / "drawings" / "red.png")  # which of the two?
    assert opened(table).guessed_folder is None
    shutil.copy(Path(photos, "red.png"), tmp_path / "set" / "red.png")  # where paths start
    assert opened(table).guessed_folder is None and opened(table)[0].open_images()


def test_guessed_columns_are_said_and_read(images, caplog):
    rows = [{"pic": "red.png", "query": "what?", "reply": reply, "id": 1} for reply in "ab"]
    file = write(images / "t.jsonl", *rows)
    source = opened(file)
    assert (
        answers(source) == ["a", "b"]
        and "{image: pic, question: query, answer: reply} or --column image=pic "
        "--column question=query --column answer=reply; not read: id"
        in caplog.text
    )
    assert source.columns_read == {"image": "pic", "question": "query", "answer": "reply"}
    assert source.columns_not_read == ["id"]
    named = opened(file, columns={"image": "pic", "caption": "query"})
    assert not named.guessed and answers(named) == ["what?", "what?"]
    plain = opened(LAYOUTS / "captions.jsonl")
    assert not plain.guessed and {*plain.columns_read} <= {"image", "caption", "captions"}
