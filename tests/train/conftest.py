"""Recipes on tiny models, and the data that they read."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import COLOURS, write_lines

from vora.train.recipe import Recipe, load_recipe, save_recipe

gc.freeze()  # the Trainer collects garbage after each run: not among all that was imported


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSON Lines file of plain coloured images: the answer is only in the image."""
    folder = tmp_path_factory.mktemp("data")
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
    lines = [{"image": f"{c}.png", "questions": ["what colour?", "which?"], "answers": [c, c]} for c in COLOURS]
    return write_lines(folder / "train.jsonl", lines)


@pytest.fixture(scope="session")
def recipe(llm_folder: str, data_file: str, teacher_folder: str) -> Callable[..., Recipe]:
    """Of a run of six steps, the first two of which only distill; takes fields of `training`."""
    return lambda **training: load_recipe(
        {
            "model": {"llm": llm_folder},
            "teacher": {"name": teacher_folder, "distill_only_steps": 2},
            "lora": {"rank": 8},
            "data": {"sources": [{"path": data_file}], "sequence_length": 128},
            "training": {
                "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "logging_steps": 1,
                "use_cpu": True, "warmup_steps": 1, **training,
            },
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., Recipe]) -> Path:
    """A recipe's file: two sources, two workers, drawn budgets, steps that only distill, a checkpoint every third."""
    folder, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8)).save(folder / f"{number}.png")
    images = [{"image": f"{n}.png", "question": "what?", "answer": f"it is {n}"} for n in range(40)]
    texts = [{"question": f"say {n}", "answer": f"{n}"} for n in range(50)]
    sources = [
        {"path": write_lines(folder / "images.jsonl", images), "weight": 2},
        {"path": write_lines(folder / "texts.jsonl", texts), "weight": 1},
    ]
    steps = {"max_steps": 30, "gradient_accumulation_steps": 2, "save_steps": 3, "learning_rate": 1e-3}
    values = recipe(dataloader_num_workers=2, **steps).model_dump()
    values["teacher"]["distill_only_steps"] = 8
    values["data"] |= {"sources": sources, "image_tokens": [2, 9]}
    save_recipe(load_recipe(values), folder / "recipe.yaml")
    return folder / "recipe.yaml"
