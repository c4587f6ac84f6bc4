"""The sections of a recipe and what each key means; the reference in the docs is generated from here."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vora.data.prompts import DEFAULT_PROMPTS, Prompts
from vora.train.training_values import known_fields, nearest, wrong_value

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # transformers' old and its new name
NEAR_LENGTH, AUTO_LENGTH = 1024, 0  # of packed sequences; the second stands for what the data fills best
BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}  # texts that YAML 1.1 takes for booleans


class Section(BaseModel):
    """Keys of a recipe; one that is not known is an error."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelSection(Section):
    """Which LLM learns to see (`llm`), or which VoRA model goes on training (`vora`)."""

    llm: str | None = Field(None, description="The LLM to begin with: an alias, hub id, folder, or folder with GGUF.")
    vora: str | None = Field(None, description="The VoRA model to go on with: a run, a folder or a hub id.")
    encoder: str | None = Field(None, description="LLaVA's way, as a baseline: a frozen ViT behind a projector.")
    patch_size: int | None = Field(None, description="Side of a patch in pixels; default: the teacher's.")
    image_size: int | None = Field(None, description="Side in pixels of the square of the learned positions.")
    axial_positions: bool = Field(
        False, description="Positions are a row's plus a column's, as llama.cpp needs for images of any size."
    )
    patch_merge: int = Field(1, ge=1, description="m: m x m neighbouring patches become one image token.")
    min_image_tokens: int | None = Field(None, ge=1, description="Fewest tokens of an image; smaller ones grow.")
    max_image_tokens: int | None = Field(None, ge=1, description="Most tokens of an image; larger ones shrink.")
    pad_to_square: bool | None = Field(None, description="Lay images on a black square, as the paper's code does.")
    image_attention: Literal["bidirectional", "causal"] = Field(
        "bidirectional", description="Whether the tokens of an image see all of it, or only those before."
    )
    chat_template: str | None = Field(None, description="Jinja text, or a path beside the recipe; default: the LLM's.")
    image_markers: tuple[str, str] | None = Field(
        None, description="Texts before and after each image, such as those that llama.cpp puts there."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the weights that do not train."
    )
    attn_implementation: Literal["sdpa", "eager", "flex_attention"] | None = Field(
        None, description="How attention is computed; default: as transformers does, by sdpa where the LLM can."
    )

    @field_validator("image_markers")
    @classmethod
    def can_stand_in_templates(cls, markers: tuple[str, str] | None) -> tuple[str, str] | None:
        if any("'" in marker or "\\" in marker or not marker.strip() for marker in markers or ()):
            raise ValueError("give two texts without quotes and backslashes: they stand in the chat template")
        return markers

    @model_validator(mode="after")
    def one_source(self) -> "ModelSection":
        if (self.llm is None) == (self.vora is None):
            raise ValueError("give exactly one of llm (a fresh start) and vora (a model that has vision)")
        if self.encoder is None:
            return self
        if self.vora is not None:
            raise ValueError(
                "encoder makes a fresh start from an llm, and model.vora has vision: leave one of them out"
            )
        if self.axial_positions:
            raise ValueError("an encoder has positions of its own: leave axial_positions out")
        if "image_attention" not in self.model_fields_set:
            self.image_attention = "causal"
        if self.image_attention != "causal":
            raise ValueError("with an encoder the LLM reads images causally, as LLaVA's: leave image_attention out")
        return self


class LoraSection(Section):
    """The vision LoRA, in stage pretrain."""

    rank: int = Field(32, ge=1, description="Rank of each pair of matrices; there is no alpha.")
    num_blocks: int | None = Field(None, ge=1, description="Number of first blocks with LoRA; default: the teacher's.")
    target_modules: list[str] | None = Field(None, description="Linear layers that get LoRA, by name; default: all.")
    text_kl_weight: float = Field(0.0, ge=0, description="Weight of the KL divergence from the LLM, on text alone.")


class TeacherSection(Section):
    """The ViT that teaches the LLM's blocks, in stage pretrain."""

    name: str = Field(description="A plain ViT, by folder or hub id.")
    weight: float = Field(1.0, ge=0, description="Weight of the distillation; 0 if it only gives the first weights.")
    pairs: Literal["all", "last"] = Field("all", description="Distill each pair of blocks, or the deepest alone.")
    center: bool = Field(True, description="Subtract the running mean of the teacher's features.")
    standardize: bool = Field(False, description="Divide them by their running deviation too.")
    summary: bool = Field(False, description="Have the last paired block imitate the teacher's CLS token as well.")
    spread: bool = Field(False, description="Space the pairs over the deeper of both, not block i with block i.")
    pairing: Literal["outputs", "inputs", "hidden_states"] = Field(
        "outputs",
        description="Which states are paired: outputs of blocks, or as the paper's code with AIMv2 (inputs) and with "
        "teachers of transformers (hidden_states).",
    )
    distill_only_steps: int = Field(0, ge=0, description="First steps, on images alone, that only distill.")
    vision_lr_scale: float = Field(
        1.0, ge=0, description="Factor on vision's learning rates after those steps; 0 without such steps freezes it."
    )
    init_from_teacher: bool = Field(True, description="The patch embedding starts as the teacher's.")

    @model_validator(mode="after")
    def frozen_vision_is_known(self) -> "TeacherSection":
        if self.weight == 0 and self.vision_lr_scale == 0:
            raise ValueError(
                "with weight 0 nothing is distilled, so vision_lr_scale 0 cannot say what is frozen: keep one"
            )
        return self


