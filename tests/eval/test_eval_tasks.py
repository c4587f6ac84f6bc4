"""Tasks: rows of any files to examples, predictions to scores, scores to metrics."""

import math
import re

import pytest
from PIL import Image
from test_readers import write

from vora.data.answers import tasks_of
from vora.data.held_out import HeldOut
from vora.data.readers import load_source
from vora.eval.prediction_cache import fingerprints
from vora.eval.rows import Data, Rows, SkippedRows
from vora.eval.tasks.evaluation import TASKS
from vora.eval.tasks.text_windows import read_windows


def jsonl(folder, *rows):
    """A file with an image in each row."""
    return write(folder / "rows.jsonl", *({"image": f"{number}.png", **row} for number, row in enumerate(rows)))


def examples(task, file, skipped=None, rows_options=None, **options):
    rows = Rows(Data([file], **(rows_options or {})))
    return TASKS[task](**options).examples(rows, SkippedRows() if skipped is None else skipped)


def test_all_frames_of_a_video_are_shown(tmp_path):
    frames = [Image.new("RGB", (8, 8), (0, 80 * n, 0)) for n in range(3)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    file = jsonl(tmp_path, {"image": "", "video": "v.gif", "caption": "it turns green"})
    assert len(examples("captions", file)[0].images()) == 3


def test_halves_share_no_image_whatever_the_task_and_the_file(task_data, tmp_path):
    def images(file, half, task):
        return {one.group for one in examples(task, file, rows_options={"half": half})}

    for task in ("captions", "vqa", "classify"):
        file = task_data / f"{task}.parquet"
        halves = [images(file, half, task) for half in ("choose", "report")]
        assert all(halves) and halves[0].isdisjoint(halves[1]) and set.union(*halves) == images(file, None, task)
    shuffled = write(tmp_path / "texts.jsonl", *({"text": f"a text {number}"} for number in range(20)))
    numbers = [row.number for row in Rows(Data([shuffled], half="choose")).read(SkippedRows())]
    others = [row.number for row in Rows(Data([shuffled], half="report")).read(SkippedRows())]
    assert sorted(numbers + others) == list(range(20)) and min(len(numbers), len(others)) > 3
    with pytest.raises(ValueError, match="--half is 'test': say choose or report"):
        Data([shuffled], half="test")


def test_a_half_knows_an_image_by_its_name_wherever_its_file_lies(tmp_path):
    sides = []
    for folder in (tmp_path / "here", tmp_path / "there" / "deep"):
        folder.mkdir(parents=True)
        rows = [{"image": f"{number}.png", "caption": "x"} for number in range(20)]
        data = Data([write(folder / "rows.jsonl", *rows)], half="choose")
        sides.append([row.number for row in Rows(data).read(SkippedRows())])
    assert sides[0] == sides[1] and 3 < len(sides[0]) < 17


@pytest.mark.parametrize("options", [{}, {"half": "choose"}, {"held_out": HeldOut(0.5, 0)}])
def test_a_row_whose_image_is_none_ends_no_evaluation(tmp_path, options):
    file = write(tmp_path / "rows.jsonl", {"images": [5], "caption": "x"}, {"videos": [[]], "caption": "x"})
    found = list(Rows(Data([file], **options)).read(skipped := SkippedRows()))
    assert len(found) + skipped.count == 2 or options.get("half")


def test_what_training_holds_out_of_videos_is_measured(tmp_path):
    rows = [{"frames": [f"{number}.png", f"{number}b.png"], "caption": "x"} for number in range(20)]
    file = write(tmp_path / "rows.jsonl", *rows)
    held_out = HeldOut(0.5, 0)
    found = [row.number for row in Rows(Data([file], held_out=held_out)).read(SkippedRows())]
    assert found == [number for number in range(20) if held_out.holds(load_source(file)[number])] and len(found) > 3


def test_a_few_of_files_that_are_sorted_by_class_have_all_classes(tmp_path):
    file = jsonl(tmp_path, *({"label": label} for label in ["ox"] * 5 + ["ass"] * 3 + ["cow"] * 2))
    found = examples("classify", file, max_samples=5)
    assert [one.references[0] for one in found] == ["ox", "ox", "ass", "ass", "cow"]
    assert found[0].candidates == ("ass", "cow", "ox")


def test_one_bad_question_leaves_the_others_of_its_image(tmp_path):
    row = {"questions": ["<image>\na", "b", "c", "d"], "answers": ["x", "", "z", ["one", {"answer": ["two"]}]]}
    found = examples("vqa", jsonl(tmp_path, row), skipped := SkippedRows())
    assert [(one.name, one.references) for one in found] == [("rows.jsonl:0#0", ["x"]), ("rows.jsonl:0#2", ["z"])]
    assert found[0].prompt == "a"  # places are not read out
    assert [one["name"] for one in skipped.named] == ["rows.jsonl:0#1", "rows.jsonl:0#3"]
    assert skipped.named[1]["cause"] == "Its answer is a list, not text."


@pytest.mark.parametrize(
    ("task", "row", "references"),
    [
        ("captions", {"captions": [{"raw": "a  dog"}, None, "a cat"]}, ["a dog", "a cat"]),
        # several people's numbers are what they counted
        ("vqa", {"question": "q", "choices": ["two", "three"], "answers": ["2", "2", "two"]}, ["2", "2", "two"]),
        ("statements", {"sentence": "s", "label": 1.0}, ["true"]),
        ("statements", {"question": "s", "answer": "no"}, ["false"]),
        ("classify", {"label": 1.0}, ["blue"]),
    ],
)
def test_rows_are_read_as_training_reads_them(tmp_path, task, row, references):
    labels = ["red", "blue"] if task == "classify" else None
    assert examples(task, jsonl(tmp_path, row), labels=labels)[0].references == references


@pytest.mark.parametrize(
    ("task", "row", "cause"),
    [
        ("captions", {"captions": [" "]}, "0 captions"),
        ("captions", {"caption": "a \ud83d dog"}, r"'caption' holds '\\ud83d', half of a surrogate pair"),
        ("captions", {"caption": math.nan}, "None of its columns .*'caption'.* holds text"),
        ("vqa", {"question": ["q", "r"], "answers": ["a"]}, "question is a list, not text"),
        ("vqa", {"question": "q", "answer": math.nan}, "It has no answers"),
        ("classify", {"label": ["cat"]}, "label is a list, not text"),
        ("classify", {"label": 3}, "label 3 is a number: .* --labels"),
        ("statements", {"sentence": "s", "label": "maybe"}, "neither true nor false"),
        ("vqa", {"question": "q", "answer": "yes", "history": [["p", "no"]]}, "'history' says what comes before"),
        ("captions", {"caption": "a cat", "system": "Be brief."}, "'system' says what comes before"),
    ],
)
def test_rows_that_are_none_are_named_and_the_others_read(tmp_path, task, row, cause):
    good = {"caption": "a cat", "question": "q", "answer": "yes", "sentence": "s", "label": "true"}
    file = jsonl(tmp_path, row, good, good | {"label": "false"})
    found = examples(task, file, skipped := SkippedRows())
    assert len({one.name for one in found}) == 2 and skipped.count == 1
    assert skipped.named[0]["name"].startswith("rows.jsonl:0") and re.search(cause, skipped.named[0]["cause"])


def test_images_at_urls_are_fetched_only_if_asked_for(tmp_path):
    file = jsonl(tmp_path, {"image": "http://127.0.0.1:9/a.png", "caption": "a dog"})
    with pytest.raises(ValueError, match="allow_urls"):
        examples("captions", file)[0].images()
    with pytest.raises(ValueError) as refused:  # no server of this machine, even so
        examples("captions", file, rows_options={"allow_urls": True})[0].images()
    assert "allow_urls" not in str(refused.value)


def test_rows_of_one_image_are_one(tmp_path, png, parquet):
    captions = ["a dog runs", "a cat sits", "a bus waits", "a cow"]
    file = jsonl(tmp_path, *({"image": f"{n % 3}.png", "caption": caption} for n, caption in enumerate(captions)))
    found = [one.references for one in examples("captions", file)]
    assert found == [["a dog runs", "a cow"], ["a cat sits"], ["a bus waits"]]
    first = examples("captions", file, max_samples=1)
    assert [one.references for one in first] == [["a dog runs", "a cow"]]  # all of its captions, wherever they stand
    copies = [{"image": png(0), "caption": "a"}, {"image": png(0), "caption": "b"}]
    assert len(examples("captions", parquet("copies", copies))) == 1


def test_one_image_has_no_cider(tmp_path):
    made, found = TASKS["captions"](), examples("captions", jsonl(tmp_path, {"caption": "a dog"}))
    metrics = made.metrics(found, made.score(found, [{"generated": "a dog"}]))
    assert metrics["cider_d"] == {"value": None, "interval": [None, None]}
    assert metrics["bleu_4"]["interval"] == [None, None]


def predictions(found, answer):
    return [{"generated": answer(one), "chosen": answer(one)} for one in found]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("captions", ["cider_d", "bleu_4"]),
        ("vqa", ["exact_accuracy", "vqa_accuracy"]),
        ("classify", ["accuracy", "generated_accuracy"]),
        ("statements", ["accuracy", "consistency", "ordering_consistency"]),
    ],
)
def test_the_right_answers_score_full(task, names, task_data):
    made, found = TASKS[task](), examples(task, task_data / f"{task}.parquet")
    metrics = made.metrics(found, made.score(found, predictions(found, lambda one: one.references[0])))
    assert list(metrics) == names
    for name in names:
        assert metrics[name]["value"] == pytest.approx(1.0) or (name == "cider_d" and metrics[name]["value"] > 1)


