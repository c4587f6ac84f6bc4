"""`vora eval` and `vora.eval.run.evaluate` end to end: reports, going on, and what goes wrong."""

import io
import json
import shutil

import pytest
import yaml
from command import vora
from rich.console import Console

from vora.checkpoint import load_model
from vora.data.held_out import HeldOut
from vora.eval.run import evaluate, evaluation_of, trained_on
from vora.eval.scoring import prompt
from vora.eval.scoring.generate import free_answers, without_thinking
from vora.eval.tasks.vqa import Vqa


@pytest.mark.parametrize("task", ["captions", "vqa", "classify", "statements", "exact"])
def test_every_task_leaves_a_report_and_goes_on(task, task_data, model_folder, report_of, tmp_path, capsys):
    files = [task_data / f"{'vqa' if task == 'exact' else task}.parquet"] * 2  # several are one set
    report = report_of(task, files)
    cache = tmp_path / "r.predictions.jsonl"
    lines = cache.read_text().splitlines(keepends=True)
    assert report["task"] == task and report["num_bad"] == 0
    images = 14 if task == "captions" else 28  # whose rows of one image are one
    assert report["num_examples"] == (2 * images if task in ("vqa", "exact") else images)
    for found in report["metrics"].values():
        assert found["value"] is None or 0 <= found["interval"][0] <= found["value"] <= found["interval"][1]
    assert report["commit"] is None or len(report["commit"]) >= 40
    assert report["seconds"] > 0 and report["model"] == str(model_folder) and report["seed"] == 0
    if task != "exact":
        assert len(lines) - 1 == report["num_examples"] and all("scores" in json.loads(line) for line in lines[1:])
    (state,) = report["predicted_at"]
    assert state.endswith(f" on {report['device']} in float32") and "Warning" not in capsys.readouterr().err
    cache.write_text("".join([lines[0], lines[1].replace(state, "0123 on a GPU"), *lines[2:-1], lines[-1][:20]]))
    again = report_of(task, files)  # what a killed run left: half a line at its end
    assert again["num_resumed"] == len(lines) - 2 and again["metrics"] == report["metrics"]
    assert again["predicted_at"] == ["0123 on a GPU", state]
    assert "predictions come from 2 states" in " ".join(capsys.readouterr().err.split())


def test_python_and_the_command_give_the_same_report(task_data, model_folder, report_of, tmp_path):
    by_command = report_of("vqa", task_data / "vqa.parquet", "--max-samples", "4")
    loaded = load_model(str(model_folder))
    for number, model in enumerate((model_folder, loaded)):
        out = tmp_path / f"{number}.json"
        report = evaluate(model, "vqa", task_data / "vqa.parquet", out, max_samples=4, model_name=model_folder)
        assert report.metrics == by_command["metrics"] and report.to_dict() == json.loads(out.read_text())
    ready = evaluation_of("vqa", max_samples=2)
    assert evaluate(loaded, ready, [task_data / "vqa.parquet"], tmp_path / "x.json").num_examples == 2
    with pytest.raises(ValueError, match="seed: give them to the Evaluation"):
        evaluate(loaded, ready, [task_data / "vqa.parquet"], tmp_path / "x.json", seed=1)


def test_reports_of_other_endings_have_predictions_of_their_own(task_data, model_folder, tmp_path):
    model = load_model(model_folder)
    reports = {}
    for name, task in {"a.x": "captions", "a.y": "vqa", "a.json": "classify"}.items():
        report = evaluate(model, task, task_data / f"{task}.parquet", tmp_path / name, max_samples=2)
        reports[name] = report.predictions, json.loads((tmp_path / name).read_text())["task"]
    assert reports == {
        "a.x": ("a.x.predictions.jsonl", "captions"),
        "a.y": ("a.y.predictions.jsonl", "vqa"),
        "a.json": ("a.predictions.jsonl", "classify"),
    }
    assert (
        evaluate(model, "captions", task_data / "captions.parquet", tmp_path / "a.x", max_samples=2).num_resumed == 2
    )
    with pytest.raises(ValueError, match="a.json is a report whose predictions would have the same name"):
        evaluate(model, "captions", task_data / "captions.parquet", tmp_path / "a", max_samples=2)


