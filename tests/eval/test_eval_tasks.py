"""Tasks: rows of the layouts to examples, predictions to scores, scores to metrics."""

import json
import re

import pytest
from PIL import Image

from vora.eval.rows import Rows, SkippedRows
from vora.eval.run import make_task

METRICS = {
    "captions": ["cider_d", "bleu_4"],
    "vqa": ["exact_accuracy", "vqa_accuracy"],
    "classify": ["accuracy", "generated_accuracy"],
    "statements": ["accuracy", "consistency", "ordering_consistency"],
}


def test_places_in_a_question_are_not_read_out(tmp_path):
    row = {"question": "<image>\nwhat is this?", "answer": "red"}
    assert make_task("vqa").examples(rows_of(tmp_path, row), SkippedRows())[0].prompt == "what is this?"


def test_all_frames_of_a_video_are_shown(tmp_path):
    frames = [Image.new("RGB", (8, 8), (0, 80 * n, 0)) for n in range(3)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "v.jsonl").write_text(json.dumps({"video": "v.gif", "caption": "it turns green"}) + "\n")
    shown = make_task("captions").examples(Rows([tmp_path / "v.jsonl"]), SkippedRows())[0].images()
    assert len(shown) == 3


def right_answers(examples):
    return [{"generated": one.references[0], "chosen": one.references[0]} for one in examples]


@pytest.mark.parametrize("task", METRICS)
def test_the_right_answers_score_full(task, task_data):
    made = make_task(task)
    examples = made.examples(Rows([task_data / f"{task}.parquet"]), SkippedRows())
    metrics = made.metrics(examples, made.score(examples, right_answers(examples)))
    for name in METRICS[task]:
        value = metrics[name]["value"]
        assert value == pytest.approx(1) or (name == "cider_d" and value > 1)


def rows_of(tmp_path, *rows):
    """`Rows` of a file with an image in each row."""
    imaged = [{"image": f"{number}.png", **row} for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in imaged))
    return Rows([tmp_path / "rows.jsonl"])


def test_one_bad_question_leaves_the_others_of_its_image(tmp_path):
    skipped = SkippedRows()
    row = {"questions": ["a", "b", "c", "d"], "answers": ["x", "", "z", ["one", {"answer": ["two"]}]]}
    found = make_task("vqa").examples(rows_of(tmp_path, row), skipped)
    assert [(one.name, one.references) for one in found] == [("rows.jsonl:0#0", ["x"]), ("rows.jsonl:0#2", ["z"])]
    assert [one["name"] for one in skipped.named] == ["rows.jsonl:0#1", "rows.jsonl:0#3"]
    assert skipped.named[1]["cause"] == "Its answer is a list, not text."


@pytest.mark.parametrize(
    ("task", "row", "reference"),
    [
        ("vqa", {"question": "how many?", "answer": 2.0}, "2"),
        ("vqa", {"question": "q", "answers": {"answer": ["a", "b"], "answer_id": [1, 2]}}, "a"),
        ("vqa", {"question": "q", "choices": ["x", "y"], "answer": "y"}, "y"),
        ("statements", {"sentence": "s", "label": 1.0}, "true"),
        ("classify", {"label": 1.0}, "blue"),
    ],
)
def test_numbers_and_stored_columns_are_read_as_training_reads_them(tmp_path, task, row, reference):
    labels = ["red", "blue"] if task == "classify" else None
    assert make_task(task, labels=labels).examples(rows_of(tmp_path, row), SkippedRows())[0].references[0] == reference


