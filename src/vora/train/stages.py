"""What each stage trains: the student, and in stage 1 LoRA, teacher and distillation heads around it."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Column, Table
from torch import nn

from vora.baselines.llava import VoraLlavaForConditionalGeneration
from vora.build.base_llm import resolve_llm
from vora.build.from_llm import from_llm, processor_from_llm
from vora.build.hub import located
from vora.build.lora import attach_vision_lora, keep_trained_in_fp32
from vora.build.vit_init import EXAMPLE as VIT_EXAMPLE
from vora.checkpoint.layout import AdapterInfo, read_info
from vora.checkpoint.load import load_heads, load_processor, load_trainable
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, Pair, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe_sections import ModelSection, Recipe, TeacherSection

TRAINED_FIRST = ("vision LoRA", "patch embedding", "projector", "distill heads")  # in stage pretrain
FROZEN_COPY = "frozen copy of the "


def build_objective(recipe: Recipe) -> tuple[Objective, VoraProcessor]:
    """The objective and the processor of a recipe: stage 1 with LoRA and teacher, stage 2 with everything free; an
    encoder never trains. A ValueError where teacher, LLM and LoRA do not fit each other."""
    check_names(recipe)
    vit = load_vit(recipe)
    student, processor = build_student(recipe, vit), build_processor(recipe, vit)
    processor.end_turns_of(student)  # what is saved, merged or sent elsewhere stops by itself
    teacher = None if recipe.teacher is None else vit
    return objective_around(recipe, student, processor.image_processor, teacher), processor


def check_names(recipe: Recipe) -> None:
    """Raise, with the recipe's key, where one of its models is not there, before any is loaded."""
    check_student_name(recipe)
    named = {"model.encoder": recipe.model.encoder, "teacher.name": recipe.teacher.name if recipe.teacher else None}
    for key, name in named.items():
        if name is not None:
            located(name, key, VIT_EXAMPLE)


def check_student_name(recipe: Recipe) -> None:
    """As `check_names`, of the LLM or the VoRA model alone."""
    if recipe.model.llm is not None:
        resolve_llm(recipe.model.llm, "model.llm")
    if recipe.model.vora is not None:
        located(recipe.model.vora, "model.vora", "me/my-vora")


def load_vit(recipe: Recipe) -> Teacher | None:
    """The ViT that a recipe names, as teacher or as encoder; None where it names none."""
    if recipe.model.encoder:
        return Teacher.from_pretrained(recipe.model.encoder, getattr(torch, recipe.model.dtype))
    if recipe.teacher is None:
        return None
    return Teacher.from_pretrained(recipe.teacher.name, teacher_dtype(recipe))


def objective_around(
    recipe: Recipe, student: Any, image_processor: VoraImageProcessor, teacher: Teacher | None = None
) -> Objective:
    """The objective of a stage: LoRA, teacher and heads around a student, with weights or on the meta device, in
    stage 1; nothing around it in stage 2."""
    lora, wanted, distillation = recipe.lora, recipe.teacher, None
    if recipe.stage == "finetune":
        objective = Objective(student.requires_grad_(True), image_processor)
    else:
        num_blocks = lora_depth(recipe, student, teacher)
        if not isinstance(student, PeftModel):
            student = attach_vision_lora(
                student, rank=lora.rank, num_blocks=num_blocks, target_modules=lora.target_modules
            )
        keep_trained_in_fp32(student)
        if wanted is None or teacher is None or wanted.weight == 0:
            teacher, weight = None, 0.0  # it only gave the patch embedding its start
        else:
            width, weight = student.config.get_text_config().hidden_size, wanted.weight
            pairs = pairs_of(wanted, num_blocks, teacher)
            distillation = BlockwiseDistillation(pairs, width, teacher.hidden_size, wanted.center, wanted.standardize)
            if recipe.model.vora is not None:
                load_heads(distillation, recipe.model.vora)
        objective = Objective(student, image_processor, teacher, distillation, weight, lora.text_kl_weight)
    check_trainable(objective, recipe.stage)
    return objective


