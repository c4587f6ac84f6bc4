"""Fixtures shared by the tests: tiny LLMs in memory, and one as a folder."""

import json

import pytest
import tiny
import torch
from hypothesis import settings
from PIL import Image

import vora

torch.set_num_threads(1)
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)  # the same examples in each run
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, saved as on the hub."""
    return tiny.save_tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A tiny ViT of two blocks, saved as on the hub."""
    return tiny.save_tiny_vit(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def processor(llm_folder):
    return vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, llm_folder, processor):
    """A tiny VoRA model with its processor, saved."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vora.VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=12).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def sources(tmp_path):
    """Paths of a source of twelve images with a question each, and of one of twelve texts."""
    with (tmp_path / "images.jsonl").open("w") as images, (tmp_path / "texts.jsonl").open("w") as texts:
        for number in range(12):
            Image.new("RGB", (12, 12), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
            print(json.dumps({"image": f"{number}.png", "question": "what?", "answer": "red"}), file=images)
            print(json.dumps({"text": "blue red green " * (1 + 9 * (number % 3))}), file=texts)
    return [images.name, texts.name]
