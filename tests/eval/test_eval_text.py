"""Text ability: every token once, the base's own figures, and what counts as a question."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vora
from vora.data.answers import choice_question_of
from vora.eval.tasks.text_items import windows_of

WORDS = "what colour is the shape blue red green circle square triangle yes no two one none image".split()


def sentence(seed, length=30):
    return " ".join(random.Random(seed).choices(WORDS, k=length)) + "."


QUESTIONS = [
    {"question": "what colour?", "choices": {"text": ["red", "blue one"], "label": ["1", "2"]}, "answerKey": "2"},
    {"question": "which shape?", "choices": {"text": ["square", "circle", "no"], "label": ["A", "B", "C"]},
     "answerKey": "C"},
]  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory, llm_folder):
    """{how far from its base: folder} of models."""
    folders = {}
    for change in (0, 2):
        torch.manual_seed(0)
        model = vora.VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=12)
        for parameter in model.model.language_model.parameters():
            parameter.data *= 1 + change  # too sure of what it knows nothing of
        folders[change] = tmp_path_factory.mktemp(f"merged{change}")
        model.save_pretrained(folders[change])
        vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12).save_pretrained(folders[change])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "held.txt").write_text(sentence(0, 200))
    rows = [{"text": sentence(n)} for n in range(1, 12)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = [{"role": "user", "content": "what colour?"}, {"role": "assistant", "content": "blue."}]
    (folder / "turns.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    pq.write_table(pa.Table.from_pylist(QUESTIONS), folder / "arc.parquet")
    return folder


@pytest.fixture
def measured(report_of, merged, llm_folder):
    """The report of a model that is so far from its base."""
    return lambda change, *data: report_of("text", data, "--base", llm_folder, model=merged[change])


@torch.no_grad()
def surprise(llm_folder, text):
    """(nats, tokens, bytes) of a text after its first token, by transformers alone."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_folder), AutoTokenizer.from_pretrained(llm_folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    count = ids.shape[1] - 1
    num_bytes = len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode())
    return float(llm(ids, labels=ids).loss) * count, count, num_bytes


def test_a_model_that_is_its_base_has_its_figures(data, measured):
    files = data / "held.jsonl", data / "arc.parquet", data / "turns.jsonl"
    report = measured(0, *files)
    metrics = report["metrics"]
    assert report["task"] == "text" and report["num_documents"] == 12 and report["num_questions"] == 2
    assert report["drawn"] == "documents" and report["verdict"].startswith("Language is kept")
    assert metrics["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert metrics["perplexity_ratio"]["interval"] == pytest.approx([1, 1], abs=1e-6)
    assert metrics["accuracy_difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    again = measured(0, *files)
    assert again["metrics"] == metrics and again["num_resumed"] == 2 * 14


def test_perplexity_is_that_of_transformers(llm_folder, data, measured):
    report = measured(2, data / "held.jsonl")
    nats, count, num_bytes = np.sum([surprise(llm_folder, sentence(n)) for n in range(1, 12)], axis=0)
    metrics = {name: one["value"] for name, one in report["metrics"].items()}
    assert metrics["base_perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert metrics["base_bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-5)
    assert metrics["perplexity"] / metrics["base_perplexity"] == pytest.approx(metrics["perplexity_ratio"])
    assert metrics["perplexity_ratio"] > 1.02 and report["verdict"].startswith("Language is lost")


def test_a_long_text_goes_in_windows(llm_folder, data, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("vora.eval.tasks.text.WINDOW", 64)
    report = measured(0, data / "held.txt")
    assert report["drawn"] == "windows" and report["num_documents"] == 1
    lines = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()[1:]]
    tokens = AutoTokenizer.from_pretrained(llm_folder)((data / "held.txt").read_text())["input_ids"]
    assert sum(line["num_tokens"] for line in lines) == 2 * (len(tokens) - 1) and len(lines) > 6


@pytest.mark.parametrize("count", [2, 9, 10, 11, 37, 40])
def test_every_token_is_scored_once_with_half_a_window_before_it(count):
    ids, scored = np.arange(100, 100 + count), np.arange(count) % 7 != 3
    scored[0] = False
    found, num_bytes = [], 0
    for window in windows_of(ids, scored, 120, 10):
        sample, num_bytes = window.sample, num_bytes + window.num_bytes
        assert len(sample["input_ids"]) < 10
        for place, target in enumerate(sample["targets"]):
            assert target in (-100, sample["input_ids"][place] + 1)
            if target != -100:
                found.append(int(target))
                assert place >= 4 or sample["input_ids"][0] == 100
    assert found == ids[scored].tolist() and num_bytes == pytest.approx(120)


@pytest.mark.parametrize(
    ("row", "context", "choices", "right"),
    [
        (QUESTIONS[0], "Question: what colour?\nAnswer:", ["red", "blue one"], 1),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "Question: q\nAnswer:", ["a", "b"], 1),
        ({"question": "q", "choices": [1.0, 2.0, 4.0], "answer": 2.0}, "Question: q\nAnswer:", ["1", "2", "4"], 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "B"}, "Question: q\nAnswer:", ["x", "y"], 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "x"}, "Question: q\nAnswer:", ["x", "y"], 0),
        ({"ctx": "He", "endings": ["runs.", "falls."], "label": "1"}, "He", ["runs.", "falls."], 1),
        ({"goal": "g", "sol1": "s", "sol2": "t", "label": 0}, "Question: g\nAnswer:", ["s", "t"], 0),
    ],
)
def test_questions_with_choices_in_all_their_columns(row, context, choices, right):
    found = choice_question_of(row)
    assert (found.context, found.choices, found.right) == (context, choices, right)


