"""What each stage trains, shown as a table and checked before the first step."""

from pathlib import Path

import torch
from peft import PeftModel
from rich.table import Table
from safetensors.torch import load_file

from vora.baselines.llava import VoraLlavaForConditionalGeneration, kind_of_student
from vora.build.from_llm import from_llm, processor_from_llm
from vora.build.lora import DISTILLATION_FILE, attach_vision_lora, is_unmerged, load_vision_lora
from vora.checkpoint.adapter import fetch_adapter, is_adapter, load_adapter, processor_of_adapter
from vora.checkpoint.run_directory import is_run, trained_folder
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe import ModelSection, load_recipe
from vora.train.trainer import load_student

TRAINED_FIRST = ("vision LoRA", "patch embedding", "projector", "distill heads")  # in stage pretrain
FROZEN_COPY = "frozen copy of the "


def build_learner(recipe):
    """The learner and the processor of a recipe: stage 1 with LoRA and teacher, stage 2 with everything free; an
    encoder never trains.

    Raises:
        ValueError: teacher, LLM and LoRA do not fit each other, or what trains is not what the stage says.
    """
    vit = load_vit(recipe)
    student, processor = build_student(recipe, vit)
    processor.end_turns_of(student)  # what is saved, merged or sent elsewhere stops by itself
    teacher = None if recipe.teacher is None else vit
    return with_scaffolding(recipe, student, processor.image_processor, teacher), processor


def load_vit(recipe):
    """The ViT that a recipe names, as teacher or as encoder; None where it names none."""
    if recipe.model.encoder:
        return Teacher.from_pretrained(recipe.model.encoder, getattr(torch, recipe.model.dtype))
    return recipe.teacher and Teacher.from_pretrained(recipe.teacher.name, teacher_dtype(recipe))


def with_scaffolding(recipe, student, image_processor, teacher=None):
    """The learner of a stage: LoRA, teacher and heads around a student in stage 1, nothing in stage 2.

    Args:
        student: from `build_student`, or one without weights, on the meta device.

    Raises:
        ValueError: as `build_learner`.
    """
    if recipe.stage == "finetune":
        learner = Objective(student.requires_grad_(True), image_processor)
    else:
        num_blocks = lora_depth(recipe, student, teacher)
        peft_model = student
        if not isinstance(student, PeftModel):
            peft_model = attach_vision_lora(
                student, rank=recipe.lora.rank, num_blocks=num_blocks, target_modules=recipe.lora.target_modules
            )
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # updates of 1e-4 vanish in bf16
        distillation = None
        if recipe.teacher is not None and recipe.teacher.weight == 0:
            teacher = None  # it only gave the eyes their start
        if teacher is not None:
            taught = num_blocks if recipe.teacher.pairing == "outputs" else teacher.num_blocks
            pairs = block_pairs(taught, teacher.num_blocks, recipe.teacher.spread, recipe.teacher.pairing)
            if recipe.teacher.pairs == "last":
                pairs = pairs[-1:]
            if recipe.teacher.summary:
                pairs.append((pairs[-1][0], SUMMARY))
            width = student.config.get_text_config().hidden_size
            distillation = BlockwiseDistillation(
                pairs, width, teacher.hidden_size, recipe.teacher.center, recipe.teacher.standardize
            )
            take_heads(distillation, recipe)
        weight = 0.0 if recipe.teacher is None else recipe.teacher.weight
        learner = Objective(peft_model, image_processor, teacher, distillation, weight, recipe.lora.text_kl_weight)
    check_trainable(learner, recipe.stage)
    return learner


def vision_is_frozen(recipe):
    """Whether words alone are learned: the eyes' rates are scaled to nothing from the first step on."""
    return recipe.teacher is not None and recipe.teacher.vision_lr_scale == 0 and not recipe.teacher.distill_only_steps


def teacher_dtype(recipe):
    """What a teacher computes in: bf16 in a run that computes in it, else float32.

    Its features then are within 4e-4 (1 - cosine, mean subtracted) of those in float32, as near as under autocast,
    where the weights of each product are rounded at each step anew (dev/LOG.md).
    """
    in_bf16 = recipe.model.dtype == "bfloat16" or recipe.training.get("bf16")
    return torch.bfloat16 if in_bf16 else torch.float32


