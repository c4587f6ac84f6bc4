"""Tasks: rows of the layouts to examples, predictions to scores, scores to metrics; and the command end to end."""

import io
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import command_line

from vora.eval.ledger import Ledger, fingerprint, fingerprints
from vora.eval.presence import objects_in, questions_of
from vora.eval.rows import Bad, Example, Rows
from vora.eval.run import make_task
from vora.serve.chat import load_model

PICTURES = 8


def png(number):
    noise = np.random.default_rng(number).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


LAYOUTS = {
    "captions": [{"captions": [f"a dog runs number {n}", "the dog is red"]} for n in range(PICTURES)],
    "vqa": [{"questions": ["what?", "is it red?"], "answers": ["cup, book", "yes"]} for _ in range(PICTURES)],
    "classify": [{"label": ("red", "blue", "green square")[n % 3]} for n in range(PICTURES)],
    "statements": [
        {
            "sentence": f"there is a {('red', 'blue')[n // 4]} box",
            "label": n % 4 < 2,
            "identifier": f"{n // 4}-{n % 2}-0",
        }
        for n in range(PICTURES)
    ],
    "presence": [
        {"captions": [("a man with a dog", "two cats on a chair", "a hot dog")[n % 3]]} for n in range(PICTURES)
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, rows in LAYOUTS.items():
        table = pa.Table.from_pylist([{"image": png(n), **row} for n, row in enumerate(rows)])
        pq.write_table(table, folder / f"{task}.parquet", row_group_size=3)
    return folder


def in_process(monkeypatch, *arguments):
    from vora import cli

    monkeypatch.setattr(sys, "argv", ["vora", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


METRICS = {
    "captions": ["cider_d", "bleu_4"],
    "vqa": ["exact_accuracy", "vqa_accuracy", "wups_0.9", "wups_0.0"],
    "classify": ["accuracy", "generated_accuracy"],
    "statements": ["accuracy", "consistency", "ordering_consistency"],
    "presence": ["accuracy", "precision", "recall", "f1", "yes_share"],
}


@pytest.mark.parametrize("task", METRICS)
def test_every_task_leaves_a_report(task, data, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "found" / "report.json"
    code = in_process(
        monkeypatch, "eval", "-m", model_folder, "--task", task, "--data", data / f"{task}.parquet", "-o", out
    )
    assert code == 0
    report = json.loads(out.read_text())
    lines = [json.loads(line) for line in (tmp_path / "found" / "report.predictions.jsonl").read_text().splitlines()]
    expected = {"vqa": 16}.get(task, PICTURES)
    assert report["task"] == task and report["num_bad"] == 0
    assert report["num_examples"] == len(lines) - 1
    if task != "presence":
        assert report["num_examples"] == expected
    for name in METRICS[task]:
        value, (low, high) = report["metrics"][name]["value"], report["metrics"][name]["interval"]
        if value is not None:
            assert 0 <= low <= value <= high
    assert report["commit"] is None or len(report["commit"]) >= 40
    assert report["seconds"] > 0 and report["model"] == str(model_folder) and report["seed"] == 0
    assert all("scores" in line for line in lines[1:])
    again = in_process(
        monkeypatch, "eval", "-m", model_folder, "--task", task, "--data", data / f"{task}.parquet", "-o", out
    )
    rerun = json.loads(out.read_text())
    assert again == 0 and rerun["num_resumed"] == report["num_examples"] and rerun["metrics"] == report["metrics"]


def test_a_killed_run_goes_on_and_loses_at_most_a_batch(data, model_folder, tmp_path, monkeypatch, capsys):
    arguments = ["eval", "-m", model_folder, "--task", "vqa", "--data", data / "vqa.parquet", "-o"]
    small = (
        "import vora.eval.prompting as p; p.MOST_ROWS['cpu'] = 3\n"
        "import vora.eval.predict as q, os\n"
        "answers, calls = q.free_answers, []\n"
        "def counted(*a, **k):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: os._exit(9)\n"
        "    return answers(*a, **k)\n"
    )
    main = "from vora.cli import main; main()"
    killed = command_line(*arguments, tmp_path / "a.json", code=small + "q.free_answers = counted\n" + main)
    assert killed.returncode == 9 and not (tmp_path / "a.json").exists()
    ledger = tmp_path / "a.predictions.jsonl"
    assert len(ledger.read_text().splitlines()) == 1 + 9
    with ledger.open("a") as file:
        file.write('{"index": 11, "gen')  # died while writing
    assert in_process(monkeypatch, *arguments, tmp_path / "a.json") == 0
    assert "Going on after 9 of 16" in " ".join(capsys.readouterr().err.split())
    assert in_process(monkeypatch, *arguments, tmp_path / "b.json") == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["metrics"] == second["metrics"] and first["num_resumed"] == 9 and second["num_resumed"] == 0
    capsys.readouterr()
    assert in_process(monkeypatch, *arguments, tmp_path / "a.json", "--prompt", "Say: {}") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert 'settings.prompt was "{}", is "Say: {}". Choose' in told


def test_a_ledger_of_other_conditions_is_refused(tmp_path):
    Ledger(tmp_path / "x.jsonl", {"task": "vqa", "seed": 0}).add([{"index": 0}])
    assert Ledger(tmp_path / "x.jsonl", {"task": "vqa", "seed": 0}).num_found == 1
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        Ledger(tmp_path / "x.jsonl", {"task": "vqa", "seed": 1})
    (tmp_path / "y.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="no file of predictions"):
        Ledger(tmp_path / "y.jsonl", {})


def test_what_was_bad_is_asked_again(tmp_path):
    Ledger(tmp_path / "x.jsonl", {}).add([{"index": 0, "name": "a", "bad": "no such file"}, {"index": 1}])
    again = Ledger(tmp_path / "x.jsonl", {})
    assert list(again.done) == [1]
    again.add([{"index": 0, "name": "a"}])
    assert "bad" not in Ledger(tmp_path / "x.jsonl", {}).done[0]


def test_files_in_another_order_are_other_data(tmp_path):
    for folder, text in (("x", "one"), ("y", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps({"caption": text, "image": "a.png"}) + "\n")
    files = [tmp_path / folder / "test.jsonl" for folder in "xy"]
    there, back = Rows(files).files, Rows(files[::-1]).files
    assert len(fingerprints(there)) == 2 and fingerprints(there) != fingerprints(back)


def test_a_row_for_each_question_is_drawn_with_its_picture(model_folder, tmp_path, monkeypatch):
    rows = [{"image": png(n // 4), "question": f"what {n}?", "answer": "red"} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = ("eval", "-m", model_folder, "--task", "vqa", "--data", tmp_path / "rows.parquet")
    groups = []
    monkeypatch.setattr("vora.eval.tasks.share", lambda values, of, seed: groups.append(of) or {"value": 0.0,
                        "interval": [0.0, 0.0]})  # fmt: skip
    assert in_process(monkeypatch, *arguments, "-o", tmp_path / "r.json") == 0
    assert len(set(groups[0])) == 2 and groups[0][:4] == groups[0][:1] * 4


def test_places_in_a_question_are_not_read_out(tmp_path):
    row = {"image": png(0), "question": "<image>\nwhat is this?", "answer": "red"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert make_task("vqa").examples(Rows([tmp_path / "rows.parquet"]), Bad())[0].prompt == "what is this?"


def test_all_frames_of_a_video_are_shown(tmp_path):
    frames = [Image.new("RGB", (8, 8), (0, 80 * n, 0)) for n in range(3)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "v.jsonl").write_text(json.dumps({"video": "v.gif", "caption": "it turns green"}) + "\n")
    shown = make_task("captions").examples(Rows([tmp_path / "v.jsonl"]), Bad())[0].pictures()
    assert len(shown) == 3


def test_fingerprints_see_a_change_anywhere_in_small_files(tmp_path):
    data = bytearray(os.urandom(100_000))
    (tmp_path / "a").write_bytes(data)
    before = fingerprint(tmp_path / "a")
    data[77_777] ^= 1
    (tmp_path / "a").write_bytes(data)
    assert fingerprint(tmp_path / "a") != before


def test_bad_rows_are_counted_named_and_skipped(data, model_folder, tmp_path, monkeypatch):
    rows = [{"image": png(n), "captions": ["a dog", "red dog"]} for n in range(4)]
    rows[1]["captions"] = []
    rows[2]["image"] = {"bytes": b"no picture", "path": "x.png"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    out = tmp_path / "r.json"
    code = in_process(
        monkeypatch, "eval", "-m", model_folder, "--task", "captions", "--data", tmp_path / "some.parquet", "-o", out
    )
    report = json.loads(out.read_text())
    assert code == 0 and report["num_examples"] == 2 and report["num_bad"] == 2
    assert {one["name"] for one in report["bad"]} == {"some.parquet:1", "some.parquet:2"}


def test_several_files_are_one_set(data, model_folder, tmp_path, monkeypatch):
    file, out = data / "captions.parquet", tmp_path / "r.json"
    options = ["eval", "-m", model_folder, "--task", "captions", "-o", out, "--max-examples", "12"]
    assert in_process(monkeypatch, *options, "--data", file, file) == 0
    assert json.loads(out.read_text())["num_examples"] == 12


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--task", "dreams", "-m", "{model}", "--data", "{data}/vqa.parquet"], "choose among captions, vqa"),
        (["--task", "vqa", "-m", "{model}", "--data", "{data}/captions.parquet"], "has no questions"),
        (["--task", "vqa", "-m", "{model}", "--data", "nowhere.parquet"], "no such file"),
        (["--task", "vqa", "-m", "{model}", "--data", "{data}/vqa.parquet", "--prompt", "what?"], "exactly one"),
        (["--task", "vqa", "-m", "{model}", "--data", "{data}/vqa.parquet", "--column", "x"], "ours=theirs"),
    ],
)
def test_what_goes_wrong_is_one_line(data, model_folder, tmp_path, monkeypatch, capsys, arguments, wanted):
    filled = [argument.format(model=model_folder, data=data) for argument in arguments]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert in_process(monkeypatch, "eval", *filled, "-o", tmp_path / "r.json") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "error:" in told and wanted in told, told


def predictions(task, examples, answer):
    return [{"generated": answer(one), "chosen": answer(one)} for one in examples]


@pytest.mark.parametrize("task", METRICS)
def test_the_right_answers_score_full(task, data):
    made = make_task(task)
    examples = made.examples(Rows([data / f"{task}.parquet"]), Bad())
    metrics = made.metrics(examples, made.score(examples, predictions(made, examples, lambda one: one.references[0])))
    for name in METRICS[task]:
        value = metrics[name]["value"]
        assert value == pytest.approx({"yes_share": 0.5}.get(name, 1.0)) or (name == "cider_d" and value > 1)


def test_consistency_wants_every_picture_of_a_sentence(data):
    made = make_task("statements")
    examples = made.examples(Rows([data / "statements.parquet"]), Bad())
    told = predictions(made, examples, lambda one: one.references[0])
    told[0]["chosen"] = "false"
    metrics = {name: one["value"] for name, one in made.metrics(examples, made.score(examples, told)).items()}
    assert metrics == {"accuracy": 7 / 8, "consistency": 1 / 2, "ordering_consistency": 3 / 4}


def test_labels_may_be_numbers_of_named_classes(tmp_path):
    rows = [{"image": png(n), "label": n % 3} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "numbers.parquet")
    made = make_task("classify", labels=["red", "blue", "green"])
    examples = made.examples(Rows([tmp_path / "numbers.parquet"]), Bad())
    assert [one.references[0] for one in examples[:4]] == ["red", "blue", "green", "red"]
    assert examples[0].candidates == ("red", "blue", "green")
    bad = Bad()
    assert len(make_task("classify", labels=["red", "blue"]).examples(Rows([tmp_path / "numbers.parquet"]), bad)) == 4
    assert bad.count == 2


def test_all_classes_are_candidates_of_a_few_examples(data):
    examples = make_task("classify", max_examples=1).examples(Rows([data / "classify.parquet"]), Bad())
    assert len(examples) == 1 and examples[0].candidates == ("blue", "green square", "red")


def test_the_first_split_that_is_there_is_read(data, tmp_path):
    for name in ("train", "validation"):
        rows = [{"image": png(0), "captions": [name]}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}-00000-of-00001.parquet")
    made = make_task("captions")
    assert made.examples(Rows([tmp_path]), Bad())[0].references == ["validation"]
    assert made.examples(Rows([tmp_path], split="train"), Bad())[0].references == ["train"]
    with pytest.raises(ValueError, match="dev"):
        Rows([tmp_path], split="dev")


def test_objects_are_found_in_captions():
    assert objects_in("Two men and their puppies on a skateboard") == {"person", "dog", "skateboard"}
    assert objects_in("a hot dog beside an orange cat") == {"hot dog", "cat"}
    assert objects_in("a man dressed in orange") == {"person"}
    assert objects_in("a couple of dogs under blue skies") == {"dog"} and objects_in("a couple dances") == {"person"}
    assert objects_in("she cares for a husk and weather vanes") == set()
    assert objects_in("two buses, three benches, four puppies") == {"bus", "bench", "dog"}


def test_presence_is_balanced_and_asks_for_what_is_not_there():
    present = [{"dog", "person"}, {"cat"}, {"dog", "ball"}, {"dog"}, set()]
    asked = questions_of(present, 0)
    assert asked == questions_of(present, 0) != questions_of(present, 1)
    assert asked[4] == []
    for things, questions in zip(present, asked):
        for kind in ("random", "popular"):
            answers = [answer for _, answer, kinds in questions if kind in kinds]
            assert answers.count("yes") == answers.count("no") == min(3, len(things), 4 - len(things))
        assert all((thing in things) == (answer == "yes") for thing, answer, _ in questions)
    assert ("dog", "popular") in {
        (thing, kind) for thing, answer, kinds in asked[1] if answer == "no" for kind in kinds
    }
    near = {thing for thing, answer, kinds in asked[3] if answer == "no" and "adversarial" in kinds}
    assert len(near) == 1 and near < {"person", "ball"}


def test_a_presence_question_of_several_ways_is_asked_once_and_counts_in_each():
    made = make_task("presence")
    examples = [
        Example("a", "dog?", ["yes"], list, 0, kind="random popular"),
        Example("b", "cat?", ["no"], list, 0, kind="random"),
        Example("c", "cow?", ["no"], list, 1, kind="popular"),
    ]
    told = [{"chosen": "yes"}, {"chosen": "no"}, {"chosen": "yes"}]
    found = {name: one["value"] for name, one in made.metrics(examples, made.score(examples, told)).items()}
    assert found["accuracy"] == 3 / 4 and found["accuracy_random"] == 1 and found["accuracy_popular"] == 1 / 2
    assert found["precision"] == 2 / 3 and found["recall"] == 1 and found["f1"] == pytest.approx(4 / 5)
    assert found["yes_share"] == 3 / 4 and "accuracy_adversarial" not in found


def test_a_picture_can_be_replaced(data, model_folder):
    from dataclasses import replace

    from vora.eval.prompting import prompt_of

    _, processor = load_model(str(model_folder))
    example = make_task("captions").examples(Rows([data / "captions.parquet"]), Bad())[0]
    blank = replace(example, pictures=lambda: [Image.new("RGB", one.size, "white") for one in example.pictures()])
    none = replace(example, pictures=lambda: [])
    seen, white, blind = (prompt_of(processor, one) for one in (example, blank, none))
    assert len(seen) == len(white) > len(blind)
    assert not torch.equal(seen.inputs["pixel_values"], white.inputs["pixel_values"])
