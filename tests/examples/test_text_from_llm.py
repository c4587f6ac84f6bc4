"""The example that samples text from an LLM: turns end as its chat template ends them, nor does it try for ever."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import SHAPE, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "text_from_llm.py"


def folder_of_llm(folder, template):
    """A tiny random LLM with a token of its own for the end of a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = template
    shape = {**SHAPE, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():  # all tokens alike, whatever the text: the end of the turn comes in due course
        llm.lm_head.weight.zero_()
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sampled(folder, out, *options):
    command = [sys.executable, SCRIPT, folder, "--out", out, "--num", "3", "--batch", "32", *options]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_turns_end_with_the_templates_own_token(tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end_of_turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    folder = folder_of_llm(tmp_path / "llm", template)
    result = sampled(folder, tmp_path / "text.jsonl", "--answer-tokens", "300")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)
    assert not any("end_of_turn" in turn["content"] for row in rows for turn in row["messages"])


@pytest.mark.parametrize("kind", ["conversation", "document"])
def test_an_llm_without_a_chat_template_is_sampled_as_it_is_trained(tmp_path, kind):
    folder = folder_of_llm(tmp_path / "llm", None)
    result = sampled(folder, tmp_path / "text.jsonl", "--kind", kind, "--question-tokens", "300")
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "text.jsonl").read_text().splitlines()) == 3


def test_it_gives_up_where_nothing_comes(tmp_path):
    result = sampled(folder_of_llm(tmp_path / "llm", None), tmp_path / "text.jsonl", "--question-tokens", "1")
    assert result.returncode == 1 and "20 rounds of 32 brought no new conversation" in result.stderr