def build_student(recipe, vit=None):
    """The model and processor that a recipe starts from.

    Args:
        vit: from `load_vit`.

    Raises:
        ValueError: stage 2 is asked of an LLM that has no trained eyes yet.
    """
    wanted = recipe.model
    if wanted.vora is not None:
        return existing_student(recipe), build_processor(recipe)
    if recipe.stage == "finetune":
        raise ValueError(
            "Stage finetune trains a merged VoRA model, but the recipe names a bare LLM: run stage pretrain and "
            "`vora merge` first, and give the merged folder as model.vora."
        )
    options = {
        "patch_size": wanted.patch_size,
        "image_size": wanted.image_size,
        "patch_merge": wanted.patch_merge,
        "dtype": wanted.dtype,
        "attn_implementation": wanted.attn_implementation,
    }
    if wanted.encoder is not None:
        model = VoraLlavaForConditionalGeneration.from_llm(wanted.llm, encoder=vit, **options)
    else:
        start = vit if vit is not None and recipe.teacher.init_from_teacher else None
        model = from_llm(wanted.llm, teacher=start, image_attention=wanted.image_attention, **options)
    return model, build_processor(recipe, vit)


def existing_student(recipe):
    """The VoRA model that a recipe goes on with: merged, or in stage 1 also with the LoRA that it has; a folder, or
    the directory of a run.

    Raises:
        ValueError: it has LoRA of another rank or depth than the recipe's, or should train without it.
    """
    folder, dtype = trained_folder(fetch_adapter(recipe.model.vora)), recipe.model.dtype
    has_adapter = (folder / "adapter_config.json").exists()
    if not has_adapter:
        return _as_wanted(kind_of_student(folder).from_pretrained(folder, dtype=dtype), recipe.model)
    if recipe.stage == "finetune":
        raise ValueError(
            f"Stage finetune trains a merged model: vora merge {recipe.model.vora} -o OUT, and model.vora=OUT."
        )
    if is_unmerged(folder):
        model = load_vision_lora(folder, dtype)
    elif is_run(recipe.model.vora):
        model = student_of_run(recipe.model.vora, dtype)
    else:
        model = load_adapter(folder, dtype)
    has = model.peft_config["default"]
    num_blocks, wanted = len(has.layers_to_transform), recipe.lora
    if has.r != wanted.rank or wanted.num_blocks not in (None, num_blocks):
        raise ValueError(
            f"{folder} has LoRA of rank {has.r} in {num_blocks} blocks, but the recipe asks for rank {wanted.rank} in "
            f"{wanted.num_blocks or 'as many as the teacher has'}: set lora.rank={has.r} lora.num_blocks={num_blocks}."
        )
    if wanted.target_modules is not None and set(wanted.target_modules) != set(has.target_modules):
        raise ValueError(
            f"{folder} has LoRA on {', '.join(sorted(has.target_modules))}: leave lora.target_modules out, or name "
            "these."
        )
    _as_wanted(model.get_base_model(), recipe.model)
    return model


def _as_wanted(model, wanted):
    """An existing VoRA model that computes as a recipe's model section says.

    Raises:
        ValueError: the section asks for other eyes than it has.
    """
    if wanted.attn_implementation != "sdpa":
        model.set_attn_implementation(wanted.attn_implementation)
    changed = []
    for key in ("patch_size", "image_size", "patch_merge", "image_attention"):
        value, has = getattr(wanted, key), getattr(model.config, key, None)
        if value not in (has, ModelSection.model_fields[key].default):
            changed.append(f"{key} {value} (it has {has})")
    if changed:
        raise ValueError(
            f"model.vora goes on with the eyes of {wanted.vora}, and model.{', model.'.join(changed)} would be others"
            ": leave that out, or begin with model.llm."
        )
    return model


def student_of_run(directory, dtype):
    """What a run of stage 1 has trained, with its LoRA on, to go on training."""
    learner, _ = build_learner(load_recipe(Path(directory) / "recipe.yaml", [f"model.dtype={dtype}"]))
    load_student(learner, trained_folder(directory))
    return learner.student


def take_heads(distillation, recipe):
    """Go on with the distill heads that lie beside an unmerged model's adapter.

    Raises:
        ValueError: they are of other blocks or of another teacher's width.
    """
    if recipe.model.vora is None:
        return
    file = trained_folder(fetch_adapter(recipe.model.vora)) / DISTILLATION_FILE
    if not file.exists():
        return
    state, wanted = load_file(file), distillation.state_dict()
    misfits = [name for name in {**state, **wanted} if _shape(state, name) != _shape(wanted, name)]
    if misfits:
        raise ValueError(
            f"{len(misfits)} tensors of the distill heads of {file.parent} are not those of the recipe's teacher, such"
            f" as {misfits[0]} ({_shape(state, misfits[0])} there, {_shape(wanted, misfits[0])} here): set "
            "teacher.standardize, summary and pairs as they were trained, teacher.pairing to hidden_states (a "
            "checkpoint of the released code with a teacher of transformers) or inputs (with AIMv2), or delete the "
            "file to begin with fresh ones."
        )
    distillation.load_state_dict(state)