def pairs_of(wanted: TeacherSection, num_blocks: int, teacher: Teacher) -> list[Pair]:
    """The block pairs that a recipe distills, of a student with LoRA in so many blocks."""
    depth = num_blocks if wanted.pairing == "outputs" else teacher.num_blocks
    pairs = block_pairs(depth, teacher.num_blocks, wanted.spread, wanted.pairing)
    if wanted.pairs == "last":
        pairs = pairs[-1:]
    return [*pairs, (pairs[-1][0], SUMMARY)] if wanted.summary else pairs


def vision_is_frozen(recipe: Recipe) -> bool:
    """Whether what images alone can teach stays as it is: its rates are scaled to nothing from the first step on."""
    return recipe.teacher is not None and recipe.teacher.vision_lr_scale == 0 and not recipe.distill_only_steps


def teacher_dtype(recipe: Recipe) -> torch.dtype:
    """What a teacher computes in: bf16 in a run that computes in it, where its features are as near to those in fp32
    as under autocast (dev/LOG.md), else float32."""
    in_bf16 = recipe.model.dtype == "bfloat16" or recipe.training.get("bf16")
    return torch.bfloat16 if in_bf16 else torch.float32


def build_student(recipe: Recipe, vit: Teacher | None = None, **given: Any) -> Any:
    """The model that a recipe starts from; `vit` from `load_vit`, more arguments of `from_llm` may be given."""
    wanted = recipe.model
    if wanted.vora is not None:
        return student_to_go_on_with(recipe)
    if recipe.stage == "finetune":
        raise ValueError(
            "Stage finetune trains a merged VoRA model, but the recipe names a bare LLM: run stage pretrain and "
            "`vora merge` first, and give the merged folder as model.vora."
        )
    keys = {"llm", "patch_size", "image_size", "patch_merge", "dtype", "attn_implementation"}
    if "llm" in given:  # loaded, as it is to be
        keys -= {"dtype", "attn_implementation"}
    options = wanted.model_dump(include=keys) | given
    if wanted.encoder is not None and vit is not None:
        return VoraLlavaForConditionalGeneration.from_llm(encoder=vit, **options)
    start = vit if recipe.init_from_teacher else None
    options |= wanted.model_dump(include={"image_attention", "axial_positions"})
    return from_llm(teacher=start, **options)


def student_to_go_on_with(recipe: Recipe) -> Any:
    """The VoRA model that a recipe goes on with: a folder, or the directory of a run; merged, or in stage 1 also with
    the LoRA that it has. A ValueError where the recipe asks for another LoRA or patch embedding than it has."""
    info, wanted = read_info(str(recipe.model.vora)), recipe.model
    if info.adapter is not None:
        check_lora(recipe, info.path, info.adapter)
    student = load_trainable(info, wanted.dtype)
    model = student if info.adapter is None else student.get_base_model()
    if wanted.attn_implementation is not None:
        model.set_attn_implementation(wanted.attn_implementation)
    changed = []
    for key in ("patch_size", "image_size", "patch_merge", "axial_positions", "image_attention"):
        value, has = getattr(wanted, key), getattr(model.config, key, None)
        if value not in (has, ModelSection.model_fields[key].default):
            changed.append(f"{key} {value} (it has {has})")
    if changed:
        raise ValueError(
            f"model.vora goes on with {wanted.vora} as it is, and model.{', model.'.join(changed)} would change it: "
            "leave that out, or begin with model.llm."
        )
    return student


def check_lora(recipe: Recipe, path: Path, has: AdapterInfo) -> None:
    """Raise where a model's LoRA is not what the recipe asks for."""
    wanted = recipe.lora
    if recipe.stage == "finetune":
        raise ValueError(
            f"Stage finetune trains a merged model: vora merge {recipe.model.vora} -o OUT, and model.vora=OUT."
        )
    if has.rank != wanted.rank or wanted.num_blocks not in (None, has.num_blocks):
        raise ValueError(
            f"{path} has LoRA of rank {has.rank} in {has.num_blocks} blocks, but the recipe asks for rank "
            f"{wanted.rank} in {wanted.num_blocks or 'as many as the teacher has'}: set lora.rank={has.rank} "
            f"lora.num_blocks={has.num_blocks}."
        )
    if wanted.target_modules is not None and set(wanted.target_modules) != set(has.target_modules):
        raise ValueError(
            f"{path} has LoRA on {', '.join(has.target_modules)}: leave lora.target_modules out, or name these."
        )


