"""`vora plan`: what a recipe's run will need, before anything is fetched, rented or started."""

import math
from glob import glob
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from vora.build.fetch import cache_folder
from vora.data.readers import EASY_VQA
from vora.data.stats import dataset_statistics
from vora.distill.objective import Objective
from vora.model.configuration_vora import VoraConfig
from vora.train.from_recipe import check_recipe, open_sources, training_arguments
from vora.train.plan.device import Device
from vora.train.plan.flops import Row, layer_sizes, sequence_flops
from vora.train.plan.memory import bytes_of, held_by_process, optimizer_bytes, step_memory, trained_parameters
from vora.train.plan.meta_model import meta_model
from vora.train.preview import sequences_to_read, source_names
from vora.train.recipe_sections import NEAR_LENGTH, Recipe
from vora.train.stages import FROZEN_COPY, trainable_counts

IMAGES_PER_SECOND = 150  # that one process decodes and cuts into patches (benchmarks/data.py)
LINK_BETWEEN_MACHINES = 50e9  # bytes per second and GPU: one 400 Gb/s adapter each
GPUS_PER_MACHINE = 8
ROWS_FILLED = 0.98  # by samples of many lengths (dev/LOG.md)
SAMPLES_READ = 200  # of each source, to count tokens


def plan(
    recipe: Recipe, device: Device, num_devices: int = 1, *, beside: str | Path | None = None,
    utilization: float | None = None, num_text_tokens: int = 150, num_labels: int = 100,
) -> dict[str, Any]:  # fmt: skip
    """What a run of a recipe needs: sizes in bytes, counts of FLOPs, times in seconds; it goes into JSON as it is.

    Args:
        beside: the recipe's folder, see `meta_model`.
        utilization: the share of the device's peak that training reaches, recomputed blocks included: an assumption,
            and the answer's largest uncertainty; by default `Device.utilization`.
        num_text_tokens, num_labels: of a sample, and those of them that are learned, where the data is not here.
    """
    utilization = utilization or device.utilization
    check_recipe(recipe)
    recipe = recipe.model_copy(deep=True)  # its `auto` becomes a number
    objective, remarks = meta_model(recipe, beside)
    bf16, is_sharded = bool(recipe.training.get("bf16")), bool(recipe.training.get("fsdp"))
    on_cpu = recipe.training | {"use_cpu": True, "bf16": False, "fsdp": None}  # accepted on this machine
    arguments = training_arguments(recipe.model_copy(update={"training": on_cpu}), ".")
    tokens = tokens_of_data(recipe, remarks) or tokens_of_budget(
        recipe, objective.config, num_text_tokens, num_labels, remarks
    )
    rows_per_device, accumulated = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    rows_per_step = rows_per_device * accumulated * num_devices
    row = Row(recipe.data.sequence_length, tokens["num_images"], tokens["tokens_per_image"], tokens["num_labels"])
    if device.name == "cpu" and recipe.model.attn_implementation in (None, "sdpa"):
        row.num_segments = max(1.0, tokens["samples_per_row"])  # see `vora.train.run.prepare`
    depth = len(objective.vora.model.blocks)
    num_recomputed = depth if recipe.recomputed_blocks is True else int(recipe.recomputed_blocks)
    flops = sequence_flops(objective, row, num_recomputed, rows_per_device)
    memory = step_memory(
        objective, row, rows_per_device, bf16=bf16, num_recomputed=num_recomputed, accumulates=accumulated > 1,
        optim=arguments.optim, num_shards=num_devices if is_sharded else 1, num_processes=num_devices,
    )  # fmt: skip
    if device.name == "cpu":
        memory |= held_by_process(memory, num_recomputed / depth)
        remarks.append(
            "with MALLOC_MMAP_THRESHOLD_=131072 in the environment the heap keeps nothing, but steps take longer"
        )
    sent = 2 * (num_devices - 1) / num_devices * bytes_of(trained_parameters(objective))
    link = device.link if num_devices <= GPUS_PER_MACHINE else LINK_BETWEEN_MACHINES
    readers = max(1, arguments.dataloader_num_workers)
    times = {  # of a step, by what could bound it
        "compute": flops["total"] * rows_per_step / (num_devices * device.flops * utilization),
        # FSDP gathers weights twice and scatters gradients once
        "communication": (1.5 if is_sharded else 1) * sent / link,
        "data": rows_per_device * accumulated * tokens["num_images"] / (readers * IMAGES_PER_SECOND),
    }
    seconds, samples_per_step = max(times.values()), rows_per_step * tokens["samples_per_row"]
    if recipe.training.get("num_train_epochs"):
        arguments.max_steps = steps_of_epochs(recipe, arguments, samples_per_step)
    num_distill_only = min(recipe.distill_only_steps, arguments.max_steps)
    total = (arguments.max_steps - num_distill_only) * seconds
    if num_distill_only:
        num_images = row.num_tokens // max(row.tokens_per_image, 1)
        segments = max(1.0, num_images if row.num_segments > 1 else 1.0)
        images_alone = Row(row.num_tokens, num_images, row.tokens_per_image, 0, segments)
        share = sequence_flops(objective, images_alone, num_recomputed)["total"] / flops["total"]
        total += num_distill_only * max((times | {"compute": share * times["compute"]}).values())
        remarks.append(f"the first {num_distill_only:,} steps only distill, at {share:.0%} of a step's FLOPs")
    if recipe.lora.text_kl_weight:
        remarks.append("rows of text to keep run twice and need logits at every token; neither is counted here")
    if recipe.max_minutes is not None and total > 60 * recipe.max_minutes:
        remarks.append(f"max_minutes ends it: fewer than {arguments.max_steps:,} steps are planned when it starts")
        total = 60 * recipe.max_minutes
    remarks.append(batch_in_words(rows_per_device * accumulated, num_devices))
    fits = memory["total"] <= 0.95 * device.memory_bytes
    return {
        "stage": recipe.stage, "device": device.name, "num_devices": num_devices, "utilization": utilization,
        "parameters": parameter_counts(objective), "tokens": tokens,
        "flops_per_sample": {part: value / tokens["samples_per_row"] for part, value in flops.items()},
        "memory_bytes": memory, "device_memory_bytes": device.memory_bytes, "fits": fits,
        "disk_bytes": disk_bytes(objective, arguments, recipe),
        "rows_per_device": rows_per_device, "accumulated": accumulated, "rows_per_step": rows_per_step,
        "samples_per_step": samples_per_step,
        "steps": arguments.max_steps, "samples": arguments.max_steps * samples_per_step,
        "seconds_per_step": times, "samples_per_second": samples_per_step / seconds,
        "hours": total / 3600, "device_hours": num_devices * total / 3600,
        "bottleneck": max(times, key=lambda name: times[name]) if fits else "memory", "remarks": remarks,
    }  # fmt: skip


