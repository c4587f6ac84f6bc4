"""`vora eval` and `vora.eval.run.evaluate` end to end: reports, going on, and what goes wrong."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import command_line

from vora.checkpoint import load_model
from vora.eval.rows import Rows, SkippedRows
from vora.eval.run import evaluate, evaluation_of, make_task
from vora.eval.scoring.generate import prompt_of, without_thinking
from vora.eval.tasks.classify import Classify

METRICS = {
    "captions": ["cider_d", "bleu_4"],
    "vqa": ["exact_accuracy", "vqa_accuracy"],
    "classify": ["accuracy", "generated_accuracy"],
    "statements": ["accuracy", "consistency", "ordering_consistency"],
    "exact": ["accuracy", "accuracy_yes_no", "accuracy_other", "accuracy_with_blank"],
}


@pytest.mark.parametrize("task", METRICS)
def test_every_task_leaves_a_report(task, task_data, model_folder, report_of, tmp_path):
    file = task_data / f"{'vqa' if task == 'exact' else task}.parquet"
    report = report_of(task, file)
    lines = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()]
    assert report["task"] == task and report["num_bad"] == 0
    assert report["num_examples"] == (28 if task in ("vqa", "exact") else 14)
    for name in METRICS[task]:
        value, (low, high) = report["metrics"][name]["value"], report["metrics"][name]["interval"]
        if value is not None:
            assert 0 <= low <= value <= high
    assert report["commit"] is None or len(report["commit"]) >= 40
    assert report["seconds"] > 0 and report["model"] == str(model_folder) and report["seed"] == 0
    if task != "exact":
        assert len(lines) - 1 == report["num_examples"] and all("scores" in line for line in lines[1:])
    rerun = report_of(task, file)
    assert rerun["num_resumed"] == len(lines) - 1 and rerun["metrics"] == report["metrics"]


def test_python_and_the_command_give_the_same_report(task_data, model_folder, report_of, tmp_path):
    by_command = report_of("vqa", task_data / "vqa.parquet", "--max-examples", "4")
    loaded = load_model(str(model_folder))
    for number, model in enumerate((model_folder, loaded)):
        out = tmp_path / f"{number}.json"
        report = evaluate(model, "vqa", task_data / "vqa.parquet", out, max_examples=4, model_name=model_folder)
        assert report.metrics == by_command["metrics"] and report.to_dict() == json.loads(out.read_text())
    ready = evaluation_of("vqa", max_examples=2)
    assert evaluate(loaded, ready, [task_data / "vqa.parquet"], tmp_path / "x.json").num_examples == 2
    with pytest.raises(ValueError, match="seed: give them to the Evaluation"):
        evaluate(loaded, ready, [task_data / "vqa.parquet"], tmp_path / "x.json", seed=1)


def test_a_killed_run_goes_on_and_loses_at_most_a_batch(task_data, model_folder, command, tmp_path, capsys):
    data = ["--task", "vqa", "--data", task_data / "vqa.parquet", "--max-examples", 16]
    arguments = ["eval", "-m", model_folder, *data, "-o"]
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
    assert command(*arguments, tmp_path / "a.json") == 0
    assert "Going on after 9 of 16" in " ".join(capsys.readouterr().err.split())
    assert command(*arguments, tmp_path / "b.json") == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first["metrics"] == second["metrics"] and first["num_resumed"] == 9 and second["num_resumed"] == 0
    capsys.readouterr()
    assert command(*arguments, tmp_path / "a.json", "--prompt", "Say: {}") == 1
    assert 'settings.prompt was "{}", is "Say: {}"' in " ".join(capsys.readouterr().err.split())


def test_a_row_for_each_question_is_drawn_with_its_image(parquet, png, report_of, monkeypatch):
    groups = []
    monkeypatch.setattr("vora.eval.tasks.task.share", lambda values, of, seed: groups.append(of) or {"value": 0.0,
                        "interval": [0.0, 0.0]})  # fmt: skip
    rows = [{"image": png(n // 4), "question": f"what {n}?", "answer": "red"} for n in range(8)]
    report_of("vqa", parquet("rows", rows))
    assert len(set(groups[0])) == 2 and groups[0][:4] == groups[0][:1] * 4


def test_bad_rows_are_counted_named_and_skipped(parquet, png, report_of):
    rows = [{"image": png(n), "captions": ["a dog", "red dog"]} for n in range(4)]
    rows[1]["captions"] = []
    rows[2]["image"] = {"bytes": b"no image", "path": "x.png"}
    report = report_of("captions", parquet("some", rows))
    assert report["num_examples"] == 2 and report["num_bad"] == 2
    assert {one["name"] for one in report["bad"]} == {"some.parquet:1", "some.parquet:2"}


def test_one_overlong_example_is_bad_and_the_others_are_asked(parquet, report_of):
    rows = [{"question": "what? " * (1 + 300 * n), "answer": "red"} for n in range(2)]
    report = report_of("vqa", parquet("long", rows))
    assert report["num_examples"] == 1 and report["bad"][0]["name"] == "long.parquet:1#0"
    assert "context holds 256" in report["bad"][0]["cause"]


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("captions", [{"captions": ["a dog", text]} for text in ("one", "\ud83d", "two")]),
        ("vqa", [{"question": question, "answer": "red"} for question in ("what?", "\ud83d?", "is it?")]),
        ("classify", [{"label": label} for label in ("red", "\ud83d", "blue")]),
        ("probe", [{"question": "what?", "answer": answer} for answer in ("red", "\udc80", "blue")]),
    ],
)
def test_a_lone_surrogate_is_a_bad_row(task, rows, ending, report_of, tmp_path):
    for number, row in enumerate(rows):
        Image.new("RGB", (8, 8 + number)).save(tmp_path / f"{number}.png")
        row["image"] = f"{number}.png"
    text = json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"rows.{ending}").write_text(text)
    report = report_of(task, tmp_path / f"rows.{ending}")
    assert report["num_examples"] == 2 and report["num_bad"] == 1
    assert report["bad"][0]["name"] == f"rows.{ending}:1" and "half of a surrogate pair" in report["bad"][0]["cause"]


def test_a_lone_surrogate_in_text_is_a_bad_row(llm_folder, report_of, tmp_path):
    rows = [{"text": text} for text in ("what colour is red?", "is \ud83d red?")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = report_of("text", tmp_path / "text.jsonl", "--base", llm_folder)
    assert report["num_documents"] == 1 and report["bad"][0]["name"] == "text.jsonl:1"


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


@pytest.mark.parametrize(
    ("task", "row", "metric", "options"),
    [
        ("vqa", {"question": "what?", "answer": "red"}, "vqa_accuracy", []),
        ("captions", {"caption": "a red dog runs"}, "bleu_4", []),
        ("classify", {"label": "red"}, "generated_accuracy", []),
        ("probe", {"question": "what?", "answer": "red"}, "vqa_accuracy_with_right", ["--generate"]),
    ],
)
def test_every_generating_task_scores_what_follows_the_thoughts(
    task, row, metric, options, parquet, report_of, monkeypatch, tmp_path
):
    answer = next(row[name] for name in ("answer", "caption", "label") if name in row)

    def thinks(model, processor, prompts, *args, **kwargs):
        return [f"<think>\n\n</think>\n\n{answer}"] * len(prompts)

    monkeypatch.setattr("vora.eval.scoring.predict.free_answers", thinks)
    rows = [row, row] + ([{"label": "blue"}] if task == "classify" else [])
    report = report_of(task, parquet("rows", rows), *options)
    assert report["metrics"][metric]["value"] == pytest.approx(2 / 3 if task == "classify" else 1)
    if task != "probe":  # the file has what was said
        line = json.loads((tmp_path / "r.predictions.jsonl").read_text().splitlines()[1])
        assert line["generated"] == f"<think>\n\n</think>\n\n{answer}"


def test_several_files_are_one_set(task_data, report_of):
    report = report_of("vqa", [task_data / "vqa.parquet"] * 2, "--max-examples", 30)
    assert report["num_examples"] == 30


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
        (["--task", "probe", "--of", "text"], "--of text is no task that can be probed"),
        (["--task", "probe", "--against", "blank"], "other is needed"),
        (["--task", "probe", "--against", "other,black"], "there is no black"),
    ],
)
def test_what_goes_wrong_is_one_line(
    task_data, model_folder, command, tmp_path, monkeypatch, capsys, arguments, wanted
):
    (task_data / "labels").write_text("red\nblue\n")
    filled = [argument.format(data=task_data) for argument in arguments]
    filled += [] if "--data" in filled else ["--data", task_data / "vqa.parquet"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert command("eval", "-m", model_folder, *filled, "-o", tmp_path / "r.json") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "error:" in error and wanted in error, error


def test_a_report_names_all_states_that_its_predictions_come_from(task_data, report_of, tmp_path, capsys):
    report = report_of("classify", task_data / "classify.parquet")
    (state,) = report["predicted_at"]
    assert state.endswith(f" on {report['device']}") and "Warning" not in capsys.readouterr().err
    cache = tmp_path / "r.predictions.jsonl"
    lines = cache.read_text().splitlines()
    lines[1] = lines[1].replace(state, "0123 on a GPU")
    cache.write_text("".join(line + "\n" for line in lines[:-1]))
    assert report_of("classify", task_data / "classify.parquet")["predicted_at"] == ["0123 on a GPU", state]
    assert "predictions come from 2 states" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("verb", "taken", "out"),
    [
        (["eval", "--task", "captions", "--data", "{own}", "-o"], "own.json", "own.json"),
        (["eval", "--task", "probe", "--data", "x.jsonl", "-o"], "own.png", "own.json"),
        (["inspect", "x.png", "-o"], "own.json", "own.html"),
    ],
)
def test_what_is_the_users_own_is_not_overwritten(tmp_path, command, capsys, verb, taken, out):
    (tmp_path / taken).write_text("[]")
    assert command(*(argument.format(own=tmp_path / taken) for argument in verb), tmp_path / out) == 1
    error = "".join(capsys.readouterr().err.split())
    assert "isthereandno" in error and "chooseanother" in error and (tmp_path / taken).read_text() == "[]"


def test_predictions_for_other_questions_are_not_gone_on_with(
    task_data, model_folder, report_of, command, tmp_path, monkeypatch, capsys
):
    file = task_data / "classify.parquet"
    report_of("classify", file)
    monkeypatch.setattr(Classify, "prompt_for", lambda self, text="": "What else?")  # as later code might ask
    assert command("eval", "-m", model_folder, "--task", "classify", "--data", file, "-o", tmp_path / "r.json") == 1
    assert "settings" in capsys.readouterr().err


def test_an_image_can_be_replaced(task_data, model_folder):
    _, processor = load_model(str(model_folder))
    example = make_task("captions").examples(Rows([task_data / "captions.parquet"]), SkippedRows())[0]
    blank = replace(example, images=lambda: [Image.new("RGB", one.size, "white") for one in example.images()])
    none = replace(example, images=lambda: [])
    seen, white, text_only = (prompt_of(processor, one) for one in (example, blank, none))
    assert len(seen) == len(white) > len(text_only)
    assert not torch.equal(seen.inputs["pixel_values"], white.inputs["pixel_values"])
