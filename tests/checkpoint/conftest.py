"""Runs of both stages and all that is made of them, for the tests of folders and of cards."""

import shutil

import pytest
from messages import write_questions
from rich.console import Console
from tiny import save_tiny_vit

from vora.checkpoint.save import merge
from vora.train.recipe import load_recipe
from vora.train.run import train


@pytest.fixture(scope="session")
def work(tmp_path_factory, llm_folder):
    """`one` (stage 1) with `merged`, `llm` and `adapter`; `second`, which goes on from it; `two` (stage 2 of `merged`)
    with `merged-two`."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(llm_folder, work / "tiny-llama")
    (work / "tiny-llama" / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-terms\n---\n# Tiny\n")
    save_tiny_vit(work / "vit")
    (work / "vit" / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    write_questions(work / "second.jsonl")
    sources = [
        {"path": str(write_questions(work / "first.jsonl")), "weight": 2},
        {"path": str(work / "sec*.jsonl"), "weight": 1, "image_folder": str(work)},
    ]
    steps = {"max_steps": 3, "save_steps": 1, "logging_steps": 2, "per_device_train_batch_size": 1, "use_cpu": True}
    first = {
        "model": {"llm": str(work / "tiny-llama"), "dtype": "bfloat16"},
        "teacher": {"name": str(work / "vit"), "summary": True, "standardize": True},
        "lora": {"rank": 2},
        "data": {"sources": sources, "sequence_length": 64, "caption_prompts": ["Write ``` or a/b."]},
        "sample_generations": [{"image": str(work / "red.png"), "question": "what?"}],
        "training": steps,
    }
    second = first | {"model": {"vora": str(work / "one"), "dtype": "bfloat16"}, "training": steps | {"max_steps": 1}}
    two = {
        "stage": "finetune",
        "model": {"vora": str(work / "merged")},
        "data": {"sources": [{"path": str(work / "second.jsonl")}], "sequence_length": 64},
        "training": steps | {"max_steps": 2},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        train(load_recipe(first), work / "one", console=Console(quiet=True))
        merge(work / "one", work / "merged", llm_out=work / "llm", adapter_out=work / "adapter")
        train(load_recipe(second), work / "second", console=Console(quiet=True))
        train(load_recipe(two), work / "two", console=Console(quiet=True))
        merge(work / "two", work / "merged-two")
    return work
