"""A recipe's objective without weights, on the meta device: all shapes, at no cost and without fetching anything.

`shapes/` holds the configurations of the models that recipes/ names, in the hub's layout, so that a run can be planned
without a network, or before a gated LLM is one's own.
"""

from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from vora.build.base_llm import ALIASES, resolve_llm
from vora.build.from_llm import from_llm
from vora.checkpoint.layout import read_info
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher
from vora.model.configuration_vora import VoraConfig
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.train.recipe import load_recipe
from vora.train.recipe_sections import Recipe
from vora.train.stages import objective_around, teacher_dtype, vision_is_frozen

SHAPES = files("vora.train.plan") / "shapes"
SHAPE_OF_ALIAS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def meta_model(recipe: Recipe, beside: str | Path | None = None) -> tuple[Objective, list[str]]:
    """The objective of a recipe on the meta device.

    Args:
        beside: the recipe's folder. A stage-2 recipe whose model is not there yet is planned as what
            pretrain.yaml in that folder will make.

    Returns:
        (objective, remarks on what was assumed).

    Raises:
        ValueError: a model's configuration cannot be found, the parts do not fit each other, or the recipe goes
            LLaVA's way.
    """
    check_no_encoder(recipe)
    remarks: list[str] = []
    model, teacher = recipe.model, None
    if recipe.teacher is not None:
        vit_config = config_of(recipe.teacher.name)
        with torch.device("meta"):
            vit = AutoModel.from_config(getattr(vit_config, "vision_config", vit_config), dtype=teacher_dtype(recipe))
            teacher = Teacher(vit)
    if model.vora is None:
        student = fresh_student(recipe, teacher)
    elif Path(model.vora).exists():
        config = VoraConfig.from_pretrained(read_info(model.vora).path)
        with torch.device("meta"):
            student = VoraForConditionalGeneration(config).to(getattr(torch, model.dtype))
    else:
        first = Path(beside or ".") / "pretrain.yaml"
        if not first.exists():
            raise ValueError(f"model.vora {model.vora} does not exist, and {first} neither, which would make it.")
        remarks.append(f"{model.vora} does not exist yet: taken as what {first.name} beside the recipe makes")
        before = load_recipe(first)
        before.model.dtype = model.dtype
        made, _ = meta_model(before)
        student = made.student.unload()
    image_processor = VoraImageProcessor(patch_size=student.config.patch_size, patch_merge=student.config.patch_merge)
    with torch.device("meta"):
        objective = objective_around(recipe, student.train(), image_processor, teacher)
    if vision_is_frozen(recipe):
        objective.freeze_vision()
        remarks.append("vision is frozen: counted as if it learned, so less is needed")
    return objective, remarks


def check_no_encoder(recipe: Recipe) -> None:
    """Raise for what is not planned: an encoder that stays on.

    Raises:
        ValueError: says what can be planned instead.
    """
    encoder, vora = recipe.model.encoder, recipe.model.vora
    if encoder is not None or (vora is not None and Path(vora).exists() and read_info(vora).is_llava):
        raise ValueError(
            f"{encoder or vora} is an encoder that stays on (LLaVA's way), and `vora plan` "
            "counts VoRA students alone: plan the recipe's VoRA twin, which differs by the encoder's forward pass."
        )


def fresh_student(recipe: Recipe, teacher: Teacher | None) -> VoraForConditionalGeneration:
    """A `VoraForConditionalGeneration` for a recipe's LLM, without weights."""
    wanted = recipe.model
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(
            config_of(str(wanted.llm)),
            dtype=getattr(torch, wanted.dtype),
            attn_implementation=wanted.attn_implementation,
        )
        return from_llm(
            llm,
            teacher=teacher if recipe.init_from_teacher else None,
            patch_size=wanted.patch_size,
            image_size=wanted.image_size,
            patch_merge=wanted.patch_merge,
            image_token_id=0,
        )


def config_of(name: str) -> PretrainedConfig:
    """Configuration of a model by folder, alias or hub id; of the models that recipes/ names, the one shipped here.

    Raises:
        ValueError: there is none.
    """
    shape = SHAPES / SHAPE_OF_ALIAS.get(name, name)
    if not Path(name).is_dir() and (shape / "config.json").is_file():
        return AutoConfig.from_pretrained(str(shape))
    source, options = resolve_llm(name) if Path(name).is_dir() or name in ALIASES else (name, {})
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"No configuration of {name}: {cause} Give a folder with its config.json.") from None
