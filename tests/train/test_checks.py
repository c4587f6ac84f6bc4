"""What a run must not ask for is said before any work."""

from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from vora.train.checks import check_fsdp
from vora.train.recipe import load_recipe
from vora.train.run import train

GOOD = {"model": {"llm": "none"}, "data": {"sources": [{"path": "none.jsonl"}]}, "training": {"max_steps": 1}}


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"training": {"use_liger_kernel": True}}, "in parts of bounded size"),
        ({"training": {"label_smoothing_factor": 0.1}}, "losses are those of vora.distill.Objective"),
        ({"training": {"auto_find_batch_size": True}}, "sequences are packed before a batch is tried"),
        ({"training": {"save_only_model": True}}, "from which nothing can resume"),
        ({"training": {"data_seed": 3}}, "order of the data follows training.seed"),
        ({"training": {"neftune_noise_alpha": 5}}, "neftune_noise_alpha is not supported"),
        ({"training": {"eval_strategy": "steps"}}, "no samples to evaluate on: `vora eval` measures a checkpoint"),
        ({"training": {"load_best_model_at_end": True}}, "no samples to evaluate on"),
        ({"teacher": {"name": "vit", "weight": 0, "distill_only_steps": 9}}, "distill_only_steps is 9"),
        ({"stage": "finetune", "teacher": {"name": "vit"}}, "set teacher=null"),
    ],
)
def test_what_would_come_to_nothing_is_refused_of_a_run_and_read_of_an_old_one(sections, wanted, tmp_path):
    recipe = load_recipe({**GOOD, **sections})
    with pytest.raises(ValueError, match=wanted):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_process_that_sees_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="sees 2 GPUs.*nproc_per_node 2"):
        train(load_recipe(dict(GOOD)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"text_kl_weight": 1.0}}, "lora.text_kl_weight runs the LLM once more"),
        (
            {"sample_generations": [{"image": "a.png", "question": "what?"}]},
            "sample_generations are made in one process",
        ),
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