def test_consistency_wants_every_image_of_a_sentence(parquet):
    rows = [{"sentence": f"a box {n // 4}", "label": n % 4 < 2, "identifier": f"{n // 4}-{n % 2}-0"} for n in range(8)]
    made, found = TASKS["statements"](), examples("statements", parquet("s", rows))
    given = predictions(found, lambda one: one.references[0])
    given[0]["chosen"] = "false"
    metrics = {name: one["value"] for name, one in made.metrics(found, made.score(found, given)).items()}
    assert metrics == {"accuracy": 7 / 8, "consistency": 1 / 2, "ordering_consistency": 3 / 4}


def test_all_classes_are_candidates_of_a_few_examples(task_data):
    found = examples("classify", task_data / "classify.parquet", max_samples=1)
    assert len(found) == 1 and found[0].candidates == ("blue", "green square", "red")


def test_what_any_model_would_get_right_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 examples have one class, 'cat'.*--labels"):
        examples("classify", jsonl(tmp_path, {"label": "cat"}, {"label": "cat"}))


def test_labels_may_be_numbers_of_named_classes(parquet):
    file = parquet("numbers", [{"label": n % 3} for n in range(6)])
    found = examples("classify", file, labels=["red", "blue", "green"])
    assert [one.references[0] for one in found[:4]] == ["red", "blue", "green", "red"]
    assert found[0].candidates == ("red", "blue", "green")
    assert len(examples("classify", file, skipped := SkippedRows(), labels=["red", "blue"])) == 4
    assert skipped.count == 2


