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

from vora.eval.prediction_cache import PredictionCache, fingerprint
from vora.eval.rows import Rows, SkippedRows
from vora.eval.run import make_task
from vora.eval.tasks.classify import Classify
from vora.serve.engine import load_model

IMAGES = 8


def png(number):
    noise = np.random.default_rng(number).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


LAYOUTS = {
    "captions": [{"captions": [f"a dog runs number {n}", "the dog is red"]} for n in range(IMAGES)],
    "vqa": [{"questions": ["what?", "is it red?"], "answers": ["cup, book", "yes"]} for _ in range(IMAGES)],
    "classify": [{"label": ("red", "blue", "green square")[n % 3]} for n in range(IMAGES)],
    "statements": [
        {
            "sentence": f"there is a {('red', 'blue')[n // 4]} box",
            "label": n % 4 < 2,
            "identifier": f"{n // 4}-{n % 2}-0",
        }
        for n in range(IMAGES)
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
    "vqa": ["exact_accuracy", "vqa_accuracy"],
    "classify": ["accuracy", "generated_accuracy"],
    "statements": ["accuracy", "consistency", "ordering_consistency"],
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
    expected = {"vqa": 16}.get(task, IMAGES)
    assert report["task"] == task and report["num_bad"] == 0
    assert report["num_examples"] == len(lines) - 1
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
        "import vora.eval.scoring.generate as p; p.MOST_ROWS['cpu'] = 3\n"
        "import vora.eval.scoring.predict as q, os\n"
        "answers, calls = q.free_answers, []\n"
        "def counted(*a, **k):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4: os._exit(9)\n"
        "    return answers(*a, **k)\n"
    )
    main = "from vora.cli import main; main()"
    killed = command_line(*arguments, tmp_path / "a.json", code=small + "q.free_answers = counted\n" + main)
    assert killed.returncode == 9 and not (tmp_path / "a.json").exists()
    cache = tmp_path / "a.predictions.jsonl"
    assert len(cache.read_text().splitlines()) == 1 + 9
    with cache.open("a") as file:
        file.write('{"index": 11, "gen')  # died while writing
    assert in_process(monkeypatch, *arguments, tmp_path / "a.json") == 0
    assert "Going on after 9 of 16" in " ".join(capsys.readouterr().err.split())
    assert in_process(monkeypatch, *arguments, tmp_path / "b.json") == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["metrics"] == second["metrics"] and first["num_resumed"] == 9 and second["num_resumed"] == 0
    capsys.readouterr()
    assert in_process(monkeypatch, *arguments, tmp_path / "a.json", "--prompt", "Say: {}") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert 'settings.prompt was "{}", is "Say: {}"' in told


def test_a_ledger_of_other_conditions_is_refused(tmp_path):
    PredictionCache(tmp_path / "x.jsonl", {"task": "vqa", "seed": 0}).add([{"index": 0}])
    assert PredictionCache(tmp_path / "x.jsonl", {"task": "vqa", "seed": 0}).num_found == 1
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        PredictionCache(tmp_path / "x.jsonl", {"task": "vqa", "seed": 1})
    (tmp_path / "y.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="no file of predictions"):
        PredictionCache(tmp_path / "y.jsonl", {})


def test_what_was_bad_is_asked_again(tmp_path):
    PredictionCache(tmp_path / "x.jsonl", {}).add([{"index": 0, "name": "a", "bad": "no such file"}, {"index": 1}])
    again = PredictionCache(tmp_path / "x.jsonl", {})
    assert list(again.done) == [1]
    again.add([{"index": 0, "name": "a"}])
    assert "bad" not in PredictionCache(tmp_path / "x.jsonl", {}).done[0]


def test_a_row_for_each_question_is_drawn_with_its_image(model_folder, tmp_path, monkeypatch):
    rows = [{"image": png(n // 4), "question": f"what {n}?", "answer": "red"} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    arguments = ("eval", "-m", model_folder, "--task", "vqa", "--data", tmp_path / "rows.parquet")
    groups = []
    monkeypatch.setattr("vora.eval.tasks.task.share", lambda values, of, seed: groups.append(of) or {"value": 0.0,
                        "interval": [0.0, 0.0]})  # fmt: skip
    assert in_process(monkeypatch, *arguments, "-o", tmp_path / "r.json") == 0
    assert len(set(groups[0])) == 2 and groups[0][:4] == groups[0][:1] * 4


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
    rows[2]["image"] = {"bytes": b"no image", "path": "x.png"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    out = tmp_path / "r.json"
    code = in_process(
        monkeypatch, "eval", "-m", model_folder, "--task", "captions", "--data", tmp_path / "some.parquet", "-o", out
    )
    report = json.loads(out.read_text())
    assert code == 0 and report["num_examples"] == 2 and report["num_bad"] == 2
    assert {one["name"] for one in report["bad"]} == {"some.parquet:1", "some.parquet:2"}


def test_several_files_are_one_set(data, model_folder, tmp_path, monkeypatch):
    file, out = data / "vqa.parquet", tmp_path / "r.json"
    options = ["eval", "-m", model_folder, "--task", "vqa", "-o", out, "--max-examples", "20"]
    assert in_process(monkeypatch, *options, "--data", file, file) == 0
    assert json.loads(out.read_text())["num_examples"] == 20


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--task", "dreams", "-m", "{model}", "--data", "{data}/vqa.parquet"], "choose among captions, vqa"),
        (["--task", "vqa", "-m", "{model}", "--data", "{data}/captions.parquet"], "has no questions"),
        (["--task", "vqa", "-m", "{model}", "--data", "nowhere.parquet"], "no such file"),
        (["--task", "vqa", "-m", "{model}", "--data", "{data}/vqa.parquet", "--prompt", "what?"], "exactly one"),
        (["--task", "vqa", "-m", "{model}", "--data", "{data}/vqa.parquet", "--column", "x"], "ours=theirs"),
        (["--task", "probe", "--of", "text", "--data", "x"], "--of text is no task that can be probed"),
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
    examples = made.examples(Rows([data / f"{task}.parquet"]), SkippedRows())
    metrics = made.metrics(examples, made.score(examples, predictions(made, examples, lambda one: one.references[0])))
    for name in METRICS[task]:
        value = metrics[name]["value"]
        assert value == pytest.approx({"yes_share": 0.5}.get(name, 1.0)) or (name == "cider_d" and value > 1)


def test_a_report_names_all_states_that_its_predictions_come_from(data, model_folder, tmp_path, monkeypatch, capsys):
    arguments = ["eval", "-m", model_folder, "--task", "classify", "--data", data / "classify.parquet", "-o"]
    assert in_process(monkeypatch, *arguments, tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    (state,) = report["predicted_at"]
    assert state.endswith(f" on {report['device']}") and "Warning" not in capsys.readouterr().err
    cache = tmp_path / "r.predictions.jsonl"
    lines = cache.read_text().splitlines()
    lines[1] = lines[1].replace(state, "0123 on a GPU")
    cache.write_text("".join(line + "\n" for line in lines[:-1]))
    assert in_process(monkeypatch, *arguments, tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["predicted_at"] == ["0123 on a GPU", state]
    assert "predictions come from 2 states" in " ".join(capsys.readouterr().err.split())


def test_one_overlong_example_is_bad_and_the_others_are_asked(data, model_folder, tmp_path, monkeypatch):
    rows = [{"image": png(n), "question": "what? " * (1 + 300 * n), "answer": "red"} for n in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "long.parquet")
    arguments = ("eval", "-m", model_folder, "--task", "vqa", "--data", tmp_path / "long.parquet", "-o")
    assert in_process(monkeypatch, *arguments, tmp_path / "r.json") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["num_examples"] == 1 and report["bad"][0]["name"] == "long.parquet:1#0"
    assert "context holds 256" in report["bad"][0]["cause"]


@pytest.mark.parametrize(
    ("verb", "taken", "out"),
    [
        (["eval", "--task", "captions", "--data", "{own}", "-o"], "own.json", "own.json"),
        (["eval", "--task", "probe", "--data", "x.jsonl", "-o"], "own.png", "own.json"),
        (["inspect", "x.png", "-o"], "own.json", "own.html"),
    ],
)
def test_what_is_the_users_own_is_not_overwritten(tmp_path, monkeypatch, capsys, verb, taken, out):
    (tmp_path / taken).write_text("[]")
    filled = [argument.format(own=tmp_path / taken) for argument in verb]
    assert in_process(monkeypatch, *filled, tmp_path / out) == 1
    told = "".join(capsys.readouterr().err.split())
    assert "isthereandno" in told and "chooseanother" in told and (tmp_path / taken).read_text() == "[]"


def test_consistency_wants_every_image_of_a_sentence(data):
    made = make_task("statements")
    examples = made.examples(Rows([data / "statements.parquet"]), SkippedRows())
    told = predictions(made, examples, lambda one: one.references[0])
    told[0]["chosen"] = "false"
    metrics = {name: one["value"] for name, one in made.metrics(examples, made.score(examples, told)).items()}
    assert metrics == {"accuracy": 7 / 8, "consistency": 1 / 2, "ordering_consistency": 3 / 4}


def test_all_classes_are_candidates_of_a_few_examples(data):
    examples = make_task("classify", max_examples=1).examples(Rows([data / "classify.parquet"]), SkippedRows())
    assert len(examples) == 1 and examples[0].candidates == ("blue", "green square", "red")


def test_a_image_can_be_replaced(data, model_folder):
    from dataclasses import replace

    from vora.eval.scoring.generate import prompt_of

    _, processor = load_model(str(model_folder))
    example = make_task("captions").examples(Rows([data / "captions.parquet"]), SkippedRows())[0]
    blank = replace(example, images=lambda: [Image.new("RGB", one.size, "white") for one in example.images()])
    none = replace(example, images=lambda: [])
    seen, white, text_only = (prompt_of(processor, one) for one in (example, blank, none))
    assert len(seen) == len(white) > len(text_only)
    assert not torch.equal(seen.inputs["pixel_values"], white.inputs["pixel_values"])


def test_predictions_for_other_questions_are_not_taken_up(data, model_folder, tmp_path, monkeypatch, capsys):
    arguments = ["eval", "-m", model_folder, "--task", "classify", "--data", data / "classify.parquet", "-o"]
    assert in_process(monkeypatch, *arguments, tmp_path / "r.json") == 0
    monkeypatch.setattr(Classify, "prompt_for", lambda self, text="": "What else?")  # as later code might ask
    assert in_process(monkeypatch, *arguments, tmp_path / "r.json") == 1
    assert "settings" in capsys.readouterr().err
