"""The recipe of a run: strict YAML, in which an unknown key is an error that names the nearest known one."""

import difflib
import re
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import TrainingArguments

from vora.build.base_llm import ALIASES
from vora.data.prompts import DEFAULT_PROMPTS, Prompts
from vora.data.readers import EASY_VQA

CHANGES_NOTHING = {  # fields of TrainingArguments
    "data_seed": "would change nothing: the order of the data follows training.seed",
    "label_smoothing_factor": "would change nothing: losses are the learner's own, not the Trainer's",
    "auto_find_batch_size": (
        "would change nothing, for rows are packed before a batch is tried: ask `vora plan`, and set "
        "training.per_device_train_batch_size"
    ),
    "save_only_model": "would leave checkpoints without their place in the data, from which nothing can resume",
    "use_liger_kernel": (
        "would change nothing: the Trainer gives Liger's kernels to bare models of families that Liger knows. What "
        "its fused loss saves is saved already, for logits are made at labels alone and in parts of bounded size "
        "(model/label_loss.py)"
    ),
}
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # transformers' old and its new name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSection(Section):
    """Which LLM gets eyes (`llm`), or which VoRA model goes on training (`vora`)."""

    llm: str | None = None
    vora: str | None = None
    encoder: str | None = None  # LLaVA's way: a ViT that stays on, frozen, behind a projector; folder or hub id
    patch_size: int | None = None
    image_size: int | None = None
    patch_merge: int = Field(1, ge=1)
    min_image_tokens: int | None = Field(None, ge=1)  # of an image, wherever the model is used; see `fit_grid`
    max_image_tokens: int | None = Field(None, ge=1)
    pad_to_square: bool | None = None  # black bars instead of the image's own shape, as the released code
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"
    chat_template: str | None = None  # Jinja text, or a path beside the recipe
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] = "sdpa"

    @model_validator(mode="after")
    def one_source(self):
        if (self.llm is None) == (self.vora is None):
            raise ValueError("give exactly one of llm (fresh eyes) and vora (a model that has some)")
        return self

    @model_validator(mode="after")
    def as_llava(self):
        if self.encoder is None:
            return self
        if self.vora is not None:
            raise ValueError("encoder makes fresh eyes for an llm, and model.vora has its own: leave one of them out")
        if "image_attention" not in self.model_fields_set:
            self.image_attention = "causal"
        if self.image_attention != "causal":
            raise ValueError("with an encoder the LLM reads images causally, as LLaVA's: leave image_attention out")
        return self


class LoraSection(Section):
    rank: int = Field(32, ge=1)
    num_blocks: int | None = Field(None, ge=1)  # default: as many as the teacher has
    target_modules: list[str] | None = None
    # weight of `text_loss`, in each micro-batch that has text alone: it is kept as the LLM without LoRA has it
    text_kl_weight: float = Field(0.0, ge=0)


class TeacherSection(Section):
    name: str
    weight: float = Field(1.0, ge=0)
    pairs: Literal["all", "last"] = "all"  # which blocks are taught: each pair's, or the deepest pair's alone
    center: bool = True  # these three: see `BlockwiseDistillation`
    standardize: bool = False
    summary: bool = False
    spread: bool = False
    pairing: Literal["outputs", "inputs", "hidden_states"] = (
        "outputs"  # the last two: as the released code, see `block_pairs`
    )
    distill_only_steps: int = Field(0, ge=0)  # first steps that distill images alone and run the paired blocks only
    # after them, of the learning rates of all that they train; 0 without such steps: it rests, at no cost, and so does
    # the teacher (`Objective.freeze_vision`)
    vision_lr_scale: float = Field(1.0, ge=0)
    init_from_teacher: bool = True  # the patch embedding starts from the teacher's

    @model_validator(mode="after")
    def rest_is_of_what_is_taught(self):
        if self.weight == 0 and self.vision_lr_scale == 0:
            raise ValueError(
                "with weight 0 nothing is taught, so vision_lr_scale 0 cannot say what shall rest: keep one"
            )
        return self


class LearningRates(Section):
    """Where they differ from `training.learning_rate`. LoRA+ (arXiv 2402.12354): B learns faster than A."""

    lora_b: float | None = Field(None, gt=0)
    patch_embedding: float | None = Field(None, gt=0)
    heads: float | None = Field(None, gt=0)


class AugmentSection(Section):
    """How images are changed each time that they are drawn; see `vora.data.augment.augmented`."""

    crop: float = Field(1.0, gt=0, le=1)
    flip: bool = False
    colour: float = Field(0.0, ge=0, lt=1)


class SourceSection(Section):
    """Where samples come from; see `vora.data.readers.load_source` for what a path may be."""

    path: str
    split: str = "train"
    subset: str | None = None  # of a dataset on the Hub
    weight: float | None = Field(None, gt=0)  # share of all samples, relative to the others'; default: its rows
    image_folder: str | None = None  # where paths of images start; default: beside the file
    columns: dict[str, str] | None = None  # {our name: the file's}, such as {question: query}
    max_samples: int | None = Field(None, ge=1)
    augment: AugmentSection | None = None