def steps_of_epochs(recipe: Recipe, arguments: TrainingArguments, samples_per_step: float) -> int:
    """The steps that a recipe's epochs take, or `max_steps` if these are fewer; a ValueError where neither is known,
    for the data is not here."""
    most, epochs = arguments.max_steps, recipe.training["num_train_epochs"]
    if not data_is_here(recipe):
        if most < 1:
            raise ValueError(f"The data is not here, so {epochs} epochs of it are of no known length: give max_steps.")
        return most
    num_rows = sum(map(len, open_sources(recipe.data)))
    steps = math.ceil(epochs * num_rows / samples_per_step) + recipe.distill_only_steps
    return min(steps, most) if most > 0 else steps


def data_is_here(recipe: Recipe) -> bool:
    """Whether all that a recipe trains on lies on this machine."""
    return all(is_here(source.path) for source in recipe.data.sources)


def batch_in_words(rows_per_device: int, num_devices: int) -> str:
    """The batch of a step, which grows with the number of devices: no recipe says how many there are."""
    rows = rows_per_device * num_devices
    if num_devices == 1:
        return (
            f"in one process a step learns from {rows:,} packed sequences; in N (torchrun, --num-gpus N) from N times "
            "as many, and the run from N times the samples: gradient_accumulation_steps / N keeps the batch, "
            "max_steps / N the samples"
        )
    return (
        f"in {num_devices:,} processes a step learns from {rows:,} packed sequences; in one it would be "
        f"{rows_per_device:,}, and as many steps would see 1/{num_devices} of the samples"
    )


