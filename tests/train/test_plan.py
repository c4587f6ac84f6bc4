"""The plan agrees with what PyTorch counts and saves, and every recipe of the repository can be planned."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, ViTConfig, ViTModel

from vora.distill.teacher import Teacher
from vora.model.segmented_sdpa import SEGMENTED_SDPA
from vora.train.plan.flops import Row, layer_sizes, sequence_flops, teacher_flops
from vora.train.plan.memory import Saved, optimizer_bytes, step_memory, traced
from vora.train.plan.meta_model import SHAPES, config_of, meta_model
from vora.train.plan.plan import GPUS, known_gpu, plan, tokens_of_budget
from vora.train.recipe import load_recipe
from vora.train.stages import objective_around

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted([*ROOT.glob("recipes/*/pretrain.yaml"), *ROOT.glob("recipes/*/finetune.yaml")])  # as the paper's
SIDE = 6  # patches
NUM_TEXT, NUM_LABELS = 40, 25


def small_models(tmp_path, family="llama", **changes):
    """An LLM and a ViT as folders, wide enough that linear layers matter."""
    shape = tiny.SHAPE | {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 400} | tiny.FAMILIES[family]
    shape |= changes
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), attn_implementation="eager")
    llm.save_pretrained(tmp_path / "llm")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "llm")
    vit = ViTConfig(hidden_size=48, intermediate_size=96, num_attention_heads=3, num_hidden_layers=2, image_size=48,
                    patch_size=8)  # fmt: skip
    ViTModel(vit, add_pooling_layer=False).save_pretrained(tmp_path / "vit")


def recipe_of(tmp_path, **sections):
    return load_recipe(
        {
            "model": {"llm": str(tmp_path / "llm"), "attn_implementation": "eager"},
            "teacher": {"name": str(tmp_path / "vit")},
            "lora": {"rank": 8, "num_blocks": 2},
            "data": {"sources": [{"path": "nowhere.jsonl"}], "sequence_length": 2 * SIDE**2 + NUM_TEXT},
            "training": {"max_steps": 10},
            **sections,
        }
    )


def real_learner(recipe):
    """What `build_objective` makes, with an eager teacher, whose attention the counter sees."""
    from vora.train.stages import build_student

    teacher = Teacher.from_pretrained(recipe.teacher.name, attn_implementation="eager") if recipe.teacher else None
    student, processor = build_student(recipe, teacher)
    return objective_around(recipe, student, processor.image_processor, teacher).train()


def batch(config, num_labels=NUM_LABELS):
    image = [config.image_token_id] * SIDE**2
    ids = torch.tensor([image + [7] * 10 + image + [8] * (NUM_TEXT - 10)])
    targets = torch.full_like(ids, -100)
    targets[0, -num_labels - 1 : -1] = 9
    if not num_labels:
        targets.fill_(-100)
    return {
        "input_ids": ids,
        "targets": targets,
        "pixel_values": torch.randn(2 * SIDE**2, 3 * config.patch_size**2),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * 2),
    }


@pytest.mark.parametrize(
    ("family", "sections", "recomputed", "num_labels"),
    [
        ("llama", {}, 0, NUM_LABELS),
        ("llama", {}, 3, NUM_LABELS),
        ("llama", {}, 2, NUM_LABELS),
        ("llama", {}, 2, 0),
        ("llama", {}, 0, 0),
        ("gemma3_text", {}, 0, NUM_LABELS),
        ("gpt2", {"teacher": None}, 1, NUM_LABELS),
        ("phi3", {}, 0, NUM_LABELS),
    ],
)
def test_flops_are_those_that_pytorch_counts(tmp_path, family, sections, recomputed, num_labels):
    small_models(tmp_path, family, **({"sliding_window": 256} if family == "gemma3_text" else {}))
    learner = real_learner(recipe_of(tmp_path, **sections))
    if recomputed:
        learner.gradient_checkpointing_enable(num_blocks=recomputed)
    with FlopCounterMode(display=False) as counter:
        learner(**batch(learner.config, num_labels))["loss"].backward()
    row = Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, num_labels)
    counted = sequence_flops(learner, row, recomputed)
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted["recomputation"] > 0 if recomputed else counted["recomputation"] == 0


VIT = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "patch_size": 8}
TEACHERS = {
    "clip_vision_model": {"intermediate_size": 96, "image_size": 48},
    "siglip_vision_model": {"intermediate_size": 96, "image_size": 48},
    "siglip2_vision_model": {"intermediate_size": 96, "num_patches": 36},
    "dinov2": {"image_size": 48, "use_swiglu_ffn": True},
    "dinov2_with_registers": {"image_size": 48},
    "dinov3_vit": {"intermediate_size": 96, "image_size": 48, "num_register_tokens": 4},
    "aimv2_vision_model": {"intermediate_size": 96, "image_size": 40},
}


@pytest.mark.parametrize("family", TEACHERS)
def test_flops_of_a_teacher(family):
    vit = AutoModel.from_config(AutoConfig.for_model(family, **VIT, **TEACHERS[family]), attn_implementation="eager")
    teacher, grid = Teacher(vit), (SIDE, SIDE)
    images = [torch.rand(3, 8 * SIDE, 8 * SIDE)]
    with FlopCounterMode(display=False) as counter:
        teacher(images, [grid], [0, 1])
    assert teacher_flops(teacher, SIDE**2) == pytest.approx(counter.get_total_flops(), rel=0.015)


def test_flops_of_stage_2(tmp_path):
    small_models(tmp_path)
    from vora import VoraForConditionalGeneration, VoraProcessor

    VoraForConditionalGeneration.from_llm(str(tmp_path / "llm"), teacher=str(tmp_path / "vit")).save_pretrained(
        tmp_path
    )
    VoraProcessor.from_llm(str(tmp_path / "llm"), teacher=str(tmp_path / "vit")).save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, stage="finetune", model={"vora": str(tmp_path)}, teacher=None)
    learner = real_learner(recipe)
    learner.vora.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        learner(**batch(learner.config))["loss"].backward()
    counted = sequence_flops(learner, Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, NUM_LABELS))
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted["lora"] == counted["teacher"] == counted["heads"] == 0
    planned = meta_model(recipe)[0]
    assert sequence_flops(planned, Row(9, 1, 4, 2)) == sequence_flops(learner, Row(9, 1, 4, 2))


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("recomputed", [0, 1, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_those_that_autograd_saves(tmp_path, recomputed, bf16, in_parts, monkeypatch):
    small_models(tmp_path)
    if in_parts:
        monkeypatch.setattr("vora.model.label_loss.MOST_LOGITS", 10 * 400)
    recipe = recipe_of(tmp_path)
    recipe.model.attn_implementation = "sdpa"
    learner, row = real_learner(recipe), Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, NUM_LABELS)
    if recomputed:
        learner.gradient_checkpointing_enable(num_blocks=recomputed)
    with Saved(learner) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = learner(**batch(learner.config))
    planned = meta_model(recipe)[0]
    found = traced(planned, row, 1, bf16, recomputed)
    at_once = (9 if in_parts else NUM_LABELS) * 400  # logits; three parts of 9, 9 and 7 labels
    later = at_once * (4 + (2 if bf16 else 4))  # their gradients
    if in_parts:  # are made again later, with the head's weights in bf16
        later += at_once * 4 + (400 * 64 * 2 if bf16 else 0)
    if recomputed:  # so are the heads, one at a time
        heads = learner.distillation
        states = torch.randn(2 * SIDE**2, 64, requires_grad=True), torch.randn(2 * SIDE**2, 48)
        with Saved(heads) as one, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            heads.loss_of_pair(heads.pairs[0], *states)
        later += one.num_bytes
    assert found.activations + found.loss - later == pytest.approx(saved.num_bytes, rel=0.05)
    assert losses["loss"] > 0
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    parts = step_memory(planned, row, 1, bf16=bf16, num_recomputed=recomputed)
    assert parts["optimizer"] == 8 * trained and parts["trained weights"] == 4 * trained
    assert parts["total"] == pytest.approx(sum(size for part, size in parts.items() if part != "total"))


@pytest.mark.parametrize(
    ("optim", "dtype", "bytes_each"),
    [
        ("adamw_torch_fused", torch.float32, 8),
        ("adamw_torch", torch.bfloat16, 4),
        ("paged_adamw_8bit", torch.float32, 2),
        ("adamw_torch_4bit", torch.float32, 1),
        ("lion_32bit", torch.bfloat16, 4),
        ("adafactor", torch.float32, 0),
        ("sgd", torch.float32, 0),
        ("grokadamw", torch.float32, 8),
    ],
)
def test_an_optimizer_keeps_what_its_name_says(optim, dtype, bytes_each):
    layer = torch.nn.Linear(3, 5, dtype=dtype)
    layer.bias.requires_grad_(False)
    assert optimizer_bytes(layer, optim) == bytes_each * 15


def two_segments(config):
    """A row of two equal samples, neither of which sees the other."""
    half = SIDE**2 + NUM_TEXT // 2
    both = batch(config, 2 * (NUM_LABELS // 2))
    ids = [config.image_token_id] * SIDE**2 + [7] * (NUM_TEXT // 2)
    both["input_ids"] = torch.tensor([ids * 2])
    both["targets"] = torch.full((1, 2 * half), -100)
    for end in (half, 2 * half):
        both["targets"][0, end - 1 - NUM_LABELS // 2 : end - 1] = 9
    both["position_ids"] = torch.arange(half).repeat(2)[None]
    both["seen_until"] = torch.tensor([[half - 1] * half + [2 * half - 1] * half])
    return both


@pytest.mark.parametrize("bf16", [False, True])
def test_stretches_attend_and_save_by_themselves(tmp_path, bf16):
    small_models(tmp_path)
    recipe = recipe_of(tmp_path)
    recipe.model.attn_implementation = "sdpa"
    learner = real_learner(recipe)
    learner.vora.set_attn_implementation(SEGMENTED_SDPA)
    row = Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, 2 * (NUM_LABELS // 2), num_segments=2)
    in_place = {torch.ops.aten.baddbmm_: lambda scores, q, k, **_: 2 * q[0] * q[1] * q[2] * k[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        with Saved(learner) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = learner(**two_segments(learner.config))
        losses["loss"].backward()
    if bf16:  # sdpa of fp32 on processors is not in PyTorch's counter
        assert sequence_flops(learner, row)["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    found = traced(meta_model(recipe)[0], row, 1, bf16, 0)
    logits_gradient = row.num_labels * 400 * (4 + (2 if bf16 else 4))
    assert found.activations + found.loss - logits_gradient == pytest.approx(saved.num_bytes, rel=0.05)


def test_memory_is_shared_out_over_devices(tmp_path):
    small_models(tmp_path)
    learner, row = meta_model(recipe_of(tmp_path))[0], Row(112, 2, 36, 25)
    alone, sharded = step_memory(learner, row, 1), step_memory(learner, row, 1, num_shards=4, num_processes=4)
    assert sharded["optimizer"] == alone["optimizer"] / 4 and sharded["frozen weights"] == alone["frozen weights"] / 4
    assert sharded["gathered blocks"] > 0 == alone["gathered blocks"]
    copied = step_memory(learner, row, 1, num_processes=4)
    assert copied["gradient buckets"] == alone["trained weights"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_stands_on_the_meta_device(path):
    recipe = load_recipe(path)
    learner, remarks = meta_model(recipe, path.parent)
    assert {p.device.type for p in learner.parameters()} == {"meta"}
    assert tokens_of_budget(recipe, learner.config, 150, 100, [])["per_sample"] <= recipe.data.sequence_length
    assert bool(remarks) == (recipe.stage == "finetune")
    if recipe.stage == "pretrain":
        num_blocks = recipe.lora.num_blocks
        assert num_blocks == learner.teacher.num_blocks == len(learner.distillation.pairs)
        sizes = [layer_sizes(block) for block in learner.vora.model.blocks]
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
    assert not plan(load_recipe(path), GPUS["l4"])["fits"]
    json.dumps(found)


def test_tokens_are_counted_in_data_that_is_here(tmp_path):
    from PIL import Image

    small_models(tmp_path)
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    lines = [json.dumps({"image": "a.png", "question": "what?", "answer": "red"})] * 8
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    data = {"sources": [{"path": str(tmp_path / "train.jsonl")}], "sequence_length": 128}
    found = plan(recipe_of(tmp_path, data=data), GPUS["l4"])
    assert found["tokens"]["counted_in"] == "data" and found["tokens"]["tokens_per_image"] == 36
    assert found["tokens"]["num_images"] == pytest.approx(found["tokens"]["samples_per_row"])
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "red " * n}) + "\n" for n in range(1, 9)))
    of_text = {"path": str(tmp_path / "text.jsonl"), "weight": 1}
    data["sources"] = [{"path": str(tmp_path / "tr*.jsonl"), "weight": 3}, of_text]  # a pattern, and weights
    mixed = plan(recipe_of(tmp_path, data=data), GPUS["l4"])["tokens"]
    assert mixed["counted_in"] == "data" and mixed["tokens_per_image"] == 36
    assert mixed["num_images"] == pytest.approx(0.75 * mixed["samples_per_row"], rel=0.02)
    missing = plan(recipe_of(tmp_path), GPUS["l4"])
    assert missing["tokens"]["counted_in"] == "budget" and "not here" in " ".join(missing["remarks"])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("NVIDIA GeForce RTX 3090", "rtx3090"), ("NVIDIA RTX A6000", None), ("NVIDIA L40", None), ("NVIDIA L4", "l4"),
     ("NVIDIA H100 80GB HBM3", "h100")],
)  # fmt: skip
def test_a_gpu_is_known_by_its_own_name(name, wanted):
    found = known_gpu(name)
    assert found is None if wanted is None else found == GPUS[wanted]


def test_a_run_that_goes_on_from_another_is_planned_with_its_shape(tmp_path):
    small_models(tmp_path)
    first = recipe_of(tmp_path)
    made, _ = meta_model(first)
    (tmp_path / "runs" / "final").mkdir(parents=True)
    made.config.save_pretrained(tmp_path / "runs" / "final")
    (tmp_path / "runs" / "recipe.yaml").write_text("model: {}")
    first.model.llm, first.model.vora = None, str(tmp_path / "runs")
    _, remarks = meta_model(first)
    assert not remarks


def test_shapes_have_the_published_sizes():
    sizes = {}
    for config in sorted(Path(str(SHAPES)).glob("*/*/config.json")):
        name = f"{config.parent.parent.name}/{config.parent.name}"
        with torch.device("meta"):
            shape = config_of(name)
            has_words = hasattr(shape, "vocab_size")
            model = AutoModelForCausalLM.from_config(shape) if has_words else tiny_vit(shape)
        sizes[name] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    assert sizes == {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5,
        "HuggingFaceTB/SmolLM2-360M-Instruct": 361.8,
        "Qwen/Qwen2.5-7B-Instruct": 7615.6,
        "Qwen/Qwen3-1.7B": 1720.6,
        "apple/aimv2-huge-patch14-448": 682.0,
        "apple/aimv2-large-patch14-448": 310.0,
        "facebook/dinov2-base": 86.6,
        "facebook/dinov2-small": 22.1,
        "meta-llama/Llama-3.2-1B-Instruct": 1235.8,
    }


def tiny_vit(config):
    return AutoModel.from_config(config)


def test_what_cannot_be_planned_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "llm").mkdir()
    with pytest.raises(ValueError, match="holds no config.json"):
        plan(recipe_of(tmp_path, teacher=None), GPUS["l4"])
    with pytest.raises(ValueError, match="max_steps is missing"):
        small_models(tmp_path)
        plan(recipe_of(tmp_path, training={}), GPUS["l4"])
    with pytest.raises(ValueError, match="does not exist"):
        plan(recipe_of(tmp_path, stage="finetune", model={"vora": "none"}, teacher=None), GPUS["l4"])


def test_odd_settings_are_planned_as_they_would_run(tmp_path):
    small_models(tmp_path)
    recipe, teacher = recipe_of(tmp_path), str(tmp_path / "vit")
    assert "of 186 tokens does not fit a row of 112" in " ".join(plan(recipe, GPUS["l4"])["remarks"])
    alone = recipe_of(tmp_path, teacher={"name": teacher, "distill_only_steps": 1000})
    assert 0 < plan(alone, GPUS["l4"])["hours"] <= plan(recipe, GPUS["l4"])["hours"]
    every = {"max_steps": 10, "save_total_limit": None}
    sizes = [
        plan(recipe_of(tmp_path, training=every | {"save_steps": wanted}), GPUS["l4"])["disk_bytes"]["checkpoints"]
        for wanted in (5, 0.5, 10)
    ]
    assert sizes[0] == sizes[1] == 2 * sizes[2]


def test_flops_of_merged_patches(tmp_path):
    small_models(tmp_path)
    model = {"llm": str(tmp_path / "llm"), "attn_implementation": "eager", "patch_merge": 2}
    learner = real_learner(recipe_of(tmp_path, model=model))
    inputs = batch(learner.config)
    image = [learner.config.image_token_id] * (SIDE // 2) ** 2
    inputs["input_ids"] = torch.tensor([image + [7] * 10 + image + [8] * (NUM_TEXT - 10)])
    inputs["targets"] = inputs["targets"][:, -inputs["input_ids"].shape[1] :]
    with FlopCounterMode(display=False) as counter:
        learner(**inputs)["loss"].backward()
    counted = sequence_flops(learner, Row(len(image) * 2 + NUM_TEXT, 2, len(image), NUM_LABELS))
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_memory_at_each_moment_of_a_step(tmp_path):
    small_models(tmp_path)
    learner, row = meta_model(recipe_of(tmp_path))[0], Row(112, 2, 36, 1)
    at_first_block = step_memory(learner, row, 8, num_recomputed=3)
    found = traced(learner, row, 8, False, 3)
    assert at_first_block["activations"] == found.activations + found.one_block and at_first_block["loss"] == 0
    at_loss = [step_memory(learner, Row(112, 2, 36, 70), 16, accumulates=more) for more in (False, True)]
    assert [parts["gradients"] for parts in at_loss] == [0, at_loss[0]["trained weights"]]
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in learner.vora.model.blocks]
    assert step_memory(learner, row, 1, num_shards=2)["gathered blocks"] == 2 * max(blocks)


def test_figures_of_a_plan_follow_from_each_other(tmp_path, monkeypatch):
    small_models(tmp_path)
    monkeypatch.setattr("vora.train.plan.plan.IMAGES_PER_SECOND", 1e12)
    training = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    data = {"sources": [{"path": "nowhere.jsonl"}], "sequence_length": 600}
    found = plan(recipe_of(tmp_path, training=training, data=data), GPUS["l4"], 4)
    trained, times = found["parameters"]["trained"], found["seconds_per_step"]
    assert found["rows_per_step"] == 24 and found["tokens"]["samples_per_row"] > 3
    assert found["samples_per_step"] == 24 * found["tokens"]["samples_per_row"]
    work = found["flops_per_sample"]["total"] * found["samples_per_step"]
    assert times["compute"] == pytest.approx(work / (4 * 121e12 * 0.4))
    assert times["communication"] == pytest.approx(2 * 3 / 4 * 4 * trained / 25e9)
    assert found["samples_per_second"] == pytest.approx(found["samples_per_step"] / max(times.values()))
    assert found["disk_bytes"]["checkpoints"] == 12 * trained
    sharded = plan(recipe_of(tmp_path, training=training | {"fsdp": "full_shard"}, data=data), GPUS["l4"], 4)
    assert sharded["memory_bytes"]["optimizer"] == found["memory_bytes"]["optimizer"] / 4
    alone, teacher = plan(recipe_of(tmp_path, data=data), GPUS["l4"]), {"name": str(tmp_path / "vit")}
    first = plan(recipe_of(tmp_path, data=data, teacher=teacher | {"distill_only_steps": 5}), GPUS["l4"])
    assert alone["hours"] / 2 < first["hours"] < alone["hours"]
