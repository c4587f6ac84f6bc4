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


def own_loop(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_own_loop_takes_captions_of_a_table_for_so_many_epochs(
    llm_folder, teacher_folder, tmp_path, monkeypatch, capsys
):
    write_questions(tmp_path / "data.jsonl")
    (tmp_path / "captions.csv").write_text("file,text\nred.png,red\nblue.png,blue\n")
    own_loop(monkeypatch, llm_folder, teacher_folder, tmp_path / "captions.csv", tmp_path / "out", "--epochs", 2)
    assert capsys.readouterr().out.count("epoch ") == 2 and (tmp_path / "out" / "config.json").exists()


def test_own_loop_learns(llm_folder, teacher_folder, tmp_path, monkeypatch, capsys):
    data = write_questions(tmp_path / "data.jsonl")
    own_loop(monkeypatch, llm_folder, teacher_folder, data, tmp_path / "out")
    losses = [float(loss) for loss in re.findall(r"lm_loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    chat = Chat(Engine(*vora.load_model(str(tmp_path / "out"))), max_new_tokens=4)
    assert "".join(chat.ask("what?", [coloured("red", (16, 16))]))
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 40 and "from vora" not in text
    assert set(re.findall(r"\bvora\.(\w+)", text)) <= set(vora.__all__)
