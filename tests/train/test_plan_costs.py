"""FLOPs and memory agree with what PyTorch counts and saves."""

import pytest
import torch
from planned import NUM_TEXT, SIDE, recipe_of, small_models
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from vora.distill.teacher import Teacher
from vora.model.segmented_sdpa import SEGMENTED_SDPA
from vora.train.plan.flops import Row, sequence_flops, teacher_flops
from vora.train.plan.memory import Saved, optimizer_bytes, step_memory, traced
from vora.train.plan.meta_model import meta_model
from vora.train.stages import build_student, objective_around

NUM_LABELS = 25


def real_objective(recipe):
    """What `build_objective` makes, with an eager teacher, whose attention the counter sees."""
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
    objective = real_objective(recipe_of(tmp_path, **sections))
    if recomputed:
        objective.gradient_checkpointing_enable(num_blocks=recomputed)
    with FlopCounterMode(display=False) as counter:
        objective(**batch(objective.config, num_labels))["loss"].backward()
    row = Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, num_labels)
    counted = sequence_flops(objective, row, recomputed)
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted["recomputation"] > 0 if recomputed else counted["recomputation"] == 0


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
    objective = real_objective(recipe)
    objective.vora.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        objective(**batch(objective.config))["loss"].backward()
    counted = sequence_flops(objective, Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, NUM_LABELS))
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted["lora"] == counted["teacher"] == counted["heads"] == 0
    planned = meta_model(recipe)[0]
    assert sequence_flops(planned, Row(9, 1, 4, 2)) == sequence_flops(objective, Row(9, 1, 4, 2))


def test_flops_of_merged_patches(tmp_path):
    small_models(tmp_path)
    model = {"llm": str(tmp_path / "llm"), "attn_implementation": "eager", "patch_merge": 2}
    objective = real_objective(recipe_of(tmp_path, model=model))
    inputs = batch(objective.config)
    image = [objective.config.image_token_id] * (SIDE // 2) ** 2
    inputs["input_ids"] = torch.tensor([image + [7] * 10 + image + [8] * (NUM_TEXT - 10)])
    inputs["targets"] = inputs["targets"][:, -inputs["input_ids"].shape[1] :]
    with FlopCounterMode(display=False) as counter:
        objective(**inputs)["loss"].backward()
    counted = sequence_flops(objective, Row(len(image) * 2 + NUM_TEXT, 2, len(image), NUM_LABELS))
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("recomputed", [0, 1, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_those_that_autograd_saves(tmp_path, recomputed, bf16, in_parts, monkeypatch):
    small_models(tmp_path)
    if in_parts:
        monkeypatch.setattr("vora.model.label_loss.MOST_LOGITS", 10 * 400)
    recipe = recipe_of(tmp_path)
    recipe.model.attn_implementation = "sdpa"
    objective, row = real_objective(recipe), Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, NUM_LABELS)
    if recomputed:
        objective.gradient_checkpointing_enable(num_blocks=recomputed)
    with Saved(objective) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = objective(**batch(objective.config))
    planned = meta_model(recipe)[0]
    found = traced(planned, row, 1, bf16, recomputed)
    at_once = (9 if in_parts else NUM_LABELS) * 400  # logits; three parts of 9, 9 and 7 labels
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
    assert losses["loss"] > 0
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
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
def test_segments_attend_and_save_by_themselves(tmp_path, bf16):
    small_models(tmp_path)
    recipe = recipe_of(tmp_path)
    recipe.model.attn_implementation = "sdpa"
    objective = real_objective(recipe)
    objective.vora.set_attn_implementation(SEGMENTED_SDPA)
    row = Row(2 * SIDE**2 + NUM_TEXT, 2, SIDE**2, 2 * (NUM_LABELS // 2), num_segments=2)
    in_place = {torch.ops.aten.baddbmm_: lambda scores, q, k, **_: 2 * q[0] * q[1] * q[2] * k[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        with Saved(objective) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = objective(**two_segments(objective.config))
        losses["loss"].backward()
    if bf16:  # sdpa of fp32 on processors is not in PyTorch's counter
        assert sequence_flops(objective, row)["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    found = traced(meta_model(recipe)[0], row, 1, bf16, 0)
    logits_gradient = row.num_labels * 400 * (4 + (2 if bf16 else 4))
    assert found.activations + found.loss - logits_gradient == pytest.approx(saved.num_bytes, rel=0.05)


def test_memory_is_shared_out_over_devices(tmp_path):
    small_models(tmp_path)
    objective, row = meta_model(recipe_of(tmp_path))[0], Row(112, 2, 36, 25)
    alone, sharded = step_memory(objective, row, 1), step_memory(objective, row, 1, num_shards=4, num_processes=4)
    assert sharded["optimizer"] == alone["optimizer"] / 4 and sharded["frozen weights"] == alone["frozen weights"] / 4
    assert sharded["gathered blocks"] > 0 == alone["gathered blocks"]
    copied = step_memory(objective, row, 1, num_processes=4)
    assert copied["gradient buckets"] == alone["trained weights"]


def test_memory_at_each_moment_of_a_step(tmp_path):
    small_models(tmp_path)
    objective, row = meta_model(recipe_of(tmp_path))[0], Row(112, 2, 36, 1)
    at_first_block = step_memory(objective, row, 8, num_recomputed=3)
    found = traced(objective, row, 8, False, 3)
    assert at_first_block["activations"] == found.activations + found.one_block and at_first_block["loss"] == 0
    at_loss = [step_memory(objective, Row(112, 2, 36, 70), 16, accumulates=more) for more in (False, True)]
    assert [parts["gradients"] for parts in at_loss] == [0, at_loss[0]["trained weights"]]
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in objective.vora.model.blocks]
    assert step_memory(objective, row, 1, num_shards=2)["gathered blocks"] == 2 * max(blocks)
