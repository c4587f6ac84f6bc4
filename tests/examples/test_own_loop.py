"""The example with its own training loop learns, on public names alone, and what it saves answers."""

import json
import re
import runpy
import sys
from pathlib import Path

from PIL import Image
from tiny import save_tiny_vit

import vora
from vora.serve.chat import Chat
from vora.serve.engine import Engine

SCRIPT = Path(__file__).parents[2] / "examples" / "own_loop.py"


def test_own_loop_learns(llm_folder, tmp_path, monkeypatch, capsys):
    with (tmp_path / "data.jsonl").open("w") as file:
        for colour in ("red", "blue"):
            Image.new("RGB", (16, 16), colour).save(tmp_path / f"{colour}.png")
            print(json.dumps({"image": f"{colour}.png", "question": "what colour?", "answer": colour}), file=file)
    save_tiny_vit(tmp_path / "vit")
    folders = [llm_folder, tmp_path / "vit", tmp_path / "data.jsonl", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, folders)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"lm_loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0]
    chat = Chat(Engine(*vora.load_model(str(tmp_path / "out"))), max_new_tokens=4)
    assert "".join(chat.ask("what colour?", [Image.new("RGB", (16, 16), "red")]))
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 40 and "from vora" not in text
    assert set(re.findall(r"\bvora\.(\w+)", text)) <= set(vora.__all__)
