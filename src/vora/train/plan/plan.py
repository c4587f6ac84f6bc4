"""`vora plan`: what a recipe's run will need, before anything is fetched, rented or started."""

import math
from glob import glob
from pathlib import Path
from typing import Any, TypedDict

from vora.data.stats import dataset_statistics
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher
from vora.model.configuration_vora import VoraConfig
from vora.train.checks import check_recipe
from vora.train.from_recipe import DEFAULTS, open_sources, packed_sequences, training_arguments
from vora.train.plan.device import Device
from vora.train.plan.flops import Row, sequence_flops
from vora.train.plan.memory import bytes_of, held_by_process, optimizer_bytes, step_memory
from vora.train.plan.meta_model import meta_model
from vora.train.preview import source_names
from vora.train.recipe_sections import Recipe
from vora.train.stages import build_processor
from vora.train.trainable import trainable_counts

IMAGES_PER_SECOND = 150  # that one process decodes and cuts into patches (benchmarks/data.py)
LINK_BETWEEN_MACHINES = 50e9  # bytes per second and GPU: one 400 Gb/s adapter each
GPUS_PER_MACHINE = 8
UTILIZATION = 0.4
ROWS_FILLED = 0.98  # by samples of many lengths (dev/LOG.md)


class TokenCounts(TypedDict):
    """Mean tokens of the recipe's data; `num_images`, `num_labels` and `samples_per_row` are of a packed sequence."""

    counted_in: str  # "data", or "budget" where the data is not here
    per_sample: float
    samples_per_row: float
    num_images: float
    tokens_per_image: float
    num_labels: float


class Plan(TypedDict):
    """What a run needs: sizes in bytes, counts of FLOPs, times in seconds; it goes into JSON as it is."""

    stage: str
    device: str
    num_devices: int
    utilization: float
    parameters: dict[str, Any]
    tokens: TokenCounts
    flops_per_sample: dict[str, float]
    memory_bytes: dict[str, float]
    device_memory_bytes: float
    fits: bool
    disk_bytes: dict[str, float]
    rows_per_step: int
    samples_per_step: float
    steps: int
    samples: float
    seconds_per_step: dict[str, float]
    samples_per_second: float
    hours: float
    device_hours: float
    bottleneck: str
    remarks: list[str]


def plan(
    recipe: Recipe,
    device: Device,
    num_devices: int = 1,
    *,
    beside: str | Path | None = None,
    utilization: float = UTILIZATION,
    num_text_tokens: int = 150,
    num_labels: int = 100,
    max_samples: int = 200,
) -> Plan:
    """What a run of a recipe needs.

    Args:
        device: of `vora.train.plan.device.GPUS`, or `device_at_hand()`.
        beside: the recipe's folder, see `meta_model`.
        utilization: the share of the device's peak that training reaches: an assumption, and the answer's largest
            uncertainty. Recomputed blocks count as work.
        num_text_tokens, num_labels: text tokens of a sample, and those of them that are learned, where the data is not
            here to be counted.
        max_samples: rows of each source that are read to count tokens.

    Raises:
        ValueError: see `check_recipe`, `meta_model` and `training_arguments`.
    """
    check_recipe(recipe)
    objective, remarks = meta_model(recipe, beside)
    settings = step_settings(recipe)
    tokens = tokens_of_data(recipe, max_samples, remarks)
    if tokens is None:
        tokens = tokens_of_budget(recipe, objective.config, num_text_tokens, num_labels, remarks)
    rows_per_device = settings["per_device_train_batch_size"]
    rows_per_step = rows_per_device * settings["gradient_accumulation_steps"] * num_devices
    row = Row(recipe.data.sequence_length, tokens["num_images"], tokens["tokens_per_image"], tokens["num_labels"])
    if device.name == "cpu" and recipe.model.attn_implementation == "sdpa":
        row.num_segments = max(1.0, tokens["samples_per_row"])  # see `vora.train.run.prepare`
    depth = len(objective.vora.model.blocks)
    num_recomputed = depth if recipe.recomputed_blocks is True else int(recipe.recomputed_blocks)
    flops = sequence_flops(objective, row, num_recomputed, rows_per_device)
    memory = step_memory(
        objective,
        row,
        rows_per_device,
        bf16=settings["bf16"],
        num_recomputed=num_recomputed,
        accumulates=settings["gradient_accumulation_steps"] > 1,
        optim=settings["optim"],
        num_shards=num_devices if settings["fsdp"] else 1,
        num_processes=num_devices,
    )
    if device.name == "cpu":
        memory |= held_by_process(memory, num_recomputed / depth)
        remarks.append(
            "with MALLOC_MMAP_THRESHOLD_=131072 in the environment the heap keeps nothing, but steps take longer"
        )
    steps = settings["max_steps"]
    num_distill_only = min(recipe.distill_only_steps, steps)
    times = step_seconds(flops["total"] * rows_per_step, tokens, settings, device, num_devices, utilization, objective)
    seconds = max(times.values())
    total = (steps - num_distill_only) * seconds
    if num_distill_only:
        share = distill_only_flops(objective, row, num_recomputed) / flops["total"]
        total += num_distill_only * max((times | {"compute": share * times["compute"]}).values())
        remarks.append(f"the first {num_distill_only:,} steps only distill, at {share:.0%} of a step's FLOPs")
    if recipe.lora.text_kl_weight:
        remarks.append("rows of text to keep run twice and need logits at every token; neither is counted here")
    samples_per_step = rows_per_step * tokens["samples_per_row"]
    fits = memory["total"] <= 0.95 * device.memory_bytes
    return {
        "stage": recipe.stage,
        "device": device.name,
        "num_devices": num_devices,
        "utilization": utilization,
        "parameters": parameter_counts(objective),
        "tokens": tokens,
        "flops_per_sample": {part: value / tokens["samples_per_row"] for part, value in flops.items()},
        "memory_bytes": memory,
        "device_memory_bytes": device.memory_bytes,
        "fits": fits,
        "disk_bytes": disk_bytes(objective, settings, recipe),
        "rows_per_step": rows_per_step,
        "samples_per_step": samples_per_step,
        "steps": steps,
        "samples": steps * samples_per_step,
        "seconds_per_step": times,
        "samples_per_second": samples_per_step / seconds,
        "hours": total / 3600,
        "device_hours": num_devices * total / 3600,
        "bottleneck": max(times, key=lambda name: times[name]) if fits else "memory",
        "remarks": remarks,
    }


