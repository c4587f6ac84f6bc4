"""What trains in each stage, from which start and how fast."""

import pytest
import tiny
import torch
from peft import get_peft_model_state_dict
from runs import run
from safetensors.torch import load_file
from tiny_teachers import tiny_vit
from transformers import TrainerCallback

from vora import Teacher, attach_vision_lora
from vora.checkpoint.layout import HEADS_FILE
from vora.train.plan.meta_model import meta_model
from vora.train.recipe import load_recipe
from vora.train.run_log import read_log
from vora.train.stages import build_objective, check_trainable, lora_depth, trainable_counts


class Rates(TrainerCallback):
    """Notes the learning rate of each part at each step."""

    def __init__(self):
        self.found = {}

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.found[state.global_step] = {group["part"]: group["lr"] for group in optimizer.param_groups}


@pytest.fixture(scope="module")
def vision(recipe, tmp_path_factory):
    """A run of two steps that only distill, with LoRA in all three blocks of the LLM, of which a teacher has two."""
    first, folder = recipe(max_steps=2, learning_rate=1e-3), tmp_path_factory.mktemp("vision") / "run"
    first.lora.num_blocks = 3
    run(first, folder)
    return folder


def going_on(recipe, vision, **training):
    """A recipe that goes on with a run, without steps that only distill."""
    second = recipe(**training)
    second.model.llm, second.model.vora, second.lora.num_blocks = None, str(vision), 3
    second.teacher.distill_only_steps = 0
    return second


def test_only_the_stage_s_parts_train(recipe):
    wanted = recipe()
    wanted.teacher.pairs = "last"
    objective, _ = build_objective(wanted)
    assert objective.distillation.pairs == [(1, 1)]  # can teach alone
    counts = trainable_counts(objective)
    assert counts["LLM"][0] == 0
    assert all(counts[part][0] == counts[part][1] > 0 for part in ("vision LoRA", "distill heads"))
    assert "teacher" not in " ".join(name for name, _ in objective.named_parameters())
    objective.vora.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="should train none of the LLM"):
        check_trainable(objective, "pretrain")


def test_a_deeper_teacher_is_refused_or_spread(recipe, tmp_path):
    tiny.save_tiny_vit(tmp_path, num_hidden_layers=5)
    deep = recipe()
    deep.teacher.name = str(tmp_path)
    with pytest.raises(ValueError, match="teacher.spread=true"):
        build_objective(deep)
    has_lora = attach_vision_lora(tiny.tiny_vora("llama"), rank=2, num_blocks=2)
    with pytest.raises(ValueError, match="3 blocks, but only 2 of the LLM's 3"):
        lora_depth(recipe(), has_lora, Teacher(tiny_vit("vit", num_hidden_layers=3)))
    deep.teacher.spread = True
    objective, _ = build_objective(deep)
    assert objective.distillation.pairs[-1][1] == 4


@pytest.mark.parametrize(
    ("dtype", "bf16", "wanted"),
    [("float32", False, torch.float32), ("float32", True, torch.bfloat16), ("bfloat16", False, torch.bfloat16),
     ("float16", False, torch.float32)],
)  # fmt: skip
def test_the_teacher_computes_in_bf16_where_the_run_does(recipe, dtype, bf16, wanted):
    changed = recipe(bf16=bf16)
    changed.model.dtype = dtype
    for made in (build_objective(changed)[0], meta_model(changed)[0]):
        assert {parameter.dtype for parameter in made.teacher.parameters()} == {wanted}


def test_each_part_has_its_learning_rate_and_vision_slows_down_after_its_first_steps(recipe, tmp_path):
    wanted = recipe(max_steps=6, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=1)
    wanted.teacher.distill_only_steps, wanted.teacher.vision_lr_scale, wanted.lora.num_blocks = 4, 0.5, 3
    wanted.learning_rates.lora_b, wanted.learning_rates.heads = 4e-3, 2e-3
    rates = Rates()
    run(wanted, tmp_path / "run", callbacks=[rates])
    vision = {("patch_embedding", True): 1e-3, ("heads", True): 2e-3, ("rest", True): 1e-3, ("lora_b", True): 4e-3}
    above = {("rest", False): 1e-3, ("lora_b", False): 4e-3}  # LoRA in the block above the teacher's two
    assert rates.found[0] == pytest.approx(vision | above)
    assert rates.found[3] == pytest.approx({part: rate / 4 for part, rate in (vision | above).items()})
    assert rates.found[5] == pytest.approx({part: rate / 2 for part, rate in vision.items()} | above)


