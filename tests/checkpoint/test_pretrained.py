"""The model that comes with the package: small enough, without its LLM, and (slow, fetches the LLM) it answers."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from tiny import command_line

from vora.checkpoint import read_info
from vora.checkpoint.pretrained import committed_model

FOLDER = Path(committed_model())


def test_it_is_small_and_over_a_named_llm():
    assert sum(file.stat().st_size for file in FOLDER.parent.rglob("*.safetensors")) < 40e6
    names = {file.name for file in FOLDER.iterdir()}
    assert read_info(FOLDER).kind == "adapter" and "tokenizer.json" not in names
    assert not any(name.endswith(".py") for name in names)
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["text_config"]["_name_or_path"] == "smollm2-135m" and len(config["llm_digest"]) == 16
    with safe_open(FOLDER / "adapter_model.safetensors", "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}
        assert any("patch_embedding" in name for name in file.keys())


def test_its_card_says_what_it_is_and_what_it_scores():
    card = ModelCard((FOLDER / "README.md").read_text())
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(card.data.to_dict()["vora"]["stages"]) == 9
    assert all(f"| {task}" in card.text for task in ("Tiny ImageNet", "Flickr8k", "DAQUAR"))


@pytest.mark.slow
def test_it_answers_where_no_model_is_named(tmp_path):
    """`vora chat IMAGE` without a model named; needs the LLM, from the cache or from the Python package index."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    ran = command_line("chat", tmp_path / "red.png", "-q", "What is this?", "--max-new-tokens", 8)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
