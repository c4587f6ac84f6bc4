"""The main job, end to end, with the real LLM and images: minutes long, on request (-m slow)."""

import json

import pytest
from rich.console import Console

from vora.checkpoint import load_model
from vora.data.few_answers import few_answers
from vora.data.readers import load_source
from vora.quickstart.page import write_report
from vora.quickstart.run import run_quickstart
from vora.serve.chat import Chat
from vora.serve.engine import Engine
from vora.train.throughput import TooLittleTime


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "something").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        run_quickstart(tmp_path, llm="smollm2-135m", minutes=1, seed=0, console=Console(quiet=True))


@pytest.mark.parametrize(("token_seconds", "steps"), [(0.01, 51), (0.001, 320)])
def test_a_slow_machine_distills_for_at_most_half_of_its_time(tmp_path, monkeypatch, token_seconds, steps):
    planned = []

    def train(recipe, folder, console):
        planned.append(recipe.distill_only_steps)
        raise InterruptedError

    for name in ("load_source", "load_tokenizer", "load_llm"):
        monkeypatch.setattr(f"vora.quickstart.run.{name}", lambda *arguments: [])
    monkeypatch.setattr("vora.quickstart.run.forward_seconds_per_token", lambda llm: token_seconds)
    monkeypatch.setattr("vora.quickstart.run.train", train)
    with pytest.raises(InterruptedError):
        run_quickstart(tmp_path / "out", minutes=7, console=Console(quiet=True))  # six of them to train
    assert planned == [steps]


@pytest.mark.parametrize(("minutes", "wanted"), [(1.5, "Give --minutes 3 or more"), (7, "give --minutes 9 or more")])
def test_too_few_minutes_are_said_in_the_words_of_the_quickstart(tmp_path, monkeypatch, minutes, wanted):
    def train(recipe, folder, console):
        raise TooLittleTime("too slow", minutes=recipe.max_minutes + 1.5)

    for name in ("load_source", "load_tokenizer", "load_llm"):
        monkeypatch.setattr(f"vora.quickstart.run.{name}", lambda *arguments: [])
    monkeypatch.setattr("vora.quickstart.run.forward_seconds_per_token", lambda llm: 0.01)
    monkeypatch.setattr("vora.quickstart.run.train", train)
    with pytest.raises(ValueError, match=f"--minutes .* --llm smollm2-135m.*{wanted}, or a smaller --llm"):
        run_quickstart(tmp_path / "out", minutes=minutes, console=Console(quiet=True))


def test_the_page_says_what_the_model_does_not_know(tmp_path, model_folder, processor, sources):
    (tmp_path / "run").mkdir()
    lines = [{"samples_seen": n, "lm_loss": 1 / n, "distill_loss": 0.5, "pair_0_0": 0.5} for n in (1, 2)]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("accuracy", "text_only_accuracy", "blank_image_accuracy", "majority_accuracy", "train_seconds")
    counts = {"num_test_questions": 12, "num_samples_seen": 2, "peak_rss_bytes": 1}
    result = dict.fromkeys(names, 0.5) | counts | {"accuracy_by_answer": {"what": 0.5}, "llm": "tiny"}
    shown, model = [load_source(sources[0])[0]], load_model(str(model_folder))[0]
    for warning in (few_answers([[load_source(sources[0])[0]] * 200]), None):
        write_report(tmp_path, result | {"warning": warning}, shown, model, processor)
        page = (tmp_path / "report.html").read_text()
        said = (
            "knows only the answers of its task: of 164 answers looked at only 1 are different (&quot;red&quot;, ...)"
        )
        assert (said in page) == (warning is not None) == ('class="remark"' in page)
        assert "How far each block follows its teacher" in page
    untaught = [{"samples_seen": 1, "lm_loss": 1.0}]  # teacher=null
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in untaught))
    write_report(tmp_path, result | {"warning": None}, shown, model, processor)
    assert "follows its teacher" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_quickstart_sees(tmp_path):
    result = run_quickstart(tmp_path / "out", llm="smollm2-135m", minutes=13.5, seed=0, console=Console())
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert result["accuracy"] > result["text_only_accuracy"] + 0.1
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    chat = Chat(Engine(*load_model(str(tmp_path / "out" / "model"))), max_new_tokens=8)
    assert "".join(chat.ask("hello"))