def test_vision_that_was_trained_before_slows_down_from_the_start(recipe, vision, tmp_path):
    options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
    second = going_on(recipe, vision, max_steps=2, learning_rate=1e-3, **options)
    second.teacher.vision_lr_scale = 0.1
    begun, _ = build_objective(second)
    before, after = load_file(vision / "final" / "adapter_model.safetensors"), get_peft_model_state_dict(begun.student)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    heads = load_file(vision / "final" / HEADS_FILE)
    assert torch.equal(begun.distillation.heads["0"][1].weight, heads["heads.0.1.weight"])
    rates = Rates()
    run(second, tmp_path / "language", callbacks=[rates])
    last = rates.found[1]
    assert last[("rest", True)] == last[("heads", True)] == pytest.approx(1e-4)
    assert last[("rest", False)] == last[("lora_b", False)] == pytest.approx(1e-3)


def test_what_a_trained_model_is_cannot_be_asked_otherwise(recipe, vision):
    second = going_on(recipe, vision)
    for section, key, value, message in (
        (second.model, "patch_merge", 2, "patch_merge 2 .it has 1.* would change it"),
        (second.model, "image_attention", "causal", "image_attention causal .it has bidirectional"),
        (second.lora, "rank", 4, "LoRA of rank 8 in 3 blocks, but the recipe asks for rank 4 in 3"),
        (second.lora, "target_modules", ["q_proj"], "leave lora.target_modules out"),
        (second.teacher, "standardize", True, "tensors of the distill heads.*variance.*None there"),
    ):
        before = getattr(section, key)
        setattr(section, key, value)
        with pytest.raises(ValueError, match=message):
            build_objective(second)
        setattr(section, key, before)
    second.model.attn_implementation = "eager"
    second.model.chat_template = "{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    objective, processor = build_objective(second)
    assert objective.config.get_text_config()._attn_implementation == "eager"
    assert processor.apply_chat_template([{"role": "user", "content": "what?"}]) == "user> what?"
    second.stage, second.teacher = "finetune", None
    with pytest.raises(ValueError, match="vora merge"):
        build_objective(second)


def test_frozen_vision_stays_as_it_is_and_asks_no_teacher(recipe, vision, tmp_path):
    second = going_on(recipe, vision, max_steps=3, save_steps=2)
    second.teacher.vision_lr_scale = 0.0
    run(second, tmp_path / "language")
    lines = read_log(tmp_path / "language" / "log.jsonl")
    assert all("distill_loss" not in line and line["lm_loss"] > 0 for line in lines if "loss" in line)
    folders = (vision / "final", tmp_path / "language" / "final")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.2." in name}  # above the teacher's two
    heads = [load_file(folder / HEADS_FILE) for folder in folders]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not meta_model(second)[0].vision_parameters() and meta_model(recipe())[0].vision_parameters()
    second.training["max_steps"] = 4
    run(second, tmp_path / "language", resume=True)
    assert read_log(tmp_path / "language" / "log.jsonl")[-1]["step"] == 4
    shallow = recipe()
    shallow.teacher.distill_only_steps, shallow.teacher.vision_lr_scale = 0, 0.0
    with pytest.raises(ValueError, match="0 parameters are left to learn: block 1 is paired.*lora.num_blocks above 2"):
        run(shallow, tmp_path / "none")
    with pytest.raises(ValueError, match="vision_lr_scale 0 cannot say what is frozen"):
        load_recipe({**shallow.model_dump(), "teacher": {"name": "x", "weight": 0, "vision_lr_scale": 0}})