class LearningRates(Section):
    """Where they differ from `training.learning_rate`. LoRA+ (arXiv 2402.12354): B learns faster than A."""

    lora_b: float | None = Field(None, gt=0, description="Of LoRA's matrices B.")
    patch_embedding: float | None = Field(None, gt=0, description="Of the patch embedding, or of the projector.")
    heads: float | None = Field(None, gt=0, description="Of the distillation heads.")


class AugmentSection(Section):
    """How images are changed each time that they are drawn; see `vora.data.augment.augmented`."""

    crop: float = Field(1.0, gt=0, le=1, description="Least share of the area that a random crop keeps; 1: no crop.")
    flip: bool = Field(False, description="Mirror half of the images.")
    colour: float = Field(0.0, ge=0, lt=1, description="Largest change of brightness, contrast and saturation.")


class SourceSection(Section):
    """Where samples come from; see `vora.data.readers.load_source` for what a path may be."""

    path: str = Field(description="A file, a pattern of files, a folder, or a hub id; alone it is a whole source.")
    split: str = Field("train", description="Of a dataset that has several.")
    subset: str | None = Field(None, description="Of a dataset on the Hub: its configuration.")
    weight: float | None = Field(None, gt=0, description="Share of all samples beside the others'; default: its rows.")
    image_folder: str | None = Field(None, description="Where paths of images start; default: beside the file.")
    columns: dict[str, str] | None = Field(None, description="Our names of columns and the file's: {question: query}.")
    max_samples: int | None = Field(None, ge=1, description="Read only so many rows, the first.")
    augment: AugmentSection | None = Field(None, description="How its images are changed.")

    @model_validator(mode="before")
    @classmethod
    def path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class ValidationSection(Section):
    """What a run is measured on while it trains, and never trains on."""

    share: float | None = Field(None, gt=0, lt=1, description="Hold so many of the images out, with all their rows.")
    seed: int = Field(0, description="Which are held out; the same in all runs, whatever training.seed is.")
    sources: list[SourceSection] = Field([], description="Or samples of their own, from these.")
    max_samples: int = Field(1000, ge=1, description="Measure at most so many, drawn by the seed.")
    probe_samples: int = Field(
        0,
        ge=0,
        description="Of so many with images: how often the right image makes the answer likelier than another.",
    )

    @model_validator(mode="after")
    def one_way(self) -> "ValidationSection":
        if (self.share is None) == (not self.sources):
            raise ValueError("give exactly one of share (of the training data) and sources (data of its own)")
        if any(source.weight is not None or source.augment is not None for source in self.sources):
            raise ValueError("its sources are read as they are: leave weight and augment out")
        return self


class DataSection(Section):
    """What is read, and how it is packed."""

    folder: str | None = Field(None, description="Where the sources' paths start; default: beside the recipe.")
    sources: list[SourceSection] = Field(min_length=1, description="Where samples come from.")
    sequence_length: int = Field(
        NEAR_LENGTH,
        description=f"Tokens of a packed sequence; auto: near {NEAR_LENGTH:,}, what the data fills best.",
        json_schema_extra={"type": "int | auto"},
    )
    questions_per_image: int | None = Field(
        None, ge=1, description="Questions of a row drawn each epoch; default: all."
    )
    answer_balance: float = Field(
        0.0, ge=0, le=1, description="From 0, each label token counts alike, to 1, each answer counts alike."
    )
    caption_prompts: list[str] = Field(list(DEFAULT_PROMPTS.caption), description="One is drawn for a caption.")
    label_prompts: list[str] = Field(list(DEFAULT_PROMPTS.label), description="One is drawn for a label.")
    statement_prompts: list[str] = Field(list(DEFAULT_PROMPTS.statement), description="One is drawn for a statement.")
    allow_urls: bool = Field(False, description="Fetch images that rows name by URL; otherwise such rows are bad.")
    text_only: bool = Field(False, description="Leave every image out: the baseline that learns from text alone.")
    image_tokens: tuple[int, int] | None = Field(None, description="[fewest, most]: each image's budget, drawn anew.")
    max_bad_share: float = Field(0.1, ge=0, le=1, description="Stop when more of the samples read are bad.")
    validation: ValidationSection | None = Field(None, description="Measured while it trains; default: nothing.")

    @field_validator("sequence_length", mode="before")
    @classmethod
    def number_or_auto(cls, value: Any) -> Any:
        if isinstance(value, int) and value != AUTO_LENGTH and value < 8:
            raise ValueError(f"{value} tokens hold no sample: give 8 or more, or auto")
        return AUTO_LENGTH if value == "auto" else value

    @model_validator(mode="after")
    def sensible(self) -> "DataSection":
        if len({source.weight is None for source in self.sources}) > 1:
            missing = sum(source.weight is None for source in self.sources)
            raise ValueError(f"{missing} of {len(self.sources)} sources have no weight: give each one, or none")
        if self.image_tokens and not 1 <= self.image_tokens[0] <= self.image_tokens[1]:
            raise ValueError(f"image_tokens {list(self.image_tokens)} is no range: give [fewest, most]")
        if self.text_only and self.validation is not None and self.validation.probe_samples:
            raise ValueError("text_only leaves images out, so validation.probe_samples has none to compare: set 0")
        self.prompts  # it refuses empty lists
        return self

    @property
    def prompts(self) -> Prompts:
        """The three lists as `Prompts`."""
        return Prompts(tuple(self.caption_prompts), tuple(self.label_prompts), tuple(self.statement_prompts))