def test_a_wrong_key_is_named():
    with pytest.raises(ValueError, match="'E' is none of its 2 choices"):
        choice_question_of({"question": "q", "choices": ["x", "y"], "answer": "E"})


def test_choices_are_scored_as_each_alone(llm_folder, data, measured, tmp_path):
    measured(0, data / "arc.parquet")
    lines = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()[1:]]
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_folder), AutoTokenizer.from_pretrained(llm_folder)
    found = {line["index"]: line["log_probs"] for line in lines}
    for number, row in enumerate(QUESTIONS):
        context = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer(context)["input_ids"])
        for place, choice in enumerate(row["choices"]["text"]):
            ids = tokenizer(f"{context} {choice}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log_probs = llm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
            assert found[number][place] == pytest.approx(float(log_probs.sum()), abs=1e-4)
            assert found[number + 2][place] == pytest.approx(float(log_probs.sum()), abs=1e-4)


def test_what_is_wrong_is_said(merged, llm_folder, data, tmp_path, command, capsys):
    arguments = ["eval", "-m", merged[0], "--task", "text", "-o", tmp_path / "r.json", "--data"]
    assert command(*arguments, data / "held.txt") == 1
    assert "name it with --base" in " ".join(capsys.readouterr().err.split())
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(llm_folder).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    tokenizer.add_tokens(["triangles"])
    tokenizer.save_pretrained(other)
    assert command(*arguments, data / "held.txt", "--base", other) == 1
    assert "splits text into other tokens" in " ".join(capsys.readouterr().err.split())


def test_numbers_among_numbers_are_places():
    row = {"question": "4!?", "choices": ["8", "2", "24", "120"]}
    assert choice_question_of(row | {"answer": 2}).right == 2 and choice_question_of(row | {"answer": "24"}).right == 2
    assert choice_question_of(row | {"answer": 2.0}).right == 2  # of a column in which some are missing
    stem = {"question_stem": "which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    assert choice_question_of(stem).right == 1 and choice_question_of(stem).context.startswith("Question: which?")


def test_one_text_tells_too_little_and_a_broken_row_is_bad(measured, tmp_path):
    rows = [{"text": sentence(1)}, {"messages": ["hi"]}, QUESTIONS[0] | {"answerKey": "1"}]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = measured(2, tmp_path / "few.jsonl")
    assert report["num_bad"] == 1 and "not built as its layout" in report["bad"][0]["cause"]
    assert report["verdict"].startswith("Too little text to tell") and "not shown to differ" in report["verdict"]


def test_an_overlong_question_is_bad(measured, tmp_path):
    rows = [QUESTIONS[0], QUESTIONS[0] | {"question": "what? " * 300}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = measured(0, tmp_path / "long.jsonl")
    assert report["num_questions"] == 1 and "context holds 256: leave it out" in report["bad"][0]["cause"]
    assert report["metrics"]["accuracy_difference"] == {"value": 0.0, "interval": [None, None]}
