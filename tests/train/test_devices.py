"""What a run must not ask of its devices is said before any work."""

from types import SimpleNamespace

import pytest
from transformers import TrainingArguments
from vora.train.devices import check_fsdp

from vora.train.recipe import load_recipe
from vora.train.run import train

GOOD = {"model": {"llm": "none"}, "data": {"sources": [{"path": "none.jsonl"}]}, "training": {"max_steps": 1}}


def test_one_process_that_sees_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="sees 2 GPUs.*nproc_per_node 2"):
        train(load_recipe(dict(GOOD)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"text_kl_weight": 1.0}}, "lora.text_kl_weight runs the LLM once more"),
        ({"sample_generations": [{"image": "a.png", "question": "what?"}]}, "watch answers in one process"),
    ],
)
def test_what_spread_weights_cannot_do_is_refused(sections, message, tmp_path, monkeypatch):
    recipe = load_recipe({**GOOD, **sections})
    check_fsdp(recipe, are_spread=False)
    arguments = SimpleNamespace(n_gpu=1, fsdp=["full_shard"])
    monkeypatch.setattr("vora.train.run.training_arguments", lambda recipe, directory: arguments)
    with pytest.raises(ValueError, match=f"{message}.*Train with DDP"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_spread_weights_are_not_read_back():
    recipe = load_recipe(dict(GOOD))
    check_fsdp(recipe, are_spread=True)
    check_fsdp(recipe, are_spread=False, resumes=True)
    with pytest.raises(ValueError, match="--resume reads whole weights back"):
        check_fsdp(recipe, are_spread=True, resumes=True)