class SampleGenerationSection(Section):
    """An image and a question that are answered at every checkpoint, to watch the model learn."""

    image: str = Field(description="Path of an image.")
    question: str = Field(description="What is asked about it.")


class Recipe(Section):
    """A whole run."""

    stage: Literal["pretrain", "finetune"] = Field(
        "pretrain", description="pretrain: vision LoRA in a frozen LLM. finetune: all of a merged model."
    )
    model: ModelSection = Field(description="What learns.")
    lora: LoraSection = Field(LoraSection.model_validate({}), description="Its vision LoRA.")
    teacher: TeacherSection | None = Field(None, description="Who teaches it block by block; default: nobody.")
    data: DataSection = Field(description="What it learns from.")
    learning_rates: LearningRates = Field(LearningRates.model_validate({}), description="Learning rates of parts.")
    sample_generations: list[SampleGenerationSection] = Field([], description="What is answered at every checkpoint.")
    max_minutes: float | None = Field(None, gt=0, description="Plan fewer steps than max_steps if they take longer.")
    training: dict[str, Any] = Field({}, description="Fields of transformers.TrainingArguments.")

    @property
    def distill_only_steps(self) -> int:
        return 0 if self.teacher is None else self.teacher.distill_only_steps

    @property
    def init_from_teacher(self) -> bool:
        return self.teacher is not None and self.teacher.init_from_teacher

    @property
    def recomputed_blocks(self) -> bool | int:
        """Which of the LLM's blocks are computed again in the backward pass: True (all), or how many of the first."""
        given = [self.training[key] for key in CHECKPOINTING if self.training.get(key) is not None]
        return given[0] if given else 0

    @model_validator(mode="after")
    def one_source_of_vision(self) -> "Recipe":
        ways = {"teacher": self.teacher, "model.encoder": self.model.encoder, "data.text_only": self.data.text_only}
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} exclude each other: an encoder has no teacher, and with text alone nothing is "
                "seen; keep one"
            )
        if self.data.text_only and self.lora.text_kl_weight:
            raise ValueError(
                "data.text_only leaves text alone, and with lora.text_kl_weight that teaches nothing: keep one"
            )
        return self

    @model_validator(mode="after")
    def known_training_arguments(self) -> "Recipe":
        types = {name: str(kind) for name, kind in known_fields().items()}
        types |= dict.fromkeys(CHECKPOINTING, "bool | int")  # by either name, whichever release is installed
        for key in self.training:
            if key == "output_dir":
                raise ValueError("training.output_dir is --out on the command line: leave it out")
            if key not in types:
                raise ValueError(f"training.{key} is not a field of TrainingArguments{nearest(key, types)}")
        self.training = {key: _as_field(key, types[key], value) for key, value in self.training.items()}
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
        causes = [wrong_value(key, value) for key, value in self.training.items() if key not in CHECKPOINTING]
        if wrong := [cause for cause in causes if cause]:
            raise ValueError("; ".join(wrong))
        return self


def _as_field(key: str, kind: str, value: Any) -> Any:
    """A value of a recipe as a field of TrainingArguments: `yes` is true for a boolean, and 1e4 steps are 10,000."""
    if isinstance(value, dict):
        return {name: _as_field(key, "bool", one) for name, one in value.items()}
    if isinstance(value, str) and ("bool" in kind or key == "fsdp"):
        return BOOLEANS.get(value.lower(), value)
    if isinstance(value, float) and value.is_integer() and "int" in kind and "float" not in kind:
        return int(value)
    return value
