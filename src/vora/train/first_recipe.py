"""`vora init`: a recipe for the LLM, the data and the machine at hand, which says why each number is what it is."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from vora.build.base_llm import ALIASES
from vora.build.hub import hub_problem, may_be_hub_id
from vora.build.vit_init import vit_embedding
from vora.data.columns import RowOptions
from vora.data.images import REMOTE
from vora.data.readers import EASY_VQA, load_source
from vora.data.schema import Sample
from vora.data.source import Source
from vora.model.attention import longest_sequence
from vora.train.packaged import find_recipe
from vora.train.plan.meta_model import llm_config_of, vit_config_of
from vora.train.recipe import load_recipe
from vora.train.recipe_sections import NEAR_LENGTH
from vora.train.throughput import precision_overrides

LORA_SHARE = 0.396  # of the adapted weights, as the paper's rank of 1024 in a 7B model
TEACHERS = (  # up to so many parameters of the LLM
    (3e8, "facebook/dinov2-small"), (3e9, "facebook/dinov2-base"), (math.inf, "apple/aimv2-large-patch14-448"),
)  # fmt: skip
RATES = (  # of LLMs up to so many parameters: of all, and of LoRA's B, and where they come from
    (1e9, "1.0e-3", "4.0e-3", "as SmolLM2-135M learned best; the paper's 2e-4 is of a 7B model"),
    (math.inf, "2.0e-4", "2.0e-4", "the paper's"),
)  # fmt: skip
ROWS_SEEN, SEQUENCES_PER_STEP, MOST_IMAGE_TOKENS = 64, 8, 256
LENGTHS = (512, 1024, 2048, 4096)
CHARACTERS_PER_TOKEN = 4
NUM_MARKER_TOKENS = 14  # of the texts around an image, for SmolLM2
MARKERS = (
    "image_markers: [<start_of_image>, <end_of_image>]  # llama.cpp writes them around images: it answers as here"
)
NO_MARKERS = "# no image_markers: llama.cpp has no norm of patches, which students of this teacher have (patch_norm)"


@dataclass
class Found:
    """What the first rows of a source hold, and what it has to be called."""

    path: str
    num_rows: int
    columns: dict[str, str]  # our names: the file's
    image_folder: str | None  # where paths of images start, if not beside the file
    pixels: list[tuple[int, int]]  # width and height of images
    has_images: bool
    text_tokens: list[float]  # of each sample, by its characters


def write_recipe(
    path: Path, llm: str, data: Sequence[str], teacher: str | None, epochs: float,
    columns: Mapping[str, str] | None = None, image_folder: str | None = None,
) -> list[str]:  # fmt: skip
    """Write a recipe of stage pretrain and return what it was made from, in lines. A ValueError where the file is
    there already, the LLM or the teacher is not known, no teacher is named and the one of fitting size cannot be had,
    or data cannot be used."""
    if path.exists():
        raise ValueError(f"{path} is there already: choose another NAME, so that nothing is overwritten.")
    found = [look_at(one, columns, image_folder) for one in data]
    config = llm_config_of(llm, "--llm")
    num_parameters, rank = size_of(config)
    if teacher is None:
        teacher = next(name for most, name in TEACHERS if num_parameters <= most)
        if cause := hub_problem(teacher):
            raise ValueError(
                f"No --teacher was given, and {teacher}, which fits, cannot be had: {cause}. Give --teacher a folder "
                "of a plain ViT, or that name if it will be there where the recipe runs."
            )
    depth, vit = config.get_text_config().num_hidden_layers, vit_config_of(teacher, "--teacher")
    with torch.device("meta"):
        runs_in_llama_cpp = vit_embedding(AutoModel.from_config(vit)).norm is None
    context = longest_sequence(config)
    values = sizes_of(found, vit.patch_size, context, NUM_MARKER_TOKENS if runs_in_llama_cpp else 0)
    precision, is_auto = precision_overrides(), bool(found) and values["sequence_length"] == NEAR_LENGTH
    steps, passes = steps_of(found, values, epochs)
    why_steps = f"some {passes:.3g} times through the data" if found else "say how many"
    rate, rate_of_b, why_rate = next(found for most, *found in RATES if num_parameters <= most)
    text = TEMPLATE.format(
        rate=rate, rate_of_b=rate_of_b, why_rate=why_rate,
        name=path.name, llm=in_yaml(llm), teacher=in_yaml(teacher), rank=rank, size=f"{num_parameters / 1e6:,.0f}",
        num_blocks=min(depth, vit.num_hidden_layers), depth=depth, teacher_depth=vit.num_hidden_layers,
        spread="\n  spread: true  # the teacher is deeper than the LLM"
        if vit.num_hidden_layers > depth else "",
        markers=MARKERS if runs_in_llama_cpp else NO_MARKERS, sources=sources_text(found), steps=steps,
        distill_only=steps // 5, warmup=min(100, steps // 20) if steps >= 40 else 0,
        save=max(1, steps // 5), why_steps=why_steps,
        dtype=precision["model.dtype"], bf16=json.dumps(precision["training.bf16"]),
        use_cpu=json.dumps(not torch.cuda.is_available()),
        machine=torch.cuda.get_device_name() if torch.cuda.is_available() else "a processor, no GPU",
        length="auto" if is_auto else values["sequence_length"],
        why_length=f"; auto: near {NEAR_LENGTH:,}, what the data fills best" if is_auto else "",
        accumulation=SEQUENCES_PER_STEP // values["batch"], **values,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(aligned(text), encoding="utf-8")
    load_recipe(find_recipe(path))
    lines = [
        f"{llm}: {num_parameters / 1e6:,.0f} M parameters, {depth} blocks; taught by {teacher}",
        f"this machine: {'a GPU' if torch.cuda.is_available() else 'no GPU'}, so {precision['model.dtype']}",
        *(f"{name} cannot be had here: {cause}" for name in (llm, teacher) if (cause := lacking(name))),
        *(described(one) for one in found),
    ]
    if not found:
        return [*lines, "no --data was given: put your file in data.sources"]
    if passes > epochs:
        lines.append(f"{steps} steps are the fewest of a recipe: {passes:.3g} times through the data, not {epochs:g}")
    if not any(one.has_images for one in found):
        lines.append("Warning: none of the first rows has an image, so that this recipe teaches nothing to see")
    return lines


def lacking(name: str) -> str | None:
    """Why the weights of a model are not to be had, whose configuration is known; None where they are."""
    is_place = name in ALIASES or Path(name).exists() or not may_be_hub_id(name)
    return None if is_place else hub_problem(name)


def size_of(config: PretrainedConfig) -> tuple[int, int]:
    """(Parameters of an LLM, the rank at which LoRA in a block's linear layers has `LORA_SHARE` of their weights)."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    head, weights, sides = llm.get_output_embeddings(), 0, 0
    for module in llm.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            weights, sides = weights + module.weight.numel(), sides + sum(module.weight.shape)
    return sum(p.numel() for p in llm.parameters()), max(1, round(LORA_SHARE * weights / sides))


def look_at(path: str, columns: Mapping[str, str] | None = None, image_folder: str | None = None) -> Found:
    """Read the first rows of what a user names, with columns {our name: the file's} or likely ones, and images from
    `image_folder` or where they are likely. A ValueError where they fit no layout, or none of the images can be read.
    """
    source = load_source(path, options=RowOptions(columns=columns or {}), image_folder=image_folder)
    samples = [sample for index in range(min(ROWS_SEEN, len(source))) if (sample := _sample(source, index))]
    images = [image for sample in samples[:16] for image in _images(sample)]
    named = [image for sample in samples[:16] for image in sample.images if isinstance(image, str)]
    if named and not images and not named[0].startswith(REMOTE):
        raise ValueError(
            f"{path}: none of the first {len(named)} images can be read, such as {named[0]}: say where their paths "
            "start with --image-folder, or which column names them with --column image=..."
        )
    texts = [sum(len(str(turn["content"])) for turn in sum(sample.conversations, [])) for sample in samples]
    return Found(
        path,
        len(source),
        {**source.guessed, **(columns or {})},
        image_folder or source.guessed_folder,
        images,
        any(sample.images for sample in samples),
        [length / CHARACTERS_PER_TOKEN + 16 for length in texts],
    )


def sizes_of(
    found: Sequence[Found], patch_size: int, context: int | None, num_marker_tokens: int = NUM_MARKER_TOKENS
) -> dict[str, int]:
    """Tokens of an image, of a sequence, and sequences at once, of images, texts around them and texts as they are."""
    grids = sorted(
        math.ceil(width / patch_size) * math.ceil(height / patch_size) for one in found for width, height in one.pixels
    )
    patches = grids[int(0.9 * (len(grids) - 1))] if grids else MOST_IMAGE_TOKENS
    patch_merge = 2 if patches > 2 * MOST_IMAGE_TOKENS else 1
    image_tokens = min(MOST_IMAGE_TOKENS, max(16, math.ceil(patches / patch_merge**2)))
    texts = sorted(length for one in found for length in one.text_tokens)
    longest = image_tokens + num_marker_tokens + (texts[-1] if texts else 200)
    mean = image_tokens + num_marker_tokens + (sum(texts) / len(texts) if texts else 100)
    length = next((one for one in LENGTHS if one >= max(1.1 * longest, 3 * mean)), LENGTHS[-1])
    return {
        "patch_merge": patch_merge, "max_image_tokens": image_tokens, "mean_tokens": round(mean),
        "sequence_length": min(length, context or length), "batch": 4 if length <= 1024 else 2,
    }  # fmt: skip


def steps_of(found: Sequence[Found], values: dict[str, int], epochs: float) -> tuple[int, float]:
    """(Optimizer steps for so many passes over the data, at least 20, or 2,000 where there is none yet; the passes
    that these make)."""
    num_tokens = sum(one.num_rows for one in found) * values["mean_tokens"]
    steps_of_pass = num_tokens / (SEQUENCES_PER_STEP * values["sequence_length"])
    if not found:
        return 2000, epochs
    steps = max(20, math.ceil(epochs * steps_of_pass))
    return steps, max(epochs, (steps - 1) / steps_of_pass)


def sources_text(found: Sequence[Found]) -> str:
    """The recipe's list of sources."""
    lines = []
    for one in found:
        lines.append(f"    - path: {in_yaml(one.path)}  # {one.num_rows:,} rows")
        if one.columns:
            columns = ", ".join(f"{ours}: {in_yaml(theirs)}" for ours, theirs in one.columns.items())
            lines.append(f"      columns: {{{columns}}}  # ours: theirs")
        if one.image_folder:
            lines.append(f"      image_folder: {in_yaml(one.image_folder)}")
    return "\n".join(lines or ["    - path: train.jsonl  # YOURS: lines of image, question and answer, or caption"])


def in_yaml(text: str) -> str:
    """A text as YAML has it; a path that exists is whole, wherever the recipe lies."""
    is_path = text not in (*ALIASES, EASY_VQA) and Path(text).exists()
    return yaml.safe_dump(str(Path(text).resolve()) if is_path else text, width=1000).splitlines()[0]


def aligned(text: str) -> str:
    """YAML with the comments behind values under each other."""
    lines = []
    for line in text.splitlines():
        parts = re.match(r"(\s*[^#\s].*?)\s+# (.*)", line)
        lines.append(f"{parts[1]:<34} # {parts[2]}" if parts else line)
    return "\n".join(lines) + "\n"


def described(found: Found) -> str:
    """What was seen of a source."""
    names = ", ".join(f"{theirs} as {ours}" for ours, theirs in found.columns.items())
    images = "images, of which none was opened" if found.has_images else "no images"
    images = f"{max(found.pixels)[0]} pixels wide at most" if found.pixels else images
    return f"{found.path}: {found.num_rows:,} rows, {images}" + (f"; column {names}" if names else "")


def _sample(source: Source, index: int) -> Sample | None:
    try:
        return source[index]
    except ValueError:  # a bad one: `vora data` names them
        return None


def _images(sample: Sample) -> list[tuple[int, int]]:
    try:
        opened: list[Any] = sample.open_images()
    except ValueError:
        return []
    return [image.size for one in opened for image in (one if isinstance(one, list) else [one])]


TEMPLATE = """\
# Stage 1: {llm} learns to see. Written by `vora init`; every number may be changed.
#   vora data {name}                  what is in the data, what is bad, how it looks
#   vora train {name} --dry-run       what trains, for how long, and two samples
#   vora train {name} --out runs/stage1
#   vora merge runs/stage1 -o my-vora
# All keys: `vora train {name} KEY=VALUE`; a misspelt one is an error that names the right one.
stage: pretrain
model:
  llm: {llm}  # {size} M parameters; alias, hub id, folder, or folder with a GGUF file
  {markers}
  patch_merge: {patch_merge}  # m: m x m patches become one image token
  max_image_tokens: {max_image_tokens}  # larger images shrink; with more, raise data.sequence_length too
  dtype: {dtype}  # of the weights that do not train
teacher:
  name: {teacher}  # any plain ViT; {teacher_depth} blocks{spread}
  standardize: true
  distill_only_steps: {distill_only}  # first steps, on images alone: a fifth of all
lora:
  rank: {rank}  # 39.6 % of the adapted weights, as the paper's 1024 of a 7B model
  num_blocks: {num_blocks}  # of {depth}: as deep as the teacher
  # text_kl_weight: 1              # keeps the LLM's text ability; add a source of text
data:
  sources:
{sources}
  sequence_length: {length}  # some {mean_tokens} tokens a sample; several share a sequence{why_length}
learning_rates:
  lora_b: {rate_of_b}  # of LoRA's B, which starts at zero
training:
  max_steps: {steps}  # {why_steps}
  per_device_train_batch_size: {batch}  # less where memory is short, with more accumulation
  gradient_accumulation_steps: {accumulation}  # a step learns from {batch} x {accumulation} sequences in each process
  learning_rate: {rate}  # {why_rate}
  lr_scheduler_type: constant_with_warmup
  warmup_steps: {warmup}
  save_steps: {save}
  bf16: {bf16}
  use_cpu: {use_cpu}  # this machine: {machine}
"""
