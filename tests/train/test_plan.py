"""What a run will need follows from its recipe; FLOPs and memory agree with what PyTorch counts and saves."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from runs import write_lines
from tiny_teachers import TEACHERS, tiny_vit
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, ViTConfig, ViTModel

from vora.distill.teacher import Teacher
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.segmented_sdpa import SEGMENTED_SDPA
from vora.train.plan.device import GPUS, Device, known_gpu
from vora.train.plan.flops import Row, layer_sizes, sequence_flops, teacher_flops
from vora.train.plan.memory import Saved, Traced, optimizer_bytes, step_memory, traced
from vora.train.plan.meta_model import SHAPES, config_of, meta_model
from vora.train.plan.plan import plan, tokens_of_budget
from vora.train.recipe import Recipe, load_recipe
from vora.train.stages import build_student, objective_around

SIDE = 6  # patches of an image's side
NUM_TEXT = 40


def save_models(folder: Path, family: str = "llama", **changes: object) -> Path:
    """An LLM and a ViT as folders."""
    shape = tiny.SHAPE | {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 400} | tiny.FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape | changes)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(folder / "llm")
    tiny.tiny_tokenizer().save_pretrained(folder / "llm")
    vit = ViTConfig(hidden_size=48, intermediate_size=96, num_attention_heads=3, num_hidden_layers=2, image_size=48,
                    patch_size=8)  # fmt: skip
    ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "vit")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their folder, of a Llama."""
    return save_models(tmp_path_factory.mktemp("models"))


def recipe_of(folder: Path, **sections: object) -> Recipe:
    """Of a run that trains them on data that is not here."""
    values = {
        "model": {"llm": str(folder / "llm"), "attn_implementation": "eager"},
        "teacher": {"name": str(folder / "vit")},
        "lora": {"rank": 8, "num_blocks": 2},
        "data": {"sources": [{"path": "nowhere.jsonl"}], "sequence_length": 2 * SIDE**2 + NUM_TEXT},
        "training": {"max_steps": 10},
    }
    return load_recipe(values | sections)


NUM_LABELS = 24
ROW = Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, NUM_LABELS)


def real_objective(recipe):
    """What `build_objective` makes, with an eager teacher, whose attention the counter sees."""
    teacher = Teacher.from_pretrained(recipe.teacher.name, attn_implementation="eager") if recipe.teacher else None
    student = build_student(recipe, teacher)
    return objective_around(recipe, student, VoraImageProcessor(patch_size=8), teacher).train()


