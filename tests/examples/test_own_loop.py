"""The example with its own training loop learns, on public names alone, and what it saves answers."""

import re
import runpy
import sys
from pathlib import Path

from messages import coloured, write_questions

import vora
from vora.serve.chat import Chat
from vora.serve.engine import Engine

SCRIPT = Path(__file__).parents[2] / "examples" / "own_loop.py"


def test_own_loop_learns(llm_folder, teacher_folder, tmp_path, monkeypatch, capsys):
    folders = [llm_folder, teacher_folder, write_questions(tmp_path / "data.jsonl"), tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, folders)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"lm_loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    chat = Chat(Engine(*vora.load_model(str(tmp_path / "out"))), max_new_tokens=4)
    assert "".join(chat.ask("what?", [coloured("red", (16, 16))]))
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 40 and "from vora" not in text
    assert set(re.findall(r"\bvora\.(\w+)", text)) <= set(vora.__all__)
