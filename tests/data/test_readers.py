"""Every layout and kind of file becomes the same records, and broken ones say what is wrong."""

import base64
import io
import json
import shutil
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vora
from vora.data.columns import RowOptions
from vora.data.json_source import JsonArray, elements
from vora.data.packing import tokenize_sample
from vora.data.prompts import Prompts
from vora.data.readers import load_source
from vora.data.source import Source
from vora.data.tar_source import row_of_files

LAYOUTS = Path(__file__).parent / "layouts"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def told(record):
    """A record as its images' colours (a list for a video) and its conversations as `role: text`, | for an image."""

    def colour(image):
        return [colour(frame) for frame in image] if isinstance(image, list) else image.getpixel((0, 0))

    opened = record.open_images()
    conversations = []
    for conversation in record.conversations:
        if conversation[0]["role"] == "text":
            conversations.append([f"text: {conversation[0]['content']}"])
            continue
        turns = []
        for message in record.messages(opened, conversation):
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(part.get("text", "|") for part in content)
            turns.append(f"{message['role']}: {content}")
        conversations.append(turns)
    return [colour(image) for image in opened], conversations


EXPECTED = {
    "captions.jsonl": [
        ([RED], [["user: |Tell.", "assistant: A red field."]]),
        ([BLUE], [["user: |Tell.", "assistant: A blue field."], ["user: |Tell.", "assistant: All is blue."]]),
    ],
    "questions.jsonl": [
        ([RED], [["user: |what colour?", "assistant: red"]]),
        ([BLUE], [["user: |what colour?", "assistant: blue"], ["user: |is it red?", "assistant: no"]]),
    ],
    "messages.jsonl": [
        (
            [RED, BLUE],
            [
                [
                    "system: Be brief.",
                    "user: |and |: which is red?",
                    "assistant: the first",
                    "user: sure?",
                    "assistant: yes",
                ]
            ],
        ),
        ([BLUE], [["user: |what colour?", "assistant: blue"]]),
    ],
    "llava.json": [
        ([RED], [["user: |what colour?", "assistant: red", "user: sure?", "assistant: yes"]]),
        ([RED, BLUE], [["user: is | or|blue?", "assistant: the second"]]),
        ([], [["user: how many legs has an ant? é中", "assistant: six"]]),
    ],
    "text_only.jsonl": [
        ([], [["user: hello", "assistant: good day"]]),
        ([], [["user: Translate.\nrouge", "assistant: red"]]),
        ([], [["user: two and two?", "assistant: four"]]),
        ([], [["text: plain words to go on"]]),
    ],
    "cauldron.jsonl": [
        ([RED], [["user: |what colour?", "assistant: red", "user: sure?", "assistant: yes"]]),
    ],
    "recap.parquet": [
        ([RED], [["user: |Describe.", "assistant: A red field."]]),
        ([BLUE], [["user: Describe.|", "assistant: A blue field."]]),
    ],
    "frames.parquet": [
        ([RED], [["user: |Describe.", "assistant: A red field."]]),
        ([[RED, BLUE, RED]], [["user: |What happens?", "assistant: It blinks."]]),
    ],
    "shard-000.tar": [
        ([RED], [["user: |Tell.", "assistant: A red field."]]),
        ([BLUE], [["user: |what colour?", "assistant: blue"]]),
        ([RED, BLUE], [["user: ||same?", "assistant: no"]]),
    ],
}