class DataSection(Section):
    folder: str | None = None  # where the paths of the sources start; default: beside the recipe
    sources: list[SourceSection] = Field(min_length=1)
    sequence_length: int = Field(1024, ge=8)
    questions_per_image: int | None = Field(None, ge=1)  # drawn anew each epoch; all of them by default
    answer_balance: float = Field(0.0, ge=0, le=1)  # 0: each label token counts alike, 1: each answer; `label_weights`
    caption_prompts: list[str] = list(DEFAULT_PROMPTS.caption)  # asked where a row has an answer alone: `Prompts`
    label_prompts: list[str] = list(DEFAULT_PROMPTS.label)
    statement_prompts: list[str] = list(DEFAULT_PROMPTS.statement)
    text_only: bool = False  # leave every image out: the LLM learns from the words alone
    image_tokens: tuple[int, int] | None = None  # each image's budget is drawn between these two
    max_bad_share: float = Field(0.1, ge=0, le=1)  # stop when more of the samples read are bad

    @model_validator(mode="after")
    def sensible(self):
        if len({source.weight is None for source in self.sources}) > 1:
            missing = sum(source.weight is None for source in self.sources)
            raise ValueError(f"{missing} of {len(self.sources)} sources have no weight: give each one, or none")
        if self.image_tokens and not 1 <= self.image_tokens[0] <= self.image_tokens[1]:
            raise ValueError(f"image_tokens {list(self.image_tokens)} is no range: give [fewest, most]")
        self.prompts  # it refuses empty lists
        return self

    @property
    def prompts(self):
        """The three lists as `Prompts`."""
        return Prompts(self.caption_prompts, self.label_prompts, self.statement_prompts)


class SampleGenerationSection(Section):
    """A fixed image that is answered at every evaluation."""

    image: str
    question: str


class Recipe(Section):
    """A whole run. `training` takes the fields of `transformers.TrainingArguments`."""

    stage: Literal["pretrain", "finetune"] = "pretrain"
    model: ModelSection
    lora: LoraSection = LoraSection()
    teacher: TeacherSection | None = None
    data: DataSection
    learning_rates: LearningRates = LearningRates()
    sample_generations: list[SampleGenerationSection] = []
    max_minutes: float | None = Field(None, gt=0)  # plan fewer steps than training.max_steps if they would take longer
    training: dict = {}

    @model_validator(mode="after")
    def one_way_to_see(self):
        ways = [
            name
            for name, given in {
                "teacher": self.teacher,
                "model.encoder": self.model.encoder,
                "data.text_only": self.data.text_only or None,
            }.items()
            if given is not None
        ]
        if len(ways) > 1:
            raise ValueError(
                f"{' and '.join(ways)} exclude each other: an encoder is taught by nobody, and a blind LLM sees no "
                "images; keep one"
            )
        if self.data.text_only and self.lora.text_kl_weight:
            raise ValueError(
                "data.blind leaves text alone, and with lora.text_kl_weight that teaches nothing: keep one"
            )
        return self

    @model_validator(mode="after")
    def known_training_arguments(self):
        known = {field.name for field in fields(TrainingArguments)}
        for key in self.training:
            if key not in known or key == "output_dir":
                raise ValueError(f"training.{key} is not a field of TrainingArguments{_nearest(key, known)}")
        self.training = {key: _whole_or(key, _number_or(value)) for key, value in self.training.items()}
        return self

    @model_validator(mode="after")
    def known_recomputation(self):
        given = [key for key in CHECKPOINTING if self.training.get(key) is not None]
        if len(given) > 1:
            raise ValueError(f"training.{given[0]} and training.{given[1]} are one thing: give one of them")
        for key in given:
            value = self.training[key]
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"training.{key} is {value!r}: give true (every block), false, or n (the first n)")
            if "every_n_layers" in (self.training.get(f"{key}_kwargs") or {}):
                raise ValueError(
                    f"training.{key}_kwargs.every_n_layers is not used here: set training.{key} to a number n, for "
                    "the first n blocks; of any n they need least memory, since they are computed again last"
                )
        return self

    @property
    def recomputed_blocks(self):
        """Which of the LLM's blocks are computed again in the backward pass: True (all), or how many of the first."""
        given = [self.training[key] for key in CHECKPOINTING if self.training.get(key) is not None]
        return given[0] if given else 0