def build_processor(recipe: Recipe, vit: Teacher | None = None) -> VoraProcessor:
    """The processor of a recipe, for which no model is needed; `vit` from `load_vit`."""
    wanted = recipe.model
    if wanted.vora is not None:
        processor = load_processor(wanted.vora)
        if wanted.chat_template is not None or wanted.image_markers is not None:
            template = wanted.chat_template or processor.text_tokenizer().chat_template
            processor.image_markers = list(wanted.image_markers or processor.image_markers)
            processor.set_template(template)
    else:
        keys = {"patch_size", "image_size", "patch_merge", "chat_template", "image_markers"}
        options = wanted.model_dump(include=keys)
        if vit is not None and (wanted.encoder is not None or recipe.init_from_teacher):
            options["teacher"] = vit
        elif vit is not None:  # its normalisation, also where the patch embedding starts afresh
            options |= {"image_mean": vit.image_mean, "image_std": vit.image_std}
        processor = processor_from_llm(str(wanted.llm), **options)
    processor.image_processor.set_budget(wanted.min_image_tokens, wanted.max_image_tokens)
    if wanted.pad_to_square is not None:
        processor.image_processor.pad_to_square = wanted.pad_to_square
    return processor


def lora_depth(recipe: Recipe, student: Any, teacher: Teacher | None) -> int:
    """How many blocks get LoRA: the recipe's number, else what the student has, else the teacher's depth, else all. A
    ValueError where the teacher is deeper than the LLM, or than its LoRA, and its blocks are not to be spread."""
    num_blocks, llm = recipe.lora.num_blocks, student
    if isinstance(student, PeftModel):
        llm = student.get_base_model()
        num_blocks = num_blocks or len(student.peft_config["default"].layers_to_transform)
    depth = len(llm.model.blocks)
    if teacher is None or recipe.teacher is None:
        return num_blocks or depth
    # the released code pairs blocks that have no LoRA too
    limit = num_blocks or depth if recipe.teacher.pairing == "outputs" else depth
    if teacher.num_blocks > limit and not recipe.teacher.spread:
        raise ValueError(
            f"The teacher has {teacher.num_blocks} blocks, but only {limit} of the LLM's {depth} would learn from it: "
            "set teacher.spread=true to space them evenly, raise lora.num_blocks, or take a shallower teacher."
        )
    return num_blocks or min(depth, teacher.num_blocks)


def part_of_model(name: str) -> str:
    """Which part of an `Objective` a parameter belongs to."""
    if name.startswith("distillation."):
        return "distill heads"
    if "lora_" in name:
        return "vision LoRA"
    if "patch_embedding.encoder." in name:
        return "encoder"
    if "patch_embedding" in name:
        part = "projector" if "patch_embedding.projector." in name else "patch embedding"
        return FROZEN_COPY + part if "original_module" in name else part
    return "LLM"


def trainable_counts(objective: nn.Module) -> dict[str, list[int]]:
    """{part: [trained parameters, all parameters]}."""
    counts: dict[str, list[int]] = {}
    for name, parameter in objective.named_parameters():
        count = counts.setdefault(part_of_model(name), [0, 0])
        count[0] += parameter.numel() * parameter.requires_grad
        count[1] += parameter.numel()
    return counts


def check_trainable(objective: nn.Module, stage: str) -> None:
    """Refuse to start unless exactly the parts that a stage trains do."""
    for part, (trained, total) in trainable_counts(objective).items():
        should = part != "encoder" if stage == "finetune" else part in TRAINED_FIRST
        if trained != (total if should else 0):
            raise ValueError(
                f"Stage {stage} should train {'all' if should else 'none'} of the {part}, but {trained:,} of its "
                f"{total:,} parameters would train: reset requires_grad, or start from a fresh model."
            )


def trainable_table(objective: Objective, stage: str) -> Table:
    """The table that a run prints before its first step."""
    table = Table("part", Column("trained", justify="right"), Column("of", justify="right"))
    table.title = f"What trains in stage {stage}"
    for part, (trained, total) in trainable_counts(objective).items():
        if not part.startswith(FROZEN_COPY):
            table.add_row(part, f"{trained:,}", f"{total:,}")
    if objective.teacher is not None:
        table.add_row("teacher (not saved)", "0", f"{sum(p.numel() for p in objective.teacher.parameters()):,}")
    return table