def batch(config, num_labels=NUM_LABELS):
    """A row of two equal samples of an image and text."""
    sample = [config.image_token_id] * (SIDE // config.patch_merge) ** 2 + [8] * (NUM_TEXT // 2)
    ids = torch.tensor([sample * 2])
    targets = torch.full_like(ids, -100)
    if num_labels:
        targets.view(2, -1)[:, -num_labels // 2 - 1 : -1] = 9
    return {
        "input_ids": ids,
        "targets": targets,
        "pixel_values": torch.randn(2 * SIDE**2, 3 * config.patch_size**2),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * 2),
    }


@pytest.mark.parametrize(
    ("family", "patch_merge", "recomputed", "num_labels"),
    [("llama", 1, 0, NUM_LABELS), ("llama", 1, 3, NUM_LABELS), ("llama", 1, 2, 0), ("llama", 2, 2, NUM_LABELS),
     ("gemma3_text", 1, 0, NUM_LABELS), ("gpt2", 1, 1, NUM_LABELS), ("phi3", 1, 0, NUM_LABELS)],
)  # fmt: skip
def test_flops_are_those_that_pytorch_counts(tmp_path, family, patch_merge, recomputed, num_labels):
    folder = save_models(tmp_path, family, **({"sliding_window": 256} if family == "gemma3_text" else {}))
    recipe = recipe_of(folder, **({"teacher": None} if family == "gpt2" else {}))
    recipe.model.patch_merge = patch_merge
    objective = real_objective(recipe)
    if recomputed:
        objective.gradient_checkpointing_enable(num_blocks=recomputed)
    inputs = batch(objective.config, num_labels)
    with FlopCounterMode(display=False) as counter:
        objective(**inputs)["loss"].backward()
    row = Row(inputs["input_ids"].numel(), 2, (SIDE // patch_merge) ** 2, num_labels)
    counted = sequence_flops(objective, row, recomputed)
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (counted["recomputation"] > 0) == (recomputed > 0)


@pytest.mark.parametrize("kind", TEACHERS)
def test_flops_of_a_teacher(kind):
    teacher = Teacher(tiny_vit(kind, **({"use_swiglu_ffn": True} if kind == "dinov2" else {})))
    side = 6 * teacher.patch_size
    with FlopCounterMode(display=False) as counter:
        teacher([torch.rand(3, side, side)], [(6, 6)], [0, 3])
    assert teacher_flops(teacher, 36) == pytest.approx(counter.get_total_flops(), rel=0.015)


def test_flops_of_stage_2(models, tmp_path):
    first = recipe_of(models)
    build_student(first, Teacher.from_pretrained(first.teacher.name)).save_pretrained(tmp_path / "run" / "final")
    (tmp_path / "run" / "recipe.yaml").write_text("model: {}")
    model = {"vora": str(tmp_path / "run"), "attn_implementation": "eager"}
    recipe = recipe_of(models, stage="finetune", model=model, teacher=None)
    objective = real_objective(recipe)
    with FlopCounterMode(display=False) as counter:
        objective(**batch(objective.config))["loss"].backward()
    counted = sequence_flops(objective, ROW)
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted["lora"] == counted["teacher"] == counted["heads"] == 0
    planned, remarks = meta_model(recipe)
    assert sequence_flops(planned, ROW) == counted and not remarks


@pytest.mark.parametrize(
    ("recomputed", "bf16", "in_parts", "segments"),
    [(0, False, False, 1), (0, True, True, 1), (1, True, False, 1), (1, False, True, 1), (3, False, False, 1),
     (3, True, True, 1), (0, False, False, 2), (0, True, False, 2)],
)  # fmt: skip
def test_activations_are_those_that_autograd_saves(models, recomputed, bf16, in_parts, segments, monkeypatch):
    if in_parts:
        monkeypatch.setattr("vora.distill.label_loss.MOST_LOGITS", 10 * 400)
    recipe = recipe_of(models)
    recipe.model.attn_implementation = "sdpa"
    objective = real_objective(recipe)
    inputs, row = batch(objective.config), replace(ROW, num_segments=segments)
    if segments == 2:  # two samples, neither of which sees the other
        objective.vora.set_attn_implementation(SEGMENTED_SDPA)
        half = SIDE**2 + NUM_TEXT // 2
        inputs["position_ids"] = torch.arange(half).repeat(2)[None]
        inputs["seen_until"] = torch.tensor([[half - 1] * half + [2 * half - 1] * half])
    if recomputed:
        objective.gradient_checkpointing_enable(num_blocks=recomputed)
    in_place = {torch.ops.aten.baddbmm_: lambda scores, q, k, **_: 2 * q[0] * q[1] * q[2] * k[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        with Saved(objective) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = objective(**inputs)
        losses["loss"].backward()
    if segments == 2 and bf16:  # sdpa of fp32 on processors is not in PyTorch's counter
        assert sequence_flops(objective, row)["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    found = traced(meta_model(recipe)[0], row, 1, bf16, recomputed)
    at_once = (8 if in_parts else NUM_LABELS) * 400  # logits; three parts of 8 labels
    later = at_once * (4 + (2 if bf16 else 4))  # their gradients
    if in_parts:  # are made again later, with the head's weights in bf16
        later += at_once * 4 + (400 * 64 * 2 if bf16 else 0)
    if recomputed:  # so are the heads, one at a time
        heads = objective.distillation
        states = torch.randn(2 * SIDE**2, 64, requires_grad=True), torch.randn(2 * SIDE**2, 48)
        with Saved(heads) as one, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            heads.loss_of_pair(heads.pairs[0], *states)
        later += one.num_bytes
    assert found.activations + found.loss - later == pytest.approx(saved.num_bytes, rel=0.05)
    if recomputed == 3:
        assert found.recomputing == found.activations + found.one_block


def test_an_optimizer_keeps_what_its_name_says():
    layer = torch.nn.Linear(3, 5)
    layer.bias.requires_grad_(False)
    bytes_each = {"adamw_torch_fused": 8, "adafactor": 0, "paged_adamw_8bit": 2, "adamw_torch_4bit": 1, "sgd": 0}
    assert {name: optimizer_bytes(layer, name) / 15 for name in bytes_each} == bytes_each
    layer.bfloat16()
    bytes_each = {"adamw_torch": 4, "lion_32bit": 4, "grokadamw": 4}
    assert {name: optimizer_bytes(layer, name) / 15 for name in bytes_each} == bytes_each


def test_memory_of_several_devices_and_at_each_moment_of_a_step(models, monkeypatch):
    objective, large = meta_model(recipe_of(models))[0], 10**9
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)

    def parts(*found, **options):
        monkeypatch.setattr("vora.train.plan.memory.traced", lambda *arguments: Traced(*found))
        return step_memory(objective, ROW, 1, **options)

    alone, sharded = parts(0, 0, 7, 0), parts(0, 0, 7, 0, num_shards=4, num_processes=4)
    assert (alone["gradients"], alone["activations"], alone["loss"]) == (4 * trained, 7, 0)  # at the update
    assert alone["optimizer"] == 8 * trained and alone["trained weights"] == 4 * trained
    assert alone["total"] == sum(size for part, size in alone.items() if part != "total")
    assert sharded["optimizer"] == alone["optimizer"] / 4 and sharded["frozen weights"] == alone["frozen weights"] / 4
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in objective.vora.model.blocks]
    outside = sum(p.numel() * 4 for p in objective.parameters()) - sum(blocks)
    assert sharded["gathered blocks"] == 2 * max(blocks) + outside and alone["gathered blocks"] == 0
    assert parts(0, 0, 7, 0, num_processes=4)["gradient buckets"] == 4 * trained
    at_first_block = parts(9, large, 7, 3)
    assert (at_first_block["gradients"], at_first_block["activations"], at_first_block["loss"]) == (0, large, 0)
    at_loss = [parts(large, 9, 7, large, accumulates=more) for more in (False, True)]
    assert [(one["gradients"], one["loss"]) for one in at_loss] == [(0, large), (4 * trained, large)]


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
    assert found["memory_bytes"]["total"] == pytest.approx(66e9, rel=0.01)  # as in docs/plan.md
    json.dumps(found)


def test_tokens_are_counted_in_data_that_is_here(models, tmp_path, untraced):
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    images = write_lines(tmp_path / "train.jsonl", [{"image": "a.png", "question": "what?", "answer": "red"}] * 8)
    data = {"sources": [{"path": images}], "sequence_length": 128}
    found = plan(recipe_of(models, data=data), L4)["tokens"]
    assert found["counted_in"] == "data" and found["tokens_per_image"] == 36
    assert found["num_images"] == pytest.approx(found["samples_per_row"])
    texts = write_lines(tmp_path / "text.jsonl", [{"text": "red " * n} for n in range(1, 9)])
    data["sources"] = [{"path": str(tmp_path / "tr*.jsonl"), "weight": 3}, {"path": texts, "weight": 1}]
    mixed = plan(recipe_of(models, data=data), L4)["tokens"]  # a pattern, and weights
    assert mixed["counted_in"] == "data" and mixed["tokens_per_image"] == 36
    assert mixed["num_images"] == pytest.approx(0.75 * mixed["samples_per_row"], rel=0.02)


def test_a_gpu_is_known_by_its_own_name():
    names = {"GeForce RTX 3090": "rtx3090", "RTX A6000": None, "L40": None, "L4": "l4", "H100 80GB HBM3": "h100"}
    for name, wanted in names.items():
        assert known_gpu(f"NVIDIA {name}") == GPUS.get(wanted), name


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


def test_what_cannot_be_planned_is_named(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "llm").mkdir()
    with pytest.raises(ValueError, match="holds no config.json"):
        plan(recipe_of(tmp_path, teacher=None), L4)
    with pytest.raises(ValueError, match="max_steps is missing"):
        plan(recipe_of(models, training={}), L4)
    with pytest.raises(ValueError, match="does not exist"):
        plan(recipe_of(models, stage="finetune", model={"vora": "none"}, teacher=None), L4)


def test_epochs_are_planned_of_data_that_is_here(models, tmp_path, untraced):
    texts = write_lines(tmp_path / "text.jsonl", [{"text": "red " * n} for n in range(1, 9)])
    data = {"sources": [{"path": texts}], "sequence_length": 64}
    for training, most in (({"num_train_epochs": 30}, math.inf), ({"num_train_epochs": 30, "max_steps": 3}, 3)):
        found = plan(recipe_of(models, data=data, training=training), L4)
        assert found["steps"] == min(most, math.ceil(30 * 8 / found["samples_per_step"])) > 2
    with pytest.raises(ValueError, match="The data is not here, so 30 epochs.*give max_steps"):
        plan(recipe_of(models, training={"num_train_epochs": 30}), L4)
    assert plan(recipe_of(models, training={"num_train_epochs": 30, "max_steps": 4}), L4)["steps"] == 4


def test_odd_settings_are_planned_as_they_would_run(models, untraced):
    found = plan(recipe_of(models), L4)
    assert found["tokens"]["counted_in"] == "budget" and "the data is not here" in " ".join(found["remarks"])
    assert "of 186 tokens does not fit a sequence of 112" in " ".join(found["remarks"])
    alone = recipe_of(models, teacher={"name": str(models / "vit"), "distill_only_steps": 1000})
    assert 0 < plan(alone, L4)["hours"] <= found["hours"]
    sizes = []
    for steps in (5, 0.5, 10):
        training = {"max_steps": 10, "save_total_limit": None, "save_steps": steps}
        sizes.append(plan(recipe_of(models, training=training), L4)["disk_bytes"]["checkpoints"])
    assert sizes[0] == sizes[1] == 2 * sizes[2]


def test_figures_of_a_plan_follow_from_each_other(models, untraced, monkeypatch):
    monkeypatch.setattr("vora.train.plan.plan.IMAGES_PER_SECOND", 1e12)
    training = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    data = {"sources": [{"path": "nowhere.jsonl"}], "sequence_length": 600}
    found = plan(recipe_of(models, training=training, data=data), L4, 4)
    trained, times = found["parameters"]["trained"], found["seconds_per_step"]
    assert found["rows_per_step"] == 24 and found["tokens"]["samples_per_row"] > 3
    assert found["samples_per_step"] == 24 * found["tokens"]["samples_per_row"]
    work = found["flops_per_sample"]["total"] * found["samples_per_step"]
    assert times["compute"] == pytest.approx(work / (4 * 121e12 * 0.4))
    assert times["communication"] == pytest.approx(2 * 3 / 4 * 4 * trained / 25e9)
    assert found["samples_per_second"] == pytest.approx(found["samples_per_step"] / max(times.values()))
    assert found["disk_bytes"]["checkpoints"] == 12 * trained
    sharded = plan(recipe_of(models, training=training | {"fsdp": "full_shard"}, data=data), L4, 4)
    assert sharded["memory_bytes"]["optimizer"] == found["memory_bytes"]["optimizer"] / 4
    alone, teacher = plan(recipe_of(models, data=data), L4), {"name": str(models / "vit")}
    first = plan(recipe_of(models, data=data, teacher=teacher | {"distill_only_steps": 5}), L4)
    assert alone["hours"] / 2 < first["hours"] < alone["hours"]


def test_a_processor_whose_products_are_fast_is_assumed_to_reach_less_of_them():
    threads = torch.get_num_threads()
    given = [Device("cpu", 9e11 * threads, 1e9), Device("cpu", 2e11 * threads, 1e9), Device("H200", 1e15, 1e9)]
    assert [device.utilization for device in given] == [0.2, 0.4, 0.4]