def opened(path, columns=None, prompts=Prompts(["Tell."]), **further):
    return load_source(str(path), options=RowOptions(prompts, columns or {}), **further)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_layout_reads_as_it_is(name):
    source = opened(LAYOUTS / name, image_folder=LAYOUTS / "images" if name == "llava.json" else None)
    assert [told(source[i]) for i in range(len(source))] == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_each_layout_becomes_tokens_and_labels(name, llm_folder):
    processor = vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)
    tokenizer = processor.tokenizer
    for record in opened(LAYOUTS / name, image_folder=LAYOUTS / "images" if name == "llava.json" else None):
        for conversation in record.conversations:
            sample = tokenize_sample(record, processor, [conversation])
            learned = tokenizer.decode(sample["targets"][sample["targets"] != -100])
            answers = [m["content"] for m in conversation if m["role"] in ("assistant", "text")]
            expected = "".join(answer + "<|im_end|>" for answer in answers)
            assert learned == (expected[1:] if conversation[0]["role"] == "text" else expected)  # nothing before its p
            places = sample["input_ids"] == processor.image_token_id
            assert places.sum() == sum(grid.prod() for grid in sample.get("image_grid_thw", []))


def test_kinds_of_files_and_folders_agree(tmp_path):
    rows = [json.loads(line) for line in (LAYOUTS / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("question", "answer"):
            row[name + "s"] = [row.pop(name)] if name in row else row[name + "s"]
        row["image"] = {"bytes": (LAYOUTS / row["image"]).read_bytes(), "path": None}
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (tmp_path / "hub" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    dataset.to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    expected = EXPECTED["questions.jsonl"]
    for place in ("hub", "hub/data/train-00000-of-00001.parquet", "hub/data/te*.parquet", "saved", "splits"):
        source = opened(tmp_path / place)
        assert [told(source[i]) for i in range(len(source))] == expected, place
    with pytest.raises(ValueError, match="no files of the split 'dev'"):
        opened(tmp_path / "hub", split="dev")


def test_shards_without_names_of_splits_are_all_read(tmp_path):
    for number in range(3):
        shutil.copy(LAYOUTS / "shard-000.tar", tmp_path / f"{number:05d}.tar")
    assert len(opened(tmp_path)) == 9 and len(opened(tmp_path, max_samples=4)) == 4


def test_columns_can_be_named(tmp_path):
    row = {"image": "red.png", "query": "what?", "reply": "red", "caption": "unused"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    names = {"image": "image", "question": "query", "answer": "reply"}
    source = opened(tmp_path / "train.jsonl", columns=names, image_folder=LAYOUTS / "images")
    assert told(source[0]) == ([RED], [["user: |what?", "assistant: red"]])


def test_many_blocks_keep_their_order_and_names(tmp_path):
    rows = [{"question": f"number {i}? é", "answer": str(i)} for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=77)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for number, row in enumerate(rows):
            data = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{number:04d}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "e")
    for place in ("a.jsonl", "b.json", "c.parquet", "d.tar", "e"):
        source = opened(tmp_path / place)
        assert len(source.block_sizes) > 5 and len(source) == 1000
        assert [source[i].conversations[0][1]["content"] for i in range(1000)] == [str(i) for i in range(1000)]
        assert source[777].name.endswith(":777")


def test_a_json_list_is_read_in_small_parts(tmp_path, monkeypatch):
    rows = [{"question": "q" * (i % 50), "answer": f"[{i}], {{"} for i in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    whole = [bounds for bounds in elements(tmp_path / "a.json")]
    assert [bounds for bounds in elements(tmp_path / "a.json", chunk_bytes=37)] == whole
    monkeypatch.setattr(Source, "rows_per_block", 7)
    source = JsonArray("a", [tmp_path / "a.json"])
    assert [source[i].conversations[0][1]["content"] for i in range(300)] == [row["answer"] for row in rows]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"image": "red.png", "question": "what?", "answer": " "}, "answer is empty"),
        ({"question": "what?", "answers": ["a", "b"], "questions": ["what?"]}, "1 questions, but 2 answers"),
        ({"conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "x"}]}, "1 places"),
        ({"image": ["red.png"] * 3, "messages": [{"role": "user", "content": "<image><image>"},
                                                 {"role": "assistant", "content": "x"}]}, "2 places .* 3 images"),
        ({"image": "no.png", "question": "what?", "answer": "x"}, "no.png.*no such file"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "Who is 'robot'"),
        ({"caption": "a dog", "image": None}, "a caption, but no image"),
        ({"questions": ["what?"], "answers": [None]}, "answer is empty"),
        ({"image": "x" * 240 + ".png", "question": "what?", "answer": "x"}, "no such file"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "no answer"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no answer"),
        ({"messages": ["x"]}, "not built as its layout"),
        ({"image": "red.png", "label": 3}, "label 3 is a number"),
        ({"image": {"bytes": None, "path": None}, "caption": "x"}, "images is empty"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(tmp_path, row, cause):
    good = {"image": "red.png", "question": "what?", "answer": "red"}
    (tmp_path / "train.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    source = opened(tmp_path / "train.jsonl", image_folder=LAYOUTS / "images")
    with pytest.raises(ValueError, match=cause):
        record = source[1]
        record.messages(record.open_images(), record.conversations[0])


RED_PNG = (LAYOUTS / "images" / "red.png").read_bytes()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # what people have, beside the layouts' plain form
        ({"image": "red.png", "question": "<image>\nwhat?", "answer": 3}, ([RED], ["user: |what?", "assistant: 3"])),
        ({"image": "red.png", "question": "what?", "answers": ["a", "b", "b"]},
         ([RED], ["user: |what?", "assistant: b"])),
        ({"question": "what?", "answers": [{"answer": "b"}, {"answer": "b"}, {"answer": "a"}]},
         ([], ["user: what?", "assistant: b"])),
        ({"image": "", "conversations": [{"from": "gpt", "value": "Hi!"}, {"from": "human", "value": "a <video> tag?"},
                                         {"from": "gpt", "value": "<video>"}]},
         ([], ["user: a <video> tag?", "assistant: <video>"])),
        ({"conversations": {"from": ["human", "gpt"], "value": ["what?", "x"]}},
         ([], ["user: what?", "assistant: x"])),
        ({"conversations": json.dumps([{"from": "human", "value": "what?"}, {"from": "gpt", "value": "x"}])},
         ([], ["user: what?", "assistant: x"])),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(RED_PNG).decode()}},
            {"type": "text", "text": "what?", "image": None}]}, {"role": "assistant", "content": "x"}]},
         ([RED], ["user: |what?", "assistant: x"])),
        ({"messages": [{"role": "user", "content": [{"type": "image", "base64": base64.b64encode(RED_PNG).decode()}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]},
         ([RED], ["user: |", "assistant: x"])),
        ({"video": ["red.png", "blue.png"], "question": "what?", "answer": "x"},
         ([[RED, BLUE]], ["user: |what?", "assistant: x"])),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["red.png", "blue.png"]}]},
                       {"role": "assistant", "content": "x"}]}, ([[RED, BLUE]], ["user: |", "assistant: x"])),
        ({"video": "film.png", "question": "<video>what?", "answer": "x"},
         ([[RED, BLUE]], ["user: |what?", "assistant: x"])),
    ],
)  # fmt: skip
def test_rows_as_people_have_them(tmp_path, row, expected):
    for colour in ("red", "blue"):
        shutil.copy(LAYOUTS / "images" / f"{colour}.png", tmp_path)
    Image.open(tmp_path / "red.png").save(
        tmp_path / "film.png", save_all=True, append_images=[Image.open(tmp_path / "blue.png")]
    )
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    images, conversations = told(opened(tmp_path / "train.jsonl")[0])
    assert (images, conversations[0]) == expected