def step_settings(recipe: Recipe) -> dict[str, Any]:
    """What of TrainingArguments decides on a step's cost, with our defaults and the Trainer's."""
    given = DEFAULTS | recipe.training
    training_arguments(
        recipe.model_copy(update={"training": {**given, "use_cpu": True, "bf16": False, "fsdp": None}}), "."
    )
    return {
        "max_steps": given["max_steps"],
        "per_device_train_batch_size": given["per_device_train_batch_size"],
        "gradient_accumulation_steps": given.get("gradient_accumulation_steps", 1),
        "bf16": bool(given.get("bf16", False)),
        "optim": str(given.get("optim", "adamw_torch")),
        "fsdp": given.get("fsdp"),
        "save_total_limit": given.get("save_total_limit"),
        "save_steps": given["save_steps"],
        "dataloader_num_workers": given.get("dataloader_num_workers", 0),
    }


def tokens_of_data(recipe: Recipe, max_samples: int, remarks: list[str]) -> TokenCounts | None:
    """Tokens of the recipe's samples, counted in its data; None where it is not on this machine."""
    if not all(Path(source.path).exists() or glob(source.path, recursive=True) for source in recipe.data.sources):
        return None
    recipe = recipe.model_copy(deep=True)
    for source in recipe.data.sources:
        source.max_samples = min(max_samples, source.max_samples or max_samples)
    recipe.training = {"max_steps": 1, "use_cpu": True}
    try:
        teacher = None if recipe.teacher is None else Teacher.from_pretrained(recipe.teacher.name)
        sources = open_sources(recipe.data)
        rows = packed_sequences(recipe, sources, build_processor(recipe, teacher), training_arguments(recipe, "."))
        summary, _ = dataset_statistics(rows, source_names(recipe.data))
    except (ValueError, OSError) as error:
        remarks.append(f"the data could not be read ({' '.join(str(error).split())[:200]})")
        return None
    if not summary["num_samples"]:
        remarks.append(f"all of the first {max_samples} samples of each source are bad")
        return None
    used = [source for source in summary["sources"] if source["num_samples"]]

    def mean(name: str) -> float:
        """Over the samples of the mixture, in which sources have their weights."""
        return sum(source["share_of_samples"] * source[name] for source in used)

    per_sample, images = mean("mean_tokens"), mean("mean_images")
    num_samples, filled = summary["num_samples"], summary["packing_efficiency"] * recipe.data.sequence_length
    per_row = filled / per_sample
    remarks.append(f"tokens were counted in the first {num_samples:,} samples of the data")
    return {
        "counted_in": "data",
        "per_sample": per_sample,
        "samples_per_row": per_row,
        "num_images": per_row * images,
        "tokens_per_image": mean("mean_image_tokens") / images if images else 0.0,
        "num_labels": per_row * mean("mean_labels"),
    }


