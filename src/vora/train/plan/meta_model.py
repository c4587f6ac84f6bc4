"""A recipe's objective without weights, on the meta device. `shapes/` holds the configurations of the models that
recipes/ names, in the hub's layout: to plan a run without a network, or before a gated LLM is one's own."""

from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from vora.build.base_llm import check_is_llm, resolve_llm
from vora.build.hub import loading, located, remote_code
from vora.build.vit_init import EXAMPLE as VIT_EXAMPLE
from vora.checkpoint.layout import read_info
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher
from vora.model.configuration_vora import VoraConfig
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.train.recipe import load_recipe
from vora.train.recipe_sections import Recipe
from vora.train.stages import build_student, objective_around, teacher_dtype, vision_is_frozen

SHAPES = files("vora.train.plan") / "shapes"
SHAPE_OF_ALIAS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def meta_model(recipe: Recipe, beside: str | Path | None = None) -> tuple[Objective, list[str]]:
    """(The objective of a recipe on the meta device, remarks on what was assumed). A stage-2 recipe whose model is not
    there yet is planned as what pretrain.yaml in the folder `beside` it will make. A ValueError where a
    configuration cannot be found, the parts do not fit, or the recipe goes LLaVA's way."""
    vora, encoder = recipe.model.vora, recipe.model.encoder
    is_there = vora is not None and Path(vora).exists()
    if encoder is not None or (is_there and read_info(str(vora)).is_llava):
        raise ValueError(
            f"{encoder or vora} is an encoder that stays on (LLaVA's way), and `vora plan` "
            "counts VoRA students alone: plan the recipe's VoRA twin, which differs by the encoder's forward pass."
        )
    remarks, teacher = [], None
    if recipe.teacher is not None:
        config = vit_config_of(recipe.teacher.name, "teacher.name")
        with torch.device("meta"):
            vit = AutoModel.from_config(config, dtype=teacher_dtype(recipe))
            teacher = Teacher(vit)
    dtype = getattr(torch, recipe.model.dtype)
    if vora is None:
        with torch.device("meta"):
            options = {"dtype": dtype, "attn_implementation": recipe.model.attn_implementation}
            llm = AutoModelForCausalLM.from_config(llm_config_of(str(recipe.model.llm), "model.llm"), **options)
            student = build_student(recipe, teacher, llm=llm, image_token_id=0)
    elif is_there:
        with torch.device("meta"):
            student = VoraForConditionalGeneration(VoraConfig.from_pretrained(read_info(vora).path))
            student = student.to(dtype)
    else:
        first = Path(beside or ".") / "pretrain.yaml"
        if not first.exists():
            raise ValueError(f"model.vora {vora} does not exist, and {first} neither, which would make it.")
        remarks.append(f"{vora} does not exist yet: taken as what {first.name} beside the recipe makes")
        before = load_recipe(first)
        before.model.dtype = recipe.model.dtype
        student = meta_model(before)[0].student.unload()
    image_processor = VoraImageProcessor(patch_size=student.config.patch_size, patch_merge=student.config.patch_merge)
    with torch.device("meta"):
        objective = objective_around(recipe, student.train(), image_processor, teacher)
    if vision_is_frozen(recipe):
        objective.freeze_vision()
        remarks.append("vision is frozen: counted as if it learned, so less is needed")
    return objective, remarks


def llm_config_of(name: str, key: str = "The LLM") -> PretrainedConfig:
    """As `config_of`, of a causal LM; ValueError where it is none."""
    config = config_of(name, key)
    check_is_llm(name, config)
    return config


def vit_config_of(name: str, key: str) -> PretrainedConfig:
    """As `config_of`, of a ViT, the visual part alone; ValueError where it has no patches."""
    config = config_of(name, key, VIT_EXAMPLE)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size"):
        raise ValueError(f"{key} {name} is a {config.model_type} model, and no plain ViT: name one, or {VIT_EXAMPLE}.")
    return config


def config_of(name: str, key: str = "The model", vit: str | None = None) -> PretrainedConfig:
    """Configuration of a model by folder, alias or hub id; of the models that recipes/ names, the one shipped here.
    ValueError, which names it as `key`, where there is none. `vit` is an example where a ViT is wanted."""
    shape = SHAPES / SHAPE_OF_ALIAS.get(name, name)
    if not Path(name).is_dir() and (shape / "config.json").is_file():
        return AutoConfig.from_pretrained(str(shape))
    source, options = resolve_llm(name, key) if vit is None else (located(name, key, vit), {})
    with loading(source, key):
        return AutoConfig.from_pretrained(source, **options, **remote_code())