@pytest.mark.parametrize(
    ("task", "row", "cause"),
    [
        ("vqa", {"question": ["q", "r"], "answers": ["a"]}, "question is a list, not text"),
        (
            "vqa",
            {"question": "which?", "choices": ["x", "y", "z"], "answer": 2},
            "none of its 3 choices: give the text",
        ),
        ("classify", {"label": ["cat"]}, "label is a list, not text"),
        ("classify", {"label": 3}, "label 3 is a number: .* --labels"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, task, row, cause):
    skipped = SkippedRows()
    assert make_task(task).examples(rows_of(tmp_path, row), skipped) == [] and re.search(
        cause, skipped.named[0]["cause"]
    )


def test_rows_of_one_image_are_one(tmp_path, png, parquet):
    captions = ["a dog runs", "a cat sits", "a bus waits", "a cow"]
    rows = [{"image": f"{n % 3}.png", "caption": caption} for n, caption in enumerate(captions)]
    examples = make_task("captions").examples(rows_of(tmp_path, *rows), SkippedRows())
    assert [one.references for one in examples] == [["a dog runs", "a cow"], ["a cat sits"], ["a bus waits"]]
    first = make_task("captions", max_examples=1).examples(rows_of(tmp_path, *rows), SkippedRows())
    assert [one.references for one in first] == [["a dog runs"]]  # up to where another image begins
    copies = parquet("copies", [{"image": png(0), "caption": "a"}, {"image": png(0), "caption": "b"}])
    assert len(make_task("captions").examples(Rows([copies]), SkippedRows())) == 1


def test_what_any_model_would_get_right_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 examples have one class, 'cat'.*--labels"):
        make_task("classify").examples(rows_of(tmp_path, {"label": "cat"}, {"label": "cat"}), SkippedRows())


def test_an_empty_image_column_hides_no_other(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"image": "", "images": ["a.png"], "caption": "x"}
    assert len(make_task("captions").examples(rows_of(tmp_path, row), SkippedRows())[0].images()) == 1


def test_a_named_column_goes_before_its_synonyms(tmp_path):
    row = {"question": "q", "answers": ["many"], "best": "one", "image": "no.png", "pic": "a.png"}
    rows_of(tmp_path, row)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    named = {"answer": "best", "images": "pic"}
    example = make_task("vqa").examples(Rows([tmp_path / "rows.jsonl"], columns=named), SkippedRows())[0]
    assert example.references == ["one"] and len(example.images()) == 1


def test_one_image_has_no_cider(tmp_path):
    made = make_task("captions")
    examples = made.examples(rows_of(tmp_path, {"caption": "a dog"}), SkippedRows())
    metrics = made.metrics(examples, made.score(examples, [{"generated": "a dog"}]))
    assert metrics["cider_d"] == {"value": None, "interval": [None, None]}
    assert metrics["bleu_4"]["interval"] == [None, None]


def test_consistency_wants_every_image_of_a_sentence(tmp_path):
    made = make_task("statements")
    rows = [
        {"sentence": f"there is a {n // 4} box", "label": n % 4 < 2, "identifier": f"{n // 4}-{n % 2}-0"}
        for n in range(8)
    ]
    examples = made.examples(rows_of(tmp_path, *rows), SkippedRows())
    answers = right_answers(examples)
    answers[0]["chosen"] = "false"
    metrics = {name: one["value"] for name, one in made.metrics(examples, made.score(examples, answers)).items()}
    assert metrics == {"accuracy": 7 / 8, "consistency": 1 / 2, "ordering_consistency": 3 / 4}


def test_labels_may_be_numbers_of_named_classes(tmp_path):
    rows = rows_of(tmp_path, *({"label": n % 3} for n in range(6)))
    examples = make_task("classify", labels=["red", "blue", "green"]).examples(rows, SkippedRows())
    assert [one.references[0] for one in examples[:4]] == ["red", "blue", "green", "red"]
    assert examples[0].candidates == ("red", "blue", "green")
    skipped = SkippedRows()
    assert len(make_task("classify", labels=["red", "blue"]).examples(rows, skipped)) == 4
    assert skipped.count == 2


def test_all_classes_are_candidates_of_a_few_examples(task_data):
    examples = make_task("classify", max_examples=1).examples(Rows([task_data / "classify.parquet"]), SkippedRows())
    assert len(examples) == 1 and examples[0].candidates == ("blue", "green square", "red")


def test_the_first_split_that_is_there_is_read(parquet, tmp_path):
    for name in ("train", "validation"):
        parquet(f"{name}-00000-of-00001", [{"captions": [name]}])
    made = make_task("captions")
    assert made.examples(Rows([tmp_path]), SkippedRows())[0].references == ["validation"]
    assert made.examples(Rows([tmp_path], split="train"), SkippedRows())[0].references == ["train"]
    with pytest.raises(ValueError, match="dev"):
        Rows([tmp_path], split="dev")


def test_what_several_people_counted_is_no_number_of_a_choice(tmp_path):
    row = {"question": "how many?", "choices": ["two", "three", "four"], "answers": ["2", "2", "two"]}
    (example,) = make_task("vqa").examples(rows_of(tmp_path, row), SkippedRows())
    assert example.references == ["2", "2", "two"]
