"""Text ability: every token once, and the base's own figures."""

import json
import random

import numpy as np
import pytest
import torch
from command import vora
from test_readers import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from vora.checkpoint import load_model
from vora.eval.tasks.text_windows import windows_of

WORDS = "what colour is the shape blue red green circle square triangle yes no two one none image".split()


def sentence(seed, length=30):
    return " ".join(random.Random(seed).choices(WORDS, k=length)) + "."


@pytest.fixture(scope="module")
def changed(tmp_path_factory, model_folder):
    """The folder of a model that is far from its base: too sure of what it knows nothing of."""
    model, processor = load_model(str(model_folder))
    for parameter in model.model.language_model.parameters():
        parameter.data *= 3
    folder = tmp_path_factory.mktemp("changed")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "held.txt").write_text(sentence(0, 200))
    write(folder / "held.jsonl", *({"text": sentence(n)} for n in range(1, 12)))
    messages = [{"role": "user", "content": "what colour?"}, {"role": "assistant", "content": "blue."}]
    write(folder / "turns.jsonl", {"messages": messages})
    return folder


@pytest.fixture
def measured(report_of, llm_folder):
    """The report of a model held against the tiny LLM."""
    return lambda model, *data: report_of("text", data, "--base", llm_folder, model=model)


@torch.no_grad()
def surprise(llm_folder, text):
    """(nats, tokens, bytes) of a text after its first token, by transformers alone."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_folder), AutoTokenizer.from_pretrained(llm_folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    count = ids.shape[1] - 1
    num_bytes = len(text.encode()) - len(tokenizer.decode(ids[0, :1]).encode())
    return float(llm(ids, labels=ids).loss) * count, count, num_bytes


def test_a_model_that_is_its_base_has_its_figures(model_folder, data, measured):
    files = data / "held.jsonl", data / "turns.jsonl"
    report = measured(model_folder, *files)
    metrics = report["metrics"]
    assert report["task"] == "text" and report["num_documents"] == 12
    assert report["drawn"] == "documents" and report["verdict"].startswith("Language is kept")
    assert metrics["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-6)
    assert metrics["perplexity_ratio"]["interval"] == pytest.approx([1, 1], abs=1e-6)
    again = measured(model_folder, *files)
    assert again["metrics"] == metrics and again["num_resumed"] == 2 * 12


def test_perplexity_is_that_of_transformers(llm_folder, changed, data, measured):
    report = measured(changed, data / "held.jsonl")
    nats, count, num_bytes = np.sum([surprise(llm_folder, sentence(n)) for n in range(1, 12)], axis=0)
    metrics = {name: one["value"] for name, one in report["metrics"].items()}
    assert metrics["base_perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert metrics["base_bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-5)
    assert metrics["perplexity"] / metrics["base_perplexity"] == pytest.approx(metrics["perplexity_ratio"])
    assert metrics["perplexity_ratio"] > 1.02 and report["verdict"].startswith("Language is lost")


def test_a_long_text_goes_in_windows(llm_folder, model_folder, data, measured, tmp_path, monkeypatch):
    monkeypatch.setattr("vora.eval.tasks.text.WINDOW", 64)
    report = measured(model_folder, data / "held.txt")
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


def test_an_answer_after_a_prompt_longer_than_a_window_is_scored():
    ids, scored = np.arange(100, 137), np.arange(37) > 31
    windows = windows_of(ids, scored, 10, 10)
    found = [window.sample["targets"] for window in windows]
    assert [target for one in found for target in one[one != -100]] == ids[scored].tolist()
    assert sum(window.num_bytes for window in windows) == pytest.approx(10)


def test_what_is_wrong_is_said(model_folder, llm_folder, data, tmp_path):
    arguments = ["eval", "-m", model_folder, "--task", "text", "-o", tmp_path / "r.json", "--data"]
    assert "name it with --base" in vora(*arguments, data / "held.txt").stderr
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(llm_folder).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(llm_folder)
    tokenizer.add_tokens(["triangles"])
    tokenizer.save_pretrained(other)
    assert "splits text into other tokens" in vora(*arguments, data / "held.txt", "--base", other).stderr


def test_one_text_tells_too_little_and_a_broken_row_is_bad(changed, measured, tmp_path):
    report = measured(changed, write(tmp_path / "few.jsonl", {"text": sentence(1)}, {"messages": ["hi"]}))
    assert report["num_bad"] == 1 and "not built as its layout" in report["bad"][0]["cause"]
    assert report["verdict"].startswith("Too little text to tell")