def _shape(tensors, name):
    return tuple(tensors[name].shape) if name in tensors else None


def build_processor(recipe, vit=None):
    """The processor of a recipe, for which no model is needed.

    Args:
        vit: from `load_vit`.
    """
    wanted = recipe.model
    if wanted.vora is not None:
        folder = trained_folder(fetch_adapter(wanted.vora))
        known = processor_of_adapter(folder) if is_adapter(folder) else VoraProcessor.from_pretrained(folder)
        if wanted.chat_template is not None:
            known.set_template(wanted.chat_template)
        return _looking(known, wanted)
    options = {}
    if vit is not None and (wanted.encoder is not None or recipe.teacher.init_from_teacher):
        options["teacher"] = vit
    elif vit is not None:  # its normalisation, also where the patch embedding starts afresh
        options |= {"image_mean": vit.image_mean, "image_std": vit.image_std}
    processor = processor_from_llm(
        wanted.llm,
        patch_size=wanted.patch_size,
        image_size=wanted.image_size,
        patch_merge=wanted.patch_merge,
        chat_template=wanted.chat_template,
        **options,
    )
    return _looking(processor, wanted)


def _looking(processor, wanted):
    """A processor whose images get what the recipe's model section says of them."""
    processor.image_processor.set_budget(wanted.min_image_tokens, wanted.max_image_tokens)
    if wanted.pad_to_square is not None:
        processor.image_processor.pad_to_square = wanted.pad_to_square
    return processor


def lora_depth(recipe, student, teacher):
    """How many blocks get LoRA: the recipe's number, else the teacher's depth, else all.

    Raises:
        ValueError: the teacher is deeper than the LLM, or than its LoRA, and its blocks are not to be spread.
    """
    has_lora = isinstance(student, PeftModel)
    depth = len((student.get_base_model() if has_lora else student).model.blocks)
    num_blocks = recipe.lora.num_blocks
    if has_lora and num_blocks is None:
        num_blocks = len(student.peft_config["default"].layers_to_transform)
    if teacher is None:
        return num_blocks or depth
    limit = num_blocks or depth
    if recipe.teacher.pairing != "outputs":
        limit = depth  # the released code teaches blocks that have no LoRA too
    if teacher.num_blocks > limit and not recipe.teacher.spread:
        raise ValueError(
            f"The teacher has {teacher.num_blocks} blocks, but only {limit} of the LLM's {depth} would learn from it: "
            "set teacher.spread=true to space them evenly, raise lora.num_blocks, or take a shallower teacher."
        )
    return num_blocks or min(depth, teacher.num_blocks)


def group_of(name):
    """Which part of the learner a parameter belongs to."""
    if name.startswith("distillation."):
        return "distill heads"
    if "lora_" in name:
        return "vision LoRA"
    if "patch_embedding.encoder." in name:
        return "encoder"
    if "patch_embedding" in name:
        eyes = "projector" if "patch_embedding.projector." in name else "patch embedding"
        return FROZEN_COPY + eyes if "original_module" in name else eyes
    return "LLM"


def trainable_counts(learner):
    """{part: [trained parameters, all parameters]}."""
    counts = {}
    for name, parameter in learner.named_parameters():
        count = counts.setdefault(group_of(name), [0, 0])
        count[0] += parameter.numel() * parameter.requires_grad
        count[1] += parameter.numel()
    return counts


def check_trainable(learner, stage):
    """Refuse to start unless exactly the right parts train.

    Raises:
        ValueError: a part that should train is (partly) frozen, or the other way round.
    """
    for part, (trained, total) in trainable_counts(learner).items():
        should = part != "encoder" if stage == "finetune" else part in TRAINED_FIRST
        if trained != (total if should else 0):
            raise ValueError(
                f"Stage {stage} should train {'all' if should else 'none'} of the {part}, but {trained:,} of its "
                f"{total:,} parameters would train: reset requires_grad, or start from a fresh model."
            )


def trainable_table(learner, stage):
    """The table that a run prints before its first step."""
    table = Table(title=f"What trains in stage {stage}")
    table.add_column("part")
    table.add_column("trained", justify="right")
    table.add_column("of", justify="right")
    for part, (trained, total) in trainable_counts(learner).items():
        if not part.startswith(FROZEN_COPY):
            table.add_row(part, f"{trained:,}", f"{total:,}")
    if learner.teacher is not None:
        table.add_row("teacher (not saved)", "0", f"{sum(p.numel() for p in learner.teacher.parameters()):,}")
    return table
