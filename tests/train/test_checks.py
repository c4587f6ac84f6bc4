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
        ("several GPUs", "sees 2 GPUs.*nproc_per_node 2"),
    ],
)
def test_what_would_come_to_nothing_is_refused_of_a_run_and_read_of_an_old_one(
    sections, wanted, tmp_path, monkeypatch
):
    if sections == "several GPUs":
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
        sections = {}
    recipe = load_recipe({**GOOD, **sections})
    with pytest.raises(ValueError, match=wanted):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "resumes", "message"),
    [
        ({"lora": {"text_kl_weight": 1.0}}, False, "lora.text_kl_weight runs the LLM once more"),
        (
            {"sample_generations": [{"image": "a", "question": "b"}]},
            False,
            "sample_generations are made in one process",
        ),
        ({}, True, "--resume reads whole weights back"),
    ],
)
def test_what_spread_weights_cannot_do_is_refused(sections, resumes, message, tmp_path, monkeypatch):
    recipe, arguments = load_recipe({**GOOD, **sections}), SimpleNamespace(n_gpu=1, fsdp=["full_shard"])
    check_fsdp(recipe, are_spread=False, resumes=resumes)
    check_fsdp(load_recipe(dict(GOOD)), are_spread=True)
    monkeypatch.setattr("vora.train.run.training_arguments", lambda recipe, directory: arguments)
    monkeypatch.setattr("vora.train.run.find_checkpoint", lambda directory, resume: "there" if resume else None)
    with pytest.raises(ValueError, match=f"{message}.*Train with DDP"):
        train(recipe, tmp_path / "run", resume=resumes)
    assert not (tmp_path / "run").exists()