def tokens_of_data(recipe: Recipe, remarks: list[str]) -> dict[str, Any] | None:
    """Mean tokens of the recipe's samples, counted in its data, and what a packed sequence holds of them; None where
    the data is not on this machine."""
    if not data_is_here(recipe):
        return None
    try:
        sequences, _ = sequences_to_read(recipe, SAMPLES_READ)
        recipe.data.sequence_length = sequences.sequence_length
        summary, _ = dataset_statistics(sequences, source_names(recipe.data))
    except (ValueError, OSError) as error:
        remarks.append(f"the data could not be read ({' '.join(str(error).split())[:200]})")
        return None
    if not summary["num_samples"]:
        remarks.append(f"all of the first {SAMPLES_READ} samples of each source are bad")
        return None
    used = [source for source in summary["sources"] if source["num_samples"]]

    def mean(name: str) -> float:
        """Over the samples of the mixture, in which sources have their weights."""
        return sum(source["share_of_samples"] * source[name] for source in used)

    per_sample, images = mean("mean_tokens"), mean("mean_images")
    per_row = summary["packing_efficiency"] * recipe.data.sequence_length / per_sample
    remarks.append(f"tokens were counted in the first {summary['num_samples']:,} samples of the data")
    return {
        "counted_in": "data", "per_sample": per_sample, "samples_per_row": per_row, "num_images": per_row * images,
        "tokens_per_image": mean("mean_image_tokens") / images if images else 0.0,
        "num_labels": per_row * mean("mean_labels"),
    }  # fmt: skip


def is_here(path: str) -> bool:
    """Whether a source can be read without a network."""
    if path == EASY_VQA:
        return any(cache_folder().glob(f"{EASY_VQA}==*"))
    return Path(path).exists() or bool(glob(path, recursive=True))


def tokens_of_budget(
    recipe: Recipe, config: VoraConfig, num_text_tokens: int, num_labels: int, remarks: list[str]
) -> dict[str, Any]:
    """Tokens of a sample with one image of the largest size, or of the mean of a drawn budget."""
    recipe.data.sequence_length = recipe.data.sequence_length or NEAR_LENGTH
    budget, length = recipe.data.image_tokens, recipe.data.sequence_length
    side = config.image_size // (config.patch_size * config.patch_merge)
    per_image = sum(budget) / 2 if budget else recipe.model.max_image_tokens or side**2
    per_image = 0 if recipe.data.text_only else per_image
    per_sample = per_image + num_text_tokens
    if per_sample > length:
        remarks.append(
            f"a sample of {per_sample:,.0f} tokens does not fit a sequence of {length:,} and is skipped: raise "
            "data.sequence_length, or lower model.max_image_tokens"
        )
    remarks.append(
        f"the data is not here: taken as one image of {per_image:,.0f} tokens and {num_text_tokens} of text in every "
        f"sample, {num_labels} of them learned"
    )
    per_row = max(1.0, ROWS_FILLED * length / per_sample)
    return {
        "counted_in": "budget", "per_sample": per_sample, "samples_per_row": per_row,
        "num_images": 0 if recipe.data.text_only else per_row, "tokens_per_image": per_image,
        "num_labels": per_row * num_labels,
    }  # fmt: skip


def parameter_counts(objective: Objective) -> dict[str, Any]:
    """Parameters by part, those that train, and those that a finished run saves."""
    counts = {p: count for p, count in trainable_counts(objective).items() if not p.startswith(FROZEN_COPY)}
    parts = {part: total for part, (_, total) in counts.items()}
    if objective.teacher is not None:
        parts["teacher"] = sum(p.numel() for p in objective.teacher.parameters())
    trained = sum(trained for trained, _ in counts.values())
    return {
        "frozen": sum(parts.values()) - trained,
        "trained": trained,
        "saved": trained,
        "blocks_with_lora": sum(layer_sizes(block)[2] > 0 for block in objective.vora.model.blocks),
        "parts": parts,
    }


def disk_bytes(objective: Objective, arguments: TrainingArguments, recipe: Recipe) -> dict[str, float]:
    """What the run leaves on disk, by part; the data is not counted."""
    trained = bytes_of(trained_parameters(objective))
    lora = bytes_of(p for name, p in objective.named_parameters() if "lora_" in name)
    every, steps = arguments.save_steps, arguments.max_steps
    every = max(1, math.ceil(every * steps) if every < 1 else every)  # below 1 it is a share of the steps
    kept = min(arguments.save_total_limit or math.inf, max(1, steps // every))
    parts = {
        "checkpoints": kept * (trained + optimizer_bytes(objective, arguments.optim)),
        "final": trained,
        "merged model": bytes_of(objective.vora.parameters()) - lora if recipe.stage == "pretrain" else 0,
        "teacher": 0 if objective.teacher is None else 4 * sum(p.numel() for p in objective.teacher.parameters()),
        "base LLM": bytes_of(objective.parameters()) - lora,
    }
    return parts | {"total": sum(parts.values())}