def check_recipe(recipe):
    """What a run that is to begin must not ask for, since nothing would come of it; recipes of runs that were trained
    before may, and are read.

    Raises:
        ValueError: names the key and why.
    """
    if recipe.stage == "finetune" and recipe.teacher is not None:
        raise ValueError("stage finetune has no teacher, so its section would change nothing: set teacher=null")
    if recipe.teacher is not None and recipe.teacher.weight == 0:
        if steps := recipe.teacher.distill_only_steps:
            raise ValueError(
                f"with teacher.weight 0 nothing is distilled, but distill_only_steps is {steps}: set it to 0"
            )
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for key, why in CHANGES_NOTHING.items():
        if recipe.training.get(key, defaults[key]) != defaults[key]:
            raise ValueError(f"training.{key} {why}: leave it out")


def load_recipe(source, overrides=()):
    """Read and check a recipe.

    Args:
        source: path of a YAML file, or a dict.
        overrides: texts `key=value` with dotted keys, such as `training.learning_rate=1e-3`; values are YAML.

    Raises:
        ValueError: unknown or missing keys, values of the wrong kind, all named in one message.
    """
    name = "recipe" if isinstance(source, dict) else str(source)
    values = source if isinstance(source, dict) else read_yaml(Path(source))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is no override: write key=value, such as training.max_steps=100.")
        _override(values, key, _yaml_value(value))
    recipe = validated(Recipe, values, name)
    if not isinstance(source, dict):
        _resolve_paths(recipe, Path(source).parent)
    return recipe


def validated(kind, values, name):
    """Values as a `Section` of that kind.

    Args:
        name: of where they come from, for messages.

    Raises:
        ValueError: unknown or missing keys, values of the wrong kind, all named in one message.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{name}: " + "; ".join(_explain(kind, found) for found in error.errors())) from None


def _override(values, key, value):
    """Set a dotted key, in which a number counts the entries of a list."""
    *path, leaf = key.split(".")
    section = values
    try:
        for part in path:
            section = section[int(part)] if isinstance(section, list) else section.setdefault(part, {})
        section[int(leaf) if isinstance(section, list) else leaf] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{key} names no place in the recipe: check the numbers and names before the last dot."
        ) from None


def save_recipe(recipe, path):
    """Write the resolved recipe, defaults included."""
    Path(path).write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110))


def read_yaml(path):
    """What a YAML file of keys holds, as a dict.

    Raises:
        ValueError: it cannot be read, is no YAML, or holds no keys.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"Cannot read recipe {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys: a recipe has at least model and data.")
    return values


def _number_or(value):
    """YAML 1.1 reads 1e-3 as text; also within lists and mappings."""
    if isinstance(value, dict):
        return {key: _number_or(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_number_or(one) for one in value]
    is_power = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if is_power else value


def _whole_or(key, value):
    """1e4 steps are 10,000: a whole number where TrainingArguments takes no other."""
    kind = str(next(field.type for field in fields(TrainingArguments) if field.name == key))
    is_whole = isinstance(value, float) and value.is_integer() and "int" in kind and "float" not in kind
    return int(value) if is_whole else value


def _yaml_value(text):
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:  # such as *.parquet, which YAML takes for an alias
        return text
    return _number_or(value)


def _explain(section, error):
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{place}: {error['msg']}" if place else error["msg"]
    for part in error["loc"][:-1]:
        section = _section_of(section, part)
    return f"unknown key {place}{_nearest(error['loc'][-1], set(section.model_fields))}"


def _section_of(section, part):
    if isinstance(part, int):
        return section
    annotation = section.model_fields[part].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))


def _nearest(key, known):
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(sorted(known)[:20])})"


def _resolve_paths(recipe, folder):
    """Paths that exist beside the recipe are taken from there."""

    def beside(text):
        if text in (*ALIASES, EASY_VQA):  # recipes/smollm2-135m is no LLM
            return text
        return str((folder / text).resolve()) if text and len(text) < 200 and (folder / text).exists() else text

    def pattern_beside(text):
        there, here = str(folder.resolve() / text), str(Path(text).resolve())
        return here if glob(here, recursive=True) and not glob(there, recursive=True) else there

    named = [(recipe.model, "llm"), (recipe.model, "vora"), (recipe.model, "encoder"), (recipe.teacher, "name")]
    for section, key in named:
        if section is not None:
            setattr(section, key, beside(getattr(section, key)))
    if recipe.data.folder is not None:
        recipe.data.folder = str(Path(beside(recipe.data.folder)).resolve())  # evaluations start there too
    for entry in recipe.data.sources:
        if recipe.data.folder is not None:
            entry.path = str(Path(recipe.data.folder, entry.path))
        is_pattern = any(mark in entry.path for mark in "*?[")
        entry.path = pattern_beside(entry.path) if is_pattern else beside(entry.path)
        entry.image_folder = beside(entry.image_folder)
    for entry in recipe.sample_generations:
        entry.image = beside(entry.image)
    template = recipe.model.chat_template
    if template and "\n" not in template and "{" not in template:
        recipe.model.chat_template = _read_template(folder / template)


def _read_template(path):
    if not path.exists():
        raise ValueError(f"model.chat_template {path} does not exist: give a path beside the recipe, or Jinja text.")
    return path.read_text()
