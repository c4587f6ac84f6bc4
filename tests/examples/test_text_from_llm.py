"""The example that samples text from an LLM: turns end as its chat template ends them, nor does it try for ever."""

import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from tiny import save_tiny_llm, tiny_tokenizer

SCRIPT = str(Path(__file__).parents[2] / "examples" / "text_from_llm.py")


def sampled(folder, template, *options):
    """The rows that the script wrote of a tiny random LLM with a token of its own for the end of a turn."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = template
    # all tokens are alike, whatever the text: the end of the turn comes in due course
    llm, out = save_tiny_llm(folder / "llm", tokenizer, initializer_range=0.0), folder / "text.jsonl"
    with mock.patch.object(sys, "argv", [SCRIPT, llm, "--out", str(out), "--num", "3", "--batch", "32", *options]):
        runpy.run_path(SCRIPT, run_name="__main__")
    return [json.loads(line) for line in out.read_text().splitlines()]


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end_of_turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("template, kind", [(TEMPLATE, "conversation"), (None, "conversation"), (None, "document")])
def test_an_llm_is_sampled_as_it_is_trained(tmp_path, template, kind):
    rows = sampled(tmp_path, template, "--kind", kind, "--question-tokens", "100", "--answer-tokens", "100")
    assert len(rows) == 3 and "end_of_turn" not in str(rows)
    if kind == "document":
        assert all(row.keys() == {"text"} for row in rows)
    else:
        assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)


def test_it_gives_up_where_nothing_comes(tmp_path):
    with pytest.raises(SystemExit, match="20 rounds of 32 brought no new conversation"):
        sampled(tmp_path, None, "--question-tokens", "1")