def test_a_named_column_goes_before_its_synonyms_and_an_empty_one_hides_no_other(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file = jsonl(tmp_path, {"question": "q", "answers": ["many"], "best": "one", "image": "no.png", "pic": "a.png"})
    (example,) = examples("vqa", file, rows_options={"columns": {"answer": "best", "images": "pic"}})
    assert example.references == ["one"] and len(example.images()) == 1
    file = jsonl(tmp_path, {"image": "", "images": ["a.png"], "caption": "x"})
    assert len(examples("captions", file)[0].images()) == 1


def test_the_first_split_that_is_there_is_read(tmp_path, parquet):
    for name in ("train", "validation"):
        parquet(f"{name}-00000-of-00001", [{"captions": [name]}])
    assert examples("captions", tmp_path)[0].references == ["validation"]
    assert examples("captions", tmp_path, rows_options={"split": "train"})[0].references == ["train"]
    with pytest.raises(ValueError, match="dev"):
        Rows(Data([tmp_path], split="dev"))


def test_files_in_another_order_are_other_data(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
    files = [jsonl(tmp_path / folder, {"caption": folder}) for folder in "xy"]
    there, back = Rows(Data(files)).files, Rows(Data(files[::-1])).files
    assert len(fingerprints(there)) == 2 and fingerprints(there) != fingerprints(back)


@pytest.mark.parametrize(
    ("columns", "tasks"),
    [
        ("captions", ["captions"]), ("text", ["captions"]), ("question answer", ["vqa"]), ("label", ["classify"]),
        ("sentence label", ["statements"]), ("questions answers caption", ["captions", "vqa"]), ("text label",
        ["classify"]), ("id", []),
    ],
)  # fmt: skip
def test_columns_say_what_task_they_are_for(columns, tasks):
    assert tasks_of(dict.fromkeys(columns.split(), "x")) == tasks


def test_text_counts_what_training_would_learn(tmp_path, processor):
    answers = [{"role": "assistant", "content": "no", "weight": 0}, {"role": "assistant", "content": "yes"}]
    said = [{"role": "user", "content": "one?"}, answers[0], {"role": "user", "content": "two?"}, answers[1]]
    rows = [{"messages": said}, {"text": "half \udc00"}, {"messages": said[:1] + [{**answers[1], "content": None}]}]
    file = write(tmp_path / "text.jsonl", *rows)
    (window,), _ = read_windows(Data([file]), processor, 64, skipped := SkippedRows())
    targets = window.sample["targets"]
    assert processor.tokenizer.decode(targets[targets != -100]) == "yes<|im_end|>"
    assert window.num_bytes == pytest.approx(len("yes"))
    assert [one["name"] for one in skipped.named] == ["text.jsonl:1", "text.jsonl:2"]


def test_text_is_that_of_the_column_that_is_named(tmp_path, processor):
    file = write(tmp_path / "rows.jsonl", {"passage": "a long passage", "question": "what?", "answer": "red"})
    (window,), _ = read_windows(Data([file], columns={"text": "passage"}), processor, 64, SkippedRows())
    targets = window.sample["targets"]
    assert processor.tokenizer.decode(targets[targets != -100]) == " long passage"
    assert window.num_bytes == len("a long passage") - 1
