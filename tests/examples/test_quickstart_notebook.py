"""The notebook's cells, in order, on a tiny LLM and a tiny easy-VQA: `vora quickstart` in a small setting."""

import json
import shlex
from itertools import cycle
from pathlib import Path

import pytest
from command import vora
from PIL import Image
from tiny import save_tiny_llm

NOTEBOOK = json.loads((Path(__file__).parents[2] / "examples" / "quickstart.ipynb").read_text())


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder to work in, with an LLM of the recipe's 16 blocks; and settings of a short run."""
    for split, count in (("train", 8), ("test", 4)):
        folder = tmp_path / "cache" / "easy-vqa==1.0" / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        questions = []
        for number, (colour, is_red) in zip(range(count), cycle([("red", "yes"), ("blue", "no")])):
            Image.new("RGB", (64, 64), colour).save(folder / "images" / f"{number}.png")
            questions += [["what colour?", colour, number], ["is it red?", is_red, number]]
        (folder / "questions.json").write_text(json.dumps(questions))
    save_tiny_llm(tmp_path / "llm", num_hidden_layers=16)
    monkeypatch.setenv("VORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    settings = "max_minutes=null training.max_steps=4 training.warmup_steps=1 training.logging_steps=1"
    return {"LLM": "llm", "SETTINGS": f"{settings} teacher.distill_only_steps=2"}


def test_every_cell_runs(small, tmp_path, capsys):
    names = {}
    for cell in NOTEBOOK["cells"]:
        source = "".join(cell["source"])
        if source.startswith("!vora "):
            result = vora(*shlex.split(source.format(**names))[1:])
            assert result.returncode == 0, result.stderr
        elif cell["cell_type"] == "code" and not source.startswith("%pip"):
            exec(compile(source, cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names.update(small)
    result = names["result"]
    assert result["num_test_questions"] == 8 and result["num_steps"] == 4
    assert 0 <= result["accuracy"] <= 1 and result["majority_accuracy"] == 0.5
    assert result["text_only_accuracy"] == max(result["blank_image_accuracy"], result["majority_accuracy"])
    assert set(result["accuracy_by_answer"]) == {"yes / no", "what"}
    assert json.loads((tmp_path / "vora-quickstart" / "evaluation.json").read_text())["num_examples"] == 8
    page = (tmp_path / "vora-quickstart" / "report.html").read_text()
    assert page.count('class="card"') == 4 and page.count("data:image/png") == 6 and "text-only baseline" in page
    assert all((tmp_path / name).exists() for name in ("adapter/adapter_model.safetensors", "merged-llm/config.json"))
    assert isinstance(names["answer"], str) and "8 questions" in capsys.readouterr().out