def tokens_of_budget(
    recipe: Recipe, config: VoraConfig, num_text_tokens: int, num_labels: int, remarks: list[str]
) -> TokenCounts:
    """Tokens of a sample with one image of the largest size, or of the mean of a drawn budget."""
    budget = recipe.data.image_tokens
    side = config.image_size // (config.patch_size * config.patch_merge)
    per_image = sum(budget) / 2 if budget else recipe.model.max_image_tokens or side**2
    per_image = 0 if recipe.data.text_only else per_image
    per_row = max(1.0, ROWS_FILLED * recipe.data.sequence_length / (per_image + num_text_tokens))
    if per_image + num_text_tokens > recipe.data.sequence_length:
        remarks.append(
            f"a sample of {per_image + num_text_tokens:,.0f} tokens does not fit a sequence of "
            f"{recipe.data.sequence_length:,} and is skipped: raise data.sequence_length, or lower "
            "model.max_image_tokens"
        )
    remarks.append(
        f"the data is not here: taken as one image of {per_image:,.0f} tokens and {num_text_tokens} of text in every "
        f"sample, {num_labels} of them learned"
    )
    return {
        "counted_in": "budget",
        "per_sample": per_image + num_text_tokens,
        "samples_per_row": per_row,
        "num_images": 0 if recipe.data.text_only else per_row,
        "tokens_per_image": per_image,
        "num_labels": per_row * num_labels,
    }


def parameter_counts(objective: Objective) -> dict[str, Any]:
    """Parameters by part, those that train, and those that a finished run saves."""
    counts = trainable_counts(objective)
    counts.pop("frozen copy of the patch embedding", None)
    teacher = 0 if objective.teacher is None else sum(p.numel() for p in objective.teacher.parameters())
    lora_blocks = {name.split(".layers.")[1].split(".")[0] for name, _ in objective.named_parameters()
                   if "lora_" in name and ".layers." in name}  # fmt: skip
    trained = sum(trained for trained, _ in counts.values())
    return {
        "frozen": sum(total for _, total in counts.values()) - trained + teacher,
        "trained": trained,
        "saved": trained,
        "blocks_with_lora": len(lora_blocks),
        "parts": {part: total for part, (_, total) in counts.items()} | ({"teacher": teacher} if teacher else {}),
    }


def distill_only_flops(objective: Objective, row: Row, num_recomputed: int) -> float:
    """FLOPs of a row in the first steps, which only distill."""
    num_images = row.num_tokens // max(row.tokens_per_image, 1)
    segments = max(1.0, num_images if row.num_segments > 1 else 1.0)
    images_alone = Row(row.num_tokens, num_images, row.tokens_per_image, 0, segments)
    return sequence_flops(objective, images_alone, num_recomputed)["total"]


def step_seconds(
    flops: float,
    tokens: TokenCounts,
    settings: dict[str, Any],
    device: Device,
    num_devices: int,
    utilization: float,
    objective: Objective,
) -> dict[str, float]:
    """Seconds of a step by what could bound it: compute, gradients sent around, images read."""
    compute = flops / (num_devices * device.flops * utilization)
    trained = sum(bytes_of(p) for p in objective.parameters() if p.requires_grad)
    link = device.link if num_devices <= GPUS_PER_MACHINE else LINK_BETWEEN_MACHINES
    sent = 2 * (num_devices - 1) / num_devices * trained
    if settings["fsdp"]:
        sent *= 1.5  # weights are gathered twice and gradients scattered once
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    readers = max(1, settings["dataloader_num_workers"])
    return {
        "compute": compute,
        "communication": sent / link,
        "data": rows * tokens["num_images"] / (readers * IMAGES_PER_SECOND),
    }


def disk_bytes(objective: Objective, settings: dict[str, Any], recipe: Recipe) -> dict[str, float]:
    """What the run leaves on disk, by part; the data is not counted."""
    trained = sum(bytes_of(p) for p in objective.parameters() if p.requires_grad)
    weights = sum(bytes_of(p) for p in objective.vora.parameters())
    lora = sum(bytes_of(p) for name, p in objective.named_parameters() if "lora_" in name)
    every, steps = settings["save_steps"], settings["max_steps"]
    every = max(1, math.ceil(every * steps) if every < 1 else every)  # below 1 it is a share of the steps
    kept = min(settings["save_total_limit"] or math.inf, max(1, steps // every))
    parts = {
        "checkpoints": kept * (trained + optimizer_bytes(objective, settings["optim"])),
        "final": trained,
        "merged model": weights - lora if recipe.stage == "pretrain" else 0,
        "teacher": 0 if objective.teacher is None else 4 * sum(p.numel() for p in objective.teacher.parameters()),
        "base LLM": sum(bytes_of(p) for name, p in objective.named_parameters() if "lora_" not in name),
    }
    return parts | {"total": sum(parts.values())}
