"""What a run will need follows from its recipe, and every recipe of the repository can be planned."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from planned import recipe_of, small_models
from runs import write_lines
from transformers import AutoModel, AutoModelForCausalLM

from vora.train.plan.device import GPUS, known_gpu
from vora.train.plan.flops import layer_sizes
from vora.train.plan.memory import Traced
from vora.train.plan.meta_model import SHAPES, config_of, meta_model
from vora.train.plan.plan import plan, tokens_of_budget
from vora.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [*sorted(ROOT.glob("recipes/*/pretrain.yaml")), ROOT / "recipes/vora-7b/finetune.yaml"]  # as the paper's
L4 = GPUS["l4"]


@pytest.fixture
def untraced(monkeypatch):
    """Plans in which activations take nothing, and are soon made."""
    monkeypatch.setattr("vora.train.plan.memory.traced", lambda *arguments: Traced(0, 0, 0, 0))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_stands_on_the_meta_device(path):
    recipe = load_recipe(path)
    objective, remarks = meta_model(recipe, path.parent)
    assert {p.device.type for p in objective.parameters()} == {"meta"}
    assert tokens_of_budget(recipe, objective.config, 150, 100, [])["per_sample"] <= recipe.data.sequence_length
    assert bool(remarks) == (recipe.stage == "finetune")
    if recipe.stage == "pretrain":
        num_blocks = recipe.lora.num_blocks
        assert num_blocks == objective.teacher.num_blocks == len(objective.distillation.pairs)
        sizes = [layer_sizes(block) for block in objective.vora.model.blocks]
        assert [lora > 0 for _, _, lora in sizes] == [i < num_blocks for i in range(len(sizes))]
        assert sizes[0][2] / sizes[0][0] == pytest.approx(0.396, abs=0.002)  # the paper's 1024 in a 7B model


def test_the_papers_model_has_its_parameters_and_its_cost():
    path = ROOT / "recipes" / "vora-7b" / "pretrain.yaml"
    found = plan(load_recipe(path), GPUS["h100"], 32, beside=path.parent)
    assert found["parameters"]["parts"]["vision LoRA"] == 2_214_592_512
    assert found["parameters"]["blocks_with_lora"] == 24
    assert found["fits"] and found["bottleneck"] == "compute"
    # 6 FLOPs for a trained parameter and token, 4 for a frozen one, 2 more for recomputing; attention comes on top
    per_token = 4 * 7.1e9 + 6 * 2.21e9 + 2 * (7.1e9 + 2.21e9)
    assert found["flops_per_sample"]["total"] == pytest.approx(1.1 * per_token * 1174, rel=0.1)
    assert found["hours"] == pytest.approx(found["steps"] * found["seconds_per_step"]["compute"] / 3600)
    assert found["memory_bytes"]["total"] > L4.memory_bytes
    json.dumps(found)


def test_tokens_are_counted_in_data_that_is_here(tmp_path, untraced):
    small_models(tmp_path)
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    images = write_lines(tmp_path / "train.jsonl", [{"image": "a.png", "question": "what?", "answer": "red"}] * 8)
    data = {"sources": [{"path": images}], "sequence_length": 128}
    found = plan(recipe_of(tmp_path, data=data), L4)["tokens"]
    assert found["counted_in"] == "data" and found["tokens_per_image"] == 36
    assert found["num_images"] == pytest.approx(found["samples_per_row"])
    texts = write_lines(tmp_path / "text.jsonl", [{"text": "red " * n} for n in range(1, 9)])
    data["sources"] = [{"path": str(tmp_path / "tr*.jsonl"), "weight": 3}, {"path": texts, "weight": 1}]
    mixed = plan(recipe_of(tmp_path, data=data), L4)["tokens"]  # a pattern, and weights
    assert mixed["counted_in"] == "data" and mixed["tokens_per_image"] == 36
    assert mixed["num_images"] == pytest.approx(0.75 * mixed["samples_per_row"], rel=0.02)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("NVIDIA GeForce RTX 3090", "rtx3090"), ("NVIDIA RTX A6000", None), ("NVIDIA L40", None), ("NVIDIA L4", "l4"),
     ("NVIDIA H100 80GB HBM3", "h100")],
)  # fmt: skip
def test_a_gpu_is_known_by_its_own_name(name, wanted):
    assert known_gpu(name) == GPUS.get(wanted)


def test_a_run_that_goes_on_from_another_is_planned_with_its_shape(tmp_path):
    small_models(tmp_path)
    recipe = recipe_of(tmp_path)
    meta_model(recipe)[0].config.save_pretrained(tmp_path / "run" / "final")
    (tmp_path / "run" / "recipe.yaml").write_text("model: {}")
    recipe.model.llm, recipe.model.vora = None, str(tmp_path / "run")
    objective, remarks = meta_model(recipe)
    assert not remarks and objective.config.get_text_config().hidden_size == 64


def test_shapes_have_the_published_sizes():
    sizes = {}
    for config in sorted(Path(str(SHAPES)).glob("*/*/config.json")):
        name = f"{config.parent.parent.name}/{config.parent.name}"
        with torch.device("meta"):
            shape = config_of(name)
            kind = AutoModelForCausalLM if hasattr(shape, "vocab_size") else AutoModel
            model = kind.from_config(shape)
        sizes[name] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert sizes == {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5, "HuggingFaceTB/SmolLM2-360M-Instruct": 361.8,
        "Qwen/Qwen2.5-7B-Instruct": 7615.6, "Qwen/Qwen3-1.7B": 1720.6, "meta-llama/Llama-3.2-1B-Instruct": 1235.8,
        "apple/aimv2-huge-patch14-448": 682.0, "apple/aimv2-large-patch14-448": 310.0,
        "facebook/dinov2-base": 86.6, "facebook/dinov2-small": 22.1,
    }  # fmt: skip


def test_what_cannot_be_planned_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "llm").mkdir()
    with pytest.raises(ValueError, match="holds no config.json"):
        plan(recipe_of(tmp_path, teacher=None), L4)
    with pytest.raises(ValueError, match="max_steps is missing"):
        small_models(tmp_path)
        plan(recipe_of(tmp_path, training={}), L4)
    with pytest.raises(ValueError, match="does not exist"):
        plan(recipe_of(tmp_path, stage="finetune", model={"vora": "none"}, teacher=None), L4)


def test_odd_settings_are_planned_as_they_would_run(tmp_path, untraced):
    small_models(tmp_path)
    found = plan(recipe_of(tmp_path), L4)
    assert found["tokens"]["counted_in"] == "budget" and "the data is not here" in " ".join(found["remarks"])
    assert "of 186 tokens does not fit a sequence of 112" in " ".join(found["remarks"])
    alone = recipe_of(tmp_path, teacher={"name": str(tmp_path / "vit"), "distill_only_steps": 1000})
    assert 0 < plan(alone, L4)["hours"] <= found["hours"]
    every = {"max_steps": 10, "save_total_limit": None}
    sizes = [
        plan(recipe_of(tmp_path, training=every | {"save_steps": wanted}), L4)["disk_bytes"]["checkpoints"]
        for wanted in (5, 0.5, 10)
    ]
    assert sizes[0] == sizes[1] == 2 * sizes[2]


def test_figures_of_a_plan_follow_from_each_other(tmp_path, untraced, monkeypatch):
    small_models(tmp_path)
    monkeypatch.setattr("vora.train.plan.plan.IMAGES_PER_SECOND", 1e12)
    training = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    data = {"sources": [{"path": "nowhere.jsonl"}], "sequence_length": 600}
    found = plan(recipe_of(tmp_path, training=training, data=data), L4, 4)
    trained, times = found["parameters"]["trained"], found["seconds_per_step"]
    assert found["rows_per_step"] == 24 and found["tokens"]["samples_per_row"] > 3
    assert found["samples_per_step"] == 24 * found["tokens"]["samples_per_row"]
    work = found["flops_per_sample"]["total"] * found["samples_per_step"]
    assert times["compute"] == pytest.approx(work / (4 * 121e12 * 0.4))
    assert times["communication"] == pytest.approx(2 * 3 / 4 * 4 * trained / 25e9)
    assert found["samples_per_second"] == pytest.approx(found["samples_per_step"] / max(times.values()))
    assert found["disk_bytes"]["checkpoints"] == 12 * trained
    sharded = plan(recipe_of(tmp_path, training=training | {"fsdp": "full_shard"}, data=data), L4, 4)
    assert sharded["memory_bytes"]["optimizer"] == found["memory_bytes"]["optimizer"] / 4
    alone, teacher = plan(recipe_of(tmp_path, data=data), L4), {"name": str(tmp_path / "vit")}
    first = plan(recipe_of(tmp_path, data=data, teacher=teacher | {"distill_only_steps": 5}), L4)
    assert alone["hours"] / 2 < first["hours"] < alone["hours"]