def test_addresses_of_files_and_short_base64_are_images(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "red.png")
    Image.new("RGB", (4, 4), RED).save(tmp_path / "film.gif", save_all=True,
                                       append_images=[Image.new("RGB", (4, 4), BLUE)])  # fmt: skip
    small = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    assert len(small) < 250
    words = {"question": "what?", "answer": "x"}
    rows = [{"image": f"file://{tmp_path}/red.png"}, {"image": small}, {"video": f"file://{tmp_path}/film.gif"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row | words) + "\n" for row in rows))
    source = opened(tmp_path / "train.jsonl", image_folder=tmp_path / "elsewhere")
    assert [told(source[number])[0] for number in range(3)] == [[RED], [RED], [[RED, BLUE]]]


def test_class_labels_are_names(tmp_path):
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["ox", "ass"])}
    )
    dataset = datasets.Dataset.from_dict({"question": ["a?", "b?"], "answer": [1, 0]}, features=features)
    dataset.to_parquet(tmp_path / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for place in ("train.parquet", "saved"):
        source = opened(tmp_path / place)
        assert [source[i].conversations[0][1]["content"] for i in range(2)] == ["ass", "ox"]


def test_a_withheld_class_label_is_no_class(tmp_path):
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["a", "b"])}
    )
    dataset = datasets.Dataset.from_dict({"question": ["a?", "b?"], "answer": [1, -1]}, features=features)
    dataset.to_parquet(tmp_path / "test.parquet")
    source = opened(tmp_path / "test.parquet")
    assert source[0].conversations[0][1]["content"] == "b"
    with pytest.raises(ValueError, match="fit none of the layouts"):
        source[1]