def test_data_that_a_card_says_was_trained_on_is_told(model_folder, task_data, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    data = [{"name": name} for name in ("captions.parquet", "classif*.parquet", "easy-vqa", "train.jsonl")]
    front = yaml.safe_dump({"vora": {"stages": [{"stage": "pretrain", "data": data}]}})
    (folder / "README.md").write_text(f"---\n{front}---\n# A model\n")
    paths = ["some/captions.parquet", "classify.parquet", "easy-vqa", "captions.jsonl"]
    assert trained_on(folder, paths) == paths[:2] and trained_on(model_folder, paths) == []
    said = []
    for held_out in (None, HeldOut(0.99, 0)):
        console = Console(file=io.StringIO(), width=200)
        evaluate(folder, "captions", task_data / "captions.parquet", tmp_path / f"{len(said)}.json",
                 held_out=held_out, max_samples=2, console=console)  # fmt: skip
        said.append("Warning: the model was trained on" in console.file.getvalue())
    assert said == [True, False]


def test_a_killed_run_loses_at_most_a_batch(task_data, model_folder, tmp_path, monkeypatch):
    data = ["--task", "vqa", "--data", task_data / "vqa.parquet", "--max-samples", 16]
    arguments = ["eval", "-m", model_folder, *data, "-o", tmp_path / "a.json"]
    calls = []

    def three_batches(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return free_answers(*args, **kwargs)

    monkeypatch.setitem(prompt.MOST_ROWS, "cpu", 3)
    monkeypatch.setattr("vora.eval.scoring.predict.free_answers", three_batches)
    assert vora(*arguments).returncode == 130 and not (tmp_path / "a.json").exists()
    assert len((tmp_path / "a.predictions.jsonl").read_text().splitlines()) == 1 + 9
    monkeypatch.undo()
    assert "Going on after 9 of 16" in vora(*arguments).stderr
    assert 'settings.prompt was "{}", is "Say: {}"' in vora(*arguments, "--prompt", "Say: {}").stderr
    monkeypatch.setattr(Vqa, "prompt_for", lambda self, text="": "What else?")  # as later code might ask
    assert "settings.requests was" in vora(*arguments).stderr


def test_a_row_for_each_question_is_drawn_with_its_image(parquet, png, report_of, monkeypatch):
    groups = []
    monkeypatch.setattr("vora.eval.tasks.task.share", lambda values, of, seed: groups.append(of) or {"value": 0.0,
                        "interval": [0.0, 0.0]})  # fmt: skip
    rows = [{"image": png(n // 4), "question": f"what {n}?", "answer": "red"} for n in range(8)]
    report_of("vqa", parquet("rows", rows))
    assert len(set(groups[0])) == 2 and groups[0][:4] == groups[0][:1] * 4


def test_bad_rows_are_counted_named_and_skipped(parquet, report_of):
    rows = [{"question": "what?", "answer": "red"} for _ in range(4)]
    rows[0]["question"] *= 300
    rows[1]["answer"] = ""
    rows[2]["image"] = {"bytes": b"no image", "path": "x.png"}
    report = report_of("vqa", parquet("some", rows))
    assert report["num_examples"] == 1 and report["num_bad"] == 3
    causes = {one["name"]: one["cause"] for one in report["bad"]}
    assert causes.keys() == {f"some.parquet:{number}#0" for number in range(3)}
    assert "context holds 256" in causes["some.parquet:0#0"]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\n\n</think>\n\nred", "red"),
        ("<think>It may be blue.</think> red ", "red"),
        ("It may be blue.</think>\n\nred", "red"),  # begun by the chat template
        ("<think>It may be", ""),  # cut by the limit of tokens
        ("red", "red"),
    ],
)
def test_what_is_thought_is_no_answer(said, answer):
    assert without_thinking(said) == answer


@pytest.mark.parametrize(("task", "metric"), [("vqa", "vqa_accuracy"), ("probe", "vqa_accuracy_with_right")])
def test_what_follows_the_thoughts_is_scored(task, metric, parquet, report_of, monkeypatch, tmp_path):
    said = "<think>\n\n</think>\n\nred"
    monkeypatch.setattr(
        "vora.eval.scoring.predict.free_answers", lambda model, processor, asked, *_, **__: [said] * len(asked)
    )
    options = ["--generate"] if task == "probe" else []
    report = report_of(task, parquet("rows", [{"question": "what?", "answer": "red"}] * 2), *options)
    assert report["metrics"][metric]["value"] == 1
    if task == "vqa":  # the file has what was said
        assert json.loads((tmp_path / "r.predictions.jsonl").read_text().splitlines()[1])["generated"] == said


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--task", "dreams"], "choose among captions, vqa, classify, statements, exact, probe, text"),
        (["--task", "vqa", "--data", "{data}/captions.parquet"], "has no questions"),
        (["--task", "vqa", "--data", "nowhere.parquet"], "no such file"),
        (["--task", "vqa", "--prompt", "what?"], "exactly one"),
        (["--task", "vqa", "--column", "x"], "ours=theirs"),
        (["--task", "vqa", "--of", "captions"], "--of is for the task probe, and this is vqa"),
        (["--task", "captions", "--generate"], "--generate is for the task probe"),
        (["--task", "vqa", "--base", "x"], "--base is for the task text"),
        (["--task", "text", "--labels", "{data}/labels"], "--labels is for the task captions, vqa"),
        (["--task", "probe", "--of", "text"], "`of` (--of) text is no task that can be probed"),
        (["--task", "probe", "--against", "blank"], "other is needed"),
        (["--task", "probe", "--against", "other,black"], "there is no black"),
    ],
)
def test_what_goes_wrong_is_one_line(task_data, model_folder, tmp_path, arguments, wanted):
    (task_data / "labels").write_text("red\nblue\n")
    filled = [argument.format(data=task_data) for argument in arguments]
    filled += [] if "--data" in filled else ["--data", task_data / "vqa.parquet"]
    ran = vora("eval", "-m", model_folder, *filled, "-o", tmp_path / "r.json")
    assert ran.returncode == 1 and "error:" in ran.stderr and wanted in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    ("verb", "taken", "out"),
    [
        (["eval", "--task", "captions", "--data", "{own}", "-o"], "own.json", "own.json"),
        (["eval", "--task", "probe", "--data", "x.jsonl", "-o"], "own.png", "own.json"),
        (["inspect", "x.png", "-o"], "own.json", "own.html"),
    ],
)
def test_what_is_the_users_own_is_not_overwritten(tmp_path, verb, taken, out):
    (tmp_path / taken).write_text("[]")
    ran = vora(*(argument.format(own=tmp_path / taken) for argument in verb), tmp_path / out)
    assert ran.returncode == 1 and "is there and no" in ran.stderr and "choose another" in ran.stderr
    assert (tmp_path / taken).read_text() == "[]"
