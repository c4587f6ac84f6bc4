"""FLOPs and memory agree with what PyTorch counts and saves."""

import pytest
import torch
from planned import NUM_TEXT, SIDE, recipe_of, small_models
from tiny_teachers import TEACHERS, tiny_vit
from torch.utils.flop_counter import FlopCounterMode

from vora.distill.teacher import Teacher
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.segmented_sdpa import SEGMENTED_SDPA
from vora.train.plan.flops import Row, sequence_flops, teacher_flops
from vora.train.plan.memory import Saved, Traced, optimizer_bytes, step_memory, traced
from vora.train.plan.meta_model import meta_model
from vora.train.stages import build_student, objective_around

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
    small_models(tmp_path, family, **({"sliding_window": 256} if family == "gemma3_text" else {}))
    recipe = recipe_of(tmp_path, **({"teacher": None} if family == "gpt2" else {}))
    recipe.model.patch_merge = patch_merge
    objective = real_objective(recipe)
    if recomputed:
        objective.gradient_checkpointing_enable(num_blocks=recomputed)
    inputs = batch(objective.config, num_labels)
    with FlopCounterMode(display=False) as counter:
        objective(**inputs)["loss"].backward()
    counted = sequence_flops(
        objective, Row(inputs["input_ids"].numel(), 2, (SIDE // patch_merge) ** 2, num_labels), recomputed
    )
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (counted["recomputation"] > 0) == (recomputed > 0)


@pytest.mark.parametrize("kind", TEACHERS)
def test_flops_of_a_teacher(kind):
    teacher = Teacher(tiny_vit(kind, **({"use_swiglu_ffn": True} if kind == "dinov2" else {})))
    side = 6 * teacher.patch_size
    with FlopCounterMode(display=False) as counter:
        teacher([torch.rand(3, side, side)], [(6, 6)], [0, 3])
    assert teacher_flops(teacher, 36) == pytest.approx(counter.get_total_flops(), rel=0.015)


def test_flops_of_stage_2(tmp_path):
    small_models(tmp_path)
    first = recipe_of(tmp_path)
    build_student(first, Teacher.from_pretrained(first.teacher.name)).save_pretrained(tmp_path / "vora")
    model = {"vora": str(tmp_path / "vora"), "attn_implementation": "eager"}
    recipe = recipe_of(tmp_path, stage="finetune", model=model, teacher=None)
    objective = real_objective(recipe)
    with FlopCounterMode(display=False) as counter:
        objective(**batch(objective.config))["loss"].backward()
    counted = sequence_flops(objective, ROW)
    assert counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert counted["lora"] == counted["teacher"] == counted["heads"] == 0
    assert sequence_flops(meta_model(recipe)[0], ROW) == counted


@pytest.mark.parametrize(
    ("recomputed", "bf16", "in_parts"),
    [(0, False, False), (0, True, True), (1, True, False), (1, False, True), (3, False, False), (3, True, True)],
)
def test_activations_are_those_that_autograd_saves(tmp_path, recomputed, bf16, in_parts, monkeypatch):
    small_models(tmp_path)
    if in_parts:
        monkeypatch.setattr("vora.model.label_loss.MOST_LOGITS", 10 * 400)
    recipe = recipe_of(tmp_path)
    recipe.model.attn_implementation = "sdpa"
    objective = real_objective(recipe)
    if recomputed:
        objective.gradient_checkpointing_enable(num_blocks=recomputed)
    with Saved(objective) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = objective(**batch(objective.config))
    found = traced(meta_model(recipe)[0], ROW, 1, bf16, recomputed)
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
    assert losses["loss"] > 0
    if recomputed == 3:
        assert found.recomputing == found.activations + found.one_block


@pytest.mark.parametrize(
    ("optim", "dtype", "bytes_each"),
    [("adamw_torch_fused", torch.float32, 8), ("adamw_torch", torch.bfloat16, 4), ("adafactor", torch.float32, 0),
     ("paged_adamw_8bit", torch.float32, 2), ("adamw_torch_4bit", torch.float32, 1), ("sgd", torch.float32, 0),
     ("lion_32bit", torch.bfloat16, 4), ("grokadamw", torch.float32, 8)],
)  # fmt: skip
def test_an_optimizer_keeps_what_its_name_says(optim, dtype, bytes_each):
    layer = torch.nn.Linear(3, 5, dtype=dtype)
    layer.bias.requires_grad_(False)
    assert optimizer_bytes(layer, optim) == bytes_each * 15


@pytest.mark.parametrize("bf16", [False, True])
def test_segments_attend_and_save_by_themselves(tmp_path, bf16):
    small_models(tmp_path)
    recipe = recipe_of(tmp_path)
    recipe.model.attn_implementation = "sdpa"
    objective = real_objective(recipe)
    objective.vora.set_attn_implementation(SEGMENTED_SDPA)
    half = SIDE**2 + NUM_TEXT // 2  # two samples, neither of which sees the other
    inputs = batch(objective.config)
    inputs["position_ids"] = torch.arange(half).repeat(2)[None]
    inputs["seen_until"] = torch.tensor([[half - 1] * half + [2 * half - 1] * half])
    row = Row(2 * half, 2, SIDE**2, NUM_LABELS, num_segments=2)
    in_place = {torch.ops.aten.baddbmm_: lambda scores, q, k, **_: 2 * q[0] * q[1] * q[2] * k[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        with Saved(objective) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = objective(**inputs)
        losses["loss"].backward()
    if bf16:  # sdpa of fp32 on processors is not in PyTorch's counter
        assert sequence_flops(objective, row)["total"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    found = traced(meta_model(recipe)[0], row, 1, bf16, 0)
    logits_gradient = row.num_labels * 400 * (4 + (2 if bf16 else 4))
    assert found.activations + found.loss - logits_gradient == pytest.approx(saved.num_bytes, rel=0.05)


def test_memory_of_several_devices_and_at_each_moment_of_a_step(tmp_path, monkeypatch):
    small_models(tmp_path)
    objective, large = meta_model(recipe_of(tmp_path))[0], 10**9
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
    assert sharded["gathered blocks"] == 2 * max(blocks) and alone["gathered blocks"] == 0
    assert parts(0, 0, 7, 0, num_processes=4)["gradient buckets"] == 4 * trained
    at_first_block = parts(9, large, 7, 3)
    assert (at_first_block["gradients"], at_first_block["activations"], at_first_block["loss"]) == (0, large, 0)
    at_loss = [parts(large, 9, 7, large, accumulates=more) for more in (False, True)]
    assert [(one["gradients"], one["loss"]) for one in at_loss] == [(0, large), (4 * trained, large)]