def test_splits_are_found_wherever_they_are_named(tmp_path):
    row = json.dumps({"question": "what?", "answer": "x"}) + "\n"
    (tmp_path / "nlvr_train.jsonl").write_text(row * 5)
    (tmp_path / "nlvr_dev.JSONL").write_text(row * 3)
    (tmp_path / "folders" / "train").mkdir(parents=True)
    (tmp_path / "folders" / "train" / "0.json").write_text(row * 4)  # JSON Lines by another name
    assert len(opened(tmp_path)) == 5 and len(opened(tmp_path, split="dev")) == 3
    assert len(opened(tmp_path / "folders")) == 4


def _tar(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = RED_PNG if name.endswith("png") else b"A red field."
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if name.endswith("/") else (tarfile.REGTYPE, len(data))
            tar.addfile(info, io.BytesIO(data))


def test_tars_as_people_pack_them(tmp_path):
    long = "a" * 150
    _tar(
        tmp_path / "a.tar", "./x/", "./x/._0.png", "./x/0.png", "./x/0.txt", f"./x/{long}.png", f"./x/{long}.txt", "y/"
    )
    source = opened(tmp_path / "a.tar")
    assert [told(source[i]) for i in range(2)] == [EXPECTED["captions.jsonl"][0]] * 2 and len(source) == 2
    _tar(tmp_path / "b.tar", "0.png", "1.png", "0.txt", "1.txt")
    with pytest.raises(ValueError, match="do not follow each other.*--sort=name"):
        opened(tmp_path / "b.tar")
    named = {f"{i}.png": bytes([i]) for i in (0, 1, 10, 11, 2)}
    assert [image[0] for image in row_of_files("0", named)["images"]] == [0, 1, 2, 10, 11]


def test_large_row_groups_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("vora.data.parquet_source.BYTES_PER_BLOCK", 2000)
    rows = [{"question": "what? " * (i % 9), "answer": str(i)} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    source = opened(tmp_path / "a.parquet")
    assert len(source.block_sizes) > 10
    assert [source[i].conversations[0][1]["content"] for i in range(1000)] == [str(i) for i in range(1000)]


def test_files_that_cannot_be_used_are_refused_before_work_starts(tmp_path):
    def refuses(name, content, cause):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=cause):
            opened(path)

    refuses("a.jsonl", b"", "0 rows")
    refuses("b.jsonl", b"not json\n[1]\n", "None of the first 2 rows .* no JSON")
    refuses("c.json", b'"what?"', "no list of JSON objects")
    refuses("d.json", b'[{"question": "what?", "answer": "x"}, {"quest', "broken at byte")
    refuses("e.parquet", b"PAR1 not really", "Cannot read")
    refuses("f.tar", (LAYOUTS / "shard-000.tar").read_bytes()[:1100], "cut off|no whole tar")
    refuses("g.csv", b"a,b\n", "none of the kinds")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        opened(tmp_path / "nothing-here")
    with pytest.raises(ValueError, match="matches 0 files"):
        opened(tmp_path / "*.tar.gz")


def test_a_bad_line_among_good_ones_is_one_bad_row(tmp_path):
    good = json.dumps({"question": "what?", "answer": "x"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{{broken\n{good}\n")
    source = opened(tmp_path / "a.jsonl")
    assert len(source) == 3 and source[2].conversations
    with pytest.raises(ValueError, match="It is no JSON"):
        source[1]


def test_images_of_every_source_survive_a_second_reading(tmp_path):
    """A block is read anew after another: nothing of it may be used up."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    source = opened(LAYOUTS / "shard-000.tar")
    assert told(source[0]) == told(source[0]) == EXPECTED["shard-000.tar"][0]


def distill_sequences(folder, *rows):
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"image": "0.png", **row}) + "\n" for row in rows))
    return opened(str(folder / "rows.jsonl"), prompts=Prompts(["Tell."], ["Which?"], ["So: {}"]))


def test_labels_and_statements_get_their_prompts(tmp_path):
    rows = [{"label": "tabby cat"}, {"sentence": "It is {red}.", "label": True}, {"sentence": "No.", "label": "False"}]
    source = distill_sequences(tmp_path, *rows)
    spoken = [[message["content"] for message in record.conversations[0]] for record in source]
    assert spoken == [["Which?", "tabby cat"], ["So: It is {red}.", "true"], ["So: No.", "false"]]


def test_all_captions_of_a_image_share_one_prompt_and_images_differ(tmp_path):
    rows = [{"image": f"{i}.png", "captions": ["A.", "B.", "C.", "D."]} for i in range(20)]
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = opened(str(tmp_path / "rows.jsonl"), prompts=Prompts(["Tell.", "Say.", "Look."]))
    asked = [{conversation[0]["content"] for conversation in record.conversations} for record in source]
    assert all(len(prompts) == 1 for prompts in asked) and set.union(*asked) == {"Tell.", "Say.", "Look."}


def test_a_sentence_that_is_neither_true_nor_false_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither"):
        distill_sequences(tmp_path, {"sentence": "a", "label": "maybe"})


@pytest.mark.parametrize(
    ("lists", "cause"), [(dict(caption=[]), "0 caption"), (dict(statement=["True?"]), "needs one")]
)
def test_prompts_are_checked(lists, cause):
    with pytest.raises(ValueError, match=cause):
        Prompts(**lists)


# Found by reading


def test_paths_of_images_start_beside_the_file_that_names_them(tmp_path):
    for folder, colour in (("a", RED), ("b", BLUE)):
        (tmp_path / folder / "images").mkdir(parents=True)
        Image.new("RGB", (4, 4), colour).save(tmp_path / folder / "images" / "0.png")
        (tmp_path / folder / "t.jsonl").write_text(json.dumps({"image": "images/0.png", "caption": folder}) + "\n")
    read = load_source(f"{tmp_path}/*/t.jsonl")
    assert [told(read[number])[0] for number in range(2)] == [[RED], [BLUE]]


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("TRAIN-0", "eval")])
def test_splits_are_known_in_capitals_and_as_people_call_them(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert [told(record)[1] for record in load_source(str(tmp_path))] == [[[f"text: {names[0]}"]]]
    if names[1] != "eval":
        assert [told(record)[1] for record in load_source(str(tmp_path), "test")] == [[[f"text: {names[1]}"]]]
    (tmp_path / "Training").mkdir()
    (tmp_path / "Training" / "x.jsonl").write_text(json.dumps({"text": "own folder"}) + "\n")
    assert [told(record)[1] for record in load_source(str(tmp_path))] == [[["text: own folder"]]]


def test_hidden_files_are_left_out_and_compressed_ones_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "good"}) + "\n")
    (tmp_path / "._t.jsonl").write_bytes(b"\x00\x05\x16\x07")
    assert len(load_source(str(tmp_path))) == len(load_source(f"{tmp_path}/*")) == 1
    (tmp_path / "u.jsonl.gz").write_bytes(b"")
    for path in (str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(ValueError, match="1 compressed files, such as .*u.jsonl.gz, are not read: unpack"):
            load_source(path)


@pytest.mark.parametrize("column", ["image_path", "img", "image_url", "pic", "filename"])
def test_images_in_other_columns_are_refused_or_named(tmp_path, column):
    """Else the row would be learned blind."""
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    row = {column: "a.png", "question": "what?", "answer": "red"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        with pytest.raises(ValueError, match=f"Its column '{column}' seems to hold an image.*image: {column}"):
            load_source(str(tmp_path / name))
        assert told(opened(str(tmp_path / name), columns={"image": column})[0])[0] == [RED]


def test_text_beside_names_that_are_no_images_is_text(tmp_path):
    rows = [{"text": "a", "image_id": 3, "file_name": "a.py", "url": "http://x.org/a.png", "video": None}]
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert told(load_source(str(tmp_path / "t.jsonl"))[0])[1] == [["text: a"]]


def test_folders_of_images_with_their_metadata(tmp_path):
    """As `datasets` reads image folders."""
    (tmp_path / "train").mkdir()
    Image.new("RGB", (4, 4), BLUE).save(tmp_path / "train" / "0.png")
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "a sky"}) + "\n")
    images, conversations = told(load_source(str(tmp_path))[0])
    assert images == [BLUE] and conversations[0][1] == "assistant: a sky"


def test_samples_of_a_tar_whose_images_are_not_read_are_bad(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("0.mp4", b"x"), ("0.txt", b"a clip"), ("1.txt", b"a text")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    read = load_source(str(tmp_path / "t.tar"))
    with pytest.raises(ValueError, match="no image, and its files mp4 are not read"):
        read[0]
    assert told(read[1])[1] == [["text: a text"]]


def test_the_number_of_a_choice_is_no_answer(tmp_path):
    row = {"question": "which?", "choices": ["this", "that"], "answer": 1}
    for changed, cause in ((row, "answer 1 is none of its 2 choices"), ({**row, "answer": "B"}, "answer 'B' is none")):
        pq.write_table(pa.Table.from_pylist([changed]), tmp_path / "t.parquet")
        with pytest.raises(ValueError, match=cause):
            load_source(str(tmp_path / "t.parquet"))
    pq.write_table(pa.Table.from_pylist([{**row, "answer": "that"}]), tmp_path / "t.parquet")
    assert told(load_source(str(tmp_path / "t.parquet"))[0])[1] == [["user: which?", "assistant: that"]]


def test_class_labels_in_lists_are_names_and_whole_numbers_whole(tmp_path):
    labels = datasets.Sequence(datasets.ClassLabel(names=["cat", "dog"]))
    features = datasets.Features({"questions": datasets.Sequence(datasets.Value("string")), "answers": labels})
    rows = {"questions": [["a?", "b?"]], "answers": [[1, 0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    assert [pair[1] for pair in told(load_source(str(tmp_path / "t.parquet"))[0])[1]] == [
        "assistant: dog", "assistant: cat"
    ]  # fmt: skip
    pq.write_table(pa.table({"question": ["how many?"], "answer": [3.0]}), tmp_path / "u.parquet")
    assert told(load_source(str(tmp_path / "u.parquet"))[0])[1] == [["user: how many?", "assistant: 3"]]


def test_one_bad_block_refuses_no_source(tmp_path, monkeypatch):
    rows = [{"question": "?", "answer": ""}] * 3 + [{"question": "?", "answer": "yes"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=1)
    read = load_source(str(tmp_path / "t.parquet"))
    assert list(read.block_sizes) == [1] * 4 and told(read[3])[1] == [["user: ?", "assistant: yes"]]
    monkeypatch.setattr("vora.data.source.FIRST_ROWS", 3)
    with pytest.raises(ValueError, match="None of the first 3 rows of .* can be used"):
        load_source(str(tmp_path / "t.parquet"))


def test_named_columns_go_before_layouts_and_are_checked(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "t.jsonl").write_text(json.dumps({**row, "recap": "a red one", "caption": "raw"}) + "\n")
    read = opened(str(tmp_path / "t.jsonl"), columns={"caption": "recap"})
    assert [turns[1] for turns in told(read[0])[1]] == ["assistant: a red one"]
    with pytest.raises(
        ValueError, match="caption is to be read from 'recpa', but none of 1 rows .* they have caption"
    ):
        opened(str(tmp_path / "t.jsonl"), columns={"caption": "recpa"})
    (tmp_path / "u.jsonl").write_text(json.dumps({"question": "red", "answer": "what?"}) + "\n")
    read = opened(str(tmp_path / "u.jsonl"), columns={"question": "answer", "answer": "question"})
    assert told(read[0])[1] == [["user: what?", "assistant: red"]]


@pytest.mark.parametrize("given", [lambda data: data, lambda data: {"bytes": data, "path": None}, lambda data: [data]])
def test_an_animation_as_bytes_is_a_video(tmp_path, given):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = io.BytesIO()
    frames[0].save(data, "webp", save_all=True, append_images=frames[1:], lossless=True)
    pq.write_table(pa.Table.from_pylist([{"video": given(data.getvalue()), "caption": "x"}]), tmp_path / "t.parquet")
    assert told(load_source(str(tmp_path / "t.parquet"))[0])[0] == [[RED, BLUE]]


def test_empty_answers_among_good_ones_are_left_out(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "captions": ["good", None, " "], "messages": []},
        {"questions": ["a?", "b?"], "answers": ["", "yes"], "captions": []},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_source(str(tmp_path / "t.jsonl"))
    assert [[turns[1] for turns in told(read[number])[1]] for number in range(2)] == [
        ["assistant: good"], ["assistant: yes"]
    ]  # fmt: skip


def test_small_blocks_keep_no_whole_batches_in_memory(tmp_path, monkeypatch):
    rows = [{"image": bytes([number]) * 4096, "caption": "x"} for number in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    monkeypatch.setattr("vora.data.parquet_source.BYTES_PER_BLOCK", 1)
    monkeypatch.setattr("vora.data.parquet_source.MOST_ROWS", 8)
    read = load_source(str(tmp_path / "t.parquet"))
    monkeypatch.undo()
    block = read.read_block(3)
    assert (
        block.num_rows == read.block_sizes[3]
        and block.nbytes == block.get_total_buffer_size()
        or (block.get_total_buffer_size() < 1.5 * block.nbytes)
    )


def test_large_row_groups_are_warned_of_once(tmp_path, monkeypatch):
    pq.write_table(pa.table({"text": ["a b", "c d"]}), tmp_path / "t.parquet", row_group_size=1)
    monkeypatch.setattr("vora.data.parquet_source.LARGE_GROUP", 10)
    with pytest.warns(UserWarning, match="2 row groups of up to 0 MB.*row_group_size=100") as told_of:
        load_source(str(tmp_path / "t.parquet"))
    assert len(told_of) == 1


def test_a_saved_dataset_of_another_split_is_refused(tmp_path):
    saved = datasets.Dataset.from_dict({"text": ["a b"]}, split="train")
    saved.save_to_disk(tmp_path / "set")
    assert len(load_source(str(tmp_path / "set"))) == 1
    with pytest.raises(ValueError, match="is the split 'train' and holds no files of the split 'validation'"):
        load_source(str(tmp_path / "set"), "validation")


# Rows that are fine, though something about them looks like the above


def test_images_inside_messages_need_no_column(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "red"},
    ]
    for column in ("image_path", "file_name", "img"):
        (tmp_path / "t.jsonl").write_text(json.dumps({"messages": turns, column: "a.png"}) + "\n")
        assert told(load_source(str(tmp_path / "t.jsonl"))[0]) == ([RED], [["user: |what?", "assistant: red"]])


def test_text_that_names_what_is_not_there_is_text(tmp_path):
    row = {
        "text": "hello",
        "file_name": "scan1.png",
        "video_url": "https://x.org/v/1",
        "image_license": "https://x.org",
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert told(load_source(str(tmp_path / "t.jsonl"))[0]) == ([], [["text: hello"]])


def test_compressed_files_of_other_things_are_left_alone(tmp_path):
    row = json.dumps({"text": "good"}) + "\n"
    (tmp_path / "train.jsonl").write_text(row)
    for name in ("images.tar.gz", "train.jsonl.gz", "test.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    assert len(load_source(str(tmp_path))) == 1
    (tmp_path / "train-2.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="1 compressed files, such as .*train-2.jsonl.gz"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q? A. cat B. dog", "choices": ["cat", "dog"], "answer": "A"},
        {"question": "how much?", "choices": [1.0, 2.0], "answer": 2.0},
        {"question": "which?", "choices": {"text": ["cat", "dog"], "label": ["A", "B"]}, "answer": "cat"},
        {"question": "which?", "options": "[]", "answer": "42 km"},
        {"question": "is it?", "choices": ["yes", "no"], "answer": "Yes"},
        {"question": "which?", "choices": ["cat", "dog"], "answers": ["cat", None, "cat"]},
    ],
)
def test_answers_beside_choices_are_read(tmp_path, row):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert len(load_source(str(tmp_path / "t.jsonl"))[0].conversations) == 1


def test_named_choices_and_columns_that_come_later_drop_nothing(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png")
    row = {"question": "which?", "answer": "cat", "opts": ["cat", "dog"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert told(opened(str(tmp_path / "t.jsonl"), columns={"choices": "opts"})[0])[1][0][1] == "assistant: cat"
    rows = [{"question": "q", "answer": "a"}] * 600 + [{"question": "q", "answer": "a", "pic": "a.png"}]
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = opened(str(tmp_path / "u.jsonl"), columns={"image": "pic"})
    assert told(read[0])[0] == [] and told(read[600])[0] == [RED]


def test_a_whole_row_in_a_tar_may_have_other_files_beside_it(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("0.json", b'{"text": "hi"}'), ("0.md5", b"x"), ("1.json", b'{"text": "ho"}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert [told(record)[1] for record in load_source(str(tmp_path / "t.tar"))] == [[["text: hi"]], [["text: ho"]]]


def test_compressed_files_beside_the_folder_that_holds_the_data_hinder_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": "good"}) + "\n")
    (tmp_path / "old.jsonl.gz").write_bytes(b"")
    assert len(load_source(str(tmp_path))) == 1
    (tmp_path / "data" / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="1 compressed files, such as .*old.jsonl.gz, are not read"):
        load_source(str(tmp_path))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "good"}) + "\n")
    with pytest.raises(ValueError, match="no files of the split 'test'"):
        load_source(str(tmp_path), "test")


def test_a_named_column_goes_before_its_synonyms(tmp_path):
    row = {"question": "q", "answers": [{"answer": "many"}], "best": "one", "captions": ["no"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    read = opened(str(tmp_path / "t.jsonl"), columns={"answer": "best"})
    assert told(read[0])[1] == [["user: q", "assistant: one"]]


def test_answers_that_are_stored_by_columns_are_read(tmp_path):
    row = {"question": "q", "answers": {"answer": ["red", "red", "blue"], "answer_id": [1, 2, 3]}}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert told(load_source(str(tmp_path / "t.jsonl"))[0])[1] == [["user: q", "assistant: red"]]
