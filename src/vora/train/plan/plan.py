"""`vora plan`: what a recipe's run will need, before anything is fetched, rented or started."""

import math
import platform
import re
import time
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import torch
from rich.table import Table

from vora.data.stats import dataset_statistics
from vora.distill.teacher import Teacher
from vora.train.plan.flops import Row, sequence_flops
from vora.train.plan.memory import bytes_of, optimizer_bytes, step_memory
from vora.train.plan.meta_model import meta_model
from vora.train.preview import source_names
from vora.train.recipe import check_recipe
from vora.train.run import DEFAULTS, open_sources, packed_sequences, training_arguments
from vora.train.stages import build_processor, trainable_counts

IMAGES_PER_SECOND = 150  # that one process decodes and cuts into patches (benchmarks/data.py)
LINK_BETWEEN_MACHINES = 50e9  # bytes per second and GPU: one 400 Gb/s adapter each
GPUS_PER_MACHINE = 8
UTILIZATION = 0.4
# Share of what a step makes and frees that glibc's heap keeps: none, and all blocks computed again (dev/LOG.md)
HEAP_KEEPS = (0.35, 1.5)
ROWS_FILLED = 0.98  # by samples of many lengths (dev/LOG.md)


@dataclass
class Device:
    """What samples are trained on.

    Attributes:
        flops: peak FLOP/s of dense bf16 matrix products.
        memory_bytes: of one.
        link: bytes per second to the others in the same machine.
    """

    name: str
    flops: float
    memory_bytes: float
    link: float = 25e9


# Peaks without sparsity and memory, by the makers' data sheets; links by NVLink's or PCIe's generation.
GPUS = {
    "b200": Device("B200", 2250e12, 180e9, 900e9),
    "h200": Device("H200", 989e12, 141e9, 450e9),
    "h100": Device("H100 SXM", 989e12, 80e9, 450e9),
    "a100": Device("A100 80 GB", 312e12, 80e9, 300e9),
    "a100-40": Device("A100 40 GB", 312e12, 40e9, 300e9),
    "l40s": Device("L40S", 362e12, 48e9, 25e9),
    "l4": Device("L4", 121e12, 24e9, 25e9),
    "a10g": Device("A10G", 70e12, 24e9, 25e9),
    "rtx4090": Device("RTX 4090", 165e12, 24e9, 25e9),
    "rtx3090": Device("RTX 3090", 71e12, 24e9, 25e9),
}


def plan(recipe, device, num_devices=1, *, beside=None, utilization=UTILIZATION, num_text_tokens=150, num_labels=100,
         max_samples=200):  # fmt: skip
    """What a run of a recipe needs.

    Args:
        device: a `Device`; `GPUS` or `device_at_hand()`.
        beside: the recipe's folder, see `meta_model`.
        utilization: the share of the device's peak that training reaches: an assumption, and the answer's largest
            uncertainty. Recomputed blocks count as work.
        num_text_tokens, num_labels: text tokens of a sample, and those of them that are learned, where the data is not
            here to be counted.
        max_samples: rows of each source that are read to count tokens.

    Returns:
        dict for JSON; sizes in bytes, counts of FLOPs, times in seconds.

    Raises:
        ValueError: see `check_recipe`, `meta_model` and `training_arguments`.
    """
    check_recipe(recipe)
    learner, remarks = meta_model(recipe, beside)
    settings = step_settings(recipe)
    tokens = tokens_of_data(recipe, max_samples, remarks)
    if tokens is None:
        tokens = tokens_of_budget(recipe, learner.config, num_text_tokens, num_labels, remarks)
    rows_per_device = settings["per_device_train_batch_size"]
    rows_per_step = rows_per_device * settings["gradient_accumulation_steps"] * num_devices
    row = Row(recipe.data.sequence_length, **{k: tokens[k] for k in ("num_images", "tokens_per_image", "num_labels")})
    if device.name == "cpu" and recipe.model.attn_implementation == "sdpa":
        row.num_segments = max(1.0, tokens["samples_per_row"])  # see `vora.train.run.train`
    depth = len(learner.vora.model.blocks)
    num_recomputed = depth if recipe.recomputed_blocks is True else recipe.recomputed_blocks
    flops = sequence_flops(learner, row, num_recomputed, rows_per_device)
    shards = num_devices if settings["fsdp"] else 1
    memory = step_memory(
        learner,
        row,
        rows_per_device,
        bf16=settings["bf16"],
        num_recomputed=num_recomputed,
        accumulates=settings["gradient_accumulation_steps"] > 1,
        optim=settings["optim"],
        num_shards=shards,
        num_processes=num_devices,
    )
    if device.name == "cpu":
        memory |= held_by_process(memory, num_recomputed / depth)
        remarks.append(
            "with MALLOC_MMAP_THRESHOLD_=131072 in the environment the heap keeps nothing, but steps take longer"
        )
    parameters = parameter_counts(learner)
    steps = settings["max_steps"]
    alone = min(recipe.teacher.distill_only_steps, steps) if recipe.teacher else 0
    times = step_seconds(flops["total"] * rows_per_step, tokens, settings, device, num_devices, utilization, learner)
    seconds = max(times["compute"], times["communication"], times["data"])
    total = (steps - alone) * seconds
    if alone:
        share = distill_only(learner, row, num_recomputed) / flops["total"]
        total += alone * max(share * times["compute"], times["communication"], times["data"])
        remarks.append(f"the first {alone:,} steps distill images alone, at {share:.0%} of a step's FLOPs")
    if recipe.lora.text_kl_weight:
        remarks.append("rows of text to keep run twice and need logits at every token; neither is counted here")
    samples_per_step = rows_per_step * tokens["samples_per_row"]
    fits = memory["total"] <= 0.95 * device.memory_bytes
    slowest = max(("compute", "communication", "data"), key=lambda name: times[name])
    return {
        "stage": recipe.stage,
        "device": device.name,
        "num_devices": num_devices,
        "utilization": utilization,
        "parameters": parameters,
        "tokens": tokens,
        "flops_per_sample": {part: value / tokens["samples_per_row"] for part, value in flops.items()},
        "memory_bytes": memory,
        "device_memory_bytes": device.memory_bytes,
        "fits": fits,
        "disk_bytes": disk_bytes(learner, settings, recipe),
        "rows_per_step": rows_per_step,
        "samples_per_step": samples_per_step,
        "steps": steps,
        "samples": steps * samples_per_step,
        "seconds_per_step": times,
        "samples_per_second": samples_per_step / seconds,
        "hours": total / 3600,
        "device_hours": num_devices * total / 3600,
        "bottleneck": slowest if fits else "memory",
        "remarks": remarks,
    }


def step_settings(recipe):
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


def tokens_of_data(recipe, max_samples, remarks):
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

    def mean(name):
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


def tokens_of_budget(recipe, config, num_text_tokens, num_labels, remarks):
    """Tokens of a sample with one image of the largest size, or of the mean of a drawn budget."""
    budget = recipe.data.image_tokens
    side = config.image_size // (config.patch_size * config.patch_merge)
    per_image = sum(budget) / 2 if budget else recipe.model.max_image_tokens or side**2
    per_image = 0 if recipe.data.text_only else per_image
    per_row = max(1.0, ROWS_FILLED * recipe.data.sequence_length / (per_image + num_text_tokens))
    if per_image + num_text_tokens > recipe.data.sequence_length:
        remarks.append(
            f"a sample of {per_image + num_text_tokens:,.0f} tokens does not fit a sequence of "
            f"{recipe.data.sequence_length:,} and is skipped: raise data.sequence_length or lower model.max_image_tokens"
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


def parameter_counts(learner):
    """Parameters by part, those that train, and those that a finished run saves."""
    counts = trainable_counts(learner)
    counts.pop("frozen copy of the patch embedding", None)
    teacher = 0 if learner.teacher is None else sum(p.numel() for p in learner.teacher.parameters())
    lora_blocks = {name.split(".layers.")[1].split(".")[0] for name, _ in learner.named_parameters()
                   if "lora_" in name and ".layers." in name}  # fmt: skip
    trained = sum(trained for trained, _ in counts.values())
    return {
        "frozen": sum(total for _, total in counts.values()) - trained + teacher,
        "trained": trained,
        "saved": trained,
        "blocks_with_lora": len(lora_blocks),
        "parts": {part: total for part, (_, total) in counts.items()} | ({"teacher": teacher} if teacher else {}),
    }


def distill_only(learner, row, num_recomputed):
    """FLOPs of a row in the first steps, which hold images alone."""
    num_images = row.num_tokens // max(row.tokens_per_image, 1)
    segments = max(1.0, num_images if row.num_segments > 1 else 1.0)
    alone = Row(row.num_tokens, num_images, row.tokens_per_image, 0, segments)
    return sequence_flops(learner, alone, num_recomputed)["total"]


def step_seconds(flops, tokens, settings, device, num_devices, utilization, learner):
    """Seconds of a step by what could bound it: compute, gradients sent around, images read."""
    compute = flops / (num_devices * device.flops * utilization)
    trained = sum(bytes_of(p) for p in learner.parameters() if p.requires_grad)
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


def disk_bytes(learner, settings, recipe):
    """What the run leaves on disk, by part; the data is not counted."""
    trained = sum(bytes_of(p) for p in learner.parameters() if p.requires_grad)
    weights = sum(bytes_of(p) for p in learner.vora.parameters())
    lora = sum(bytes_of(p) for name, p in learner.named_parameters() if "lora_" in name)
    every, steps = settings["save_steps"], settings["max_steps"]
    every = max(1, math.ceil(every * steps) if every < 1 else every)  # below 1 it is a share of the steps
    kept = min(settings["save_total_limit"] or math.inf, max(1, steps // every))
    parts = {
        "checkpoints": kept * (trained + optimizer_bytes(learner, settings["optim"])),
        "final": trained,
        "merged model": weights - lora if recipe.stage == "pretrain" else 0,
        "teacher": 0 if learner.teacher is None else 4 * sum(p.numel() for p in learner.teacher.parameters()),
        "base LLM": sum(bytes_of(p) for name, p in learner.named_parameters() if "lora_" not in name),
    }
    return parts | {"total": sum(parts.values())}


def device_at_hand(bf16=False):
    """The GPU of this machine, or its processor with a measured peak.

    Args:
        bf16: whether training computes in bf16, which a processor may do faster or slower than fp32.
    """
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known = known_gpu(found.name)
        if known is None:
            return Device(found.name, matmul_flops("cuda", torch.bfloat16), found.total_memory)
        return Device(found.name, known.flops, found.total_memory, known.link)
    pages = Path("/proc/meminfo")
    total = 1024 * int(pages.read_text().split()[1]) if pages.exists() else 16e9
    return Device("cpu", matmul_flops("cpu", torch.bfloat16 if bf16 else torch.float32), total)


def known_gpu(name):
    """Of `GPUS` the one that CUDA calls so, or None; an RTX is told by its number."""

    def mark(gpu):
        return gpu.name if gpu.name.startswith("RTX") else gpu.name.split()[0]

    return next((gpu for gpu in GPUS.values() if re.search(rf"\b{re.escape(mark(gpu))}\b", name)), None)


def matmul_flops(device, dtype):
    """FLOP/s of this device's matrix products, the best of a few."""
    side, products = (8192, 8) if device == "cuda" else (1024, 1)  # a GPU is asked for long enough to be in step
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(products):
            product = left @ right
        product[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * products * side**3 / min(seconds)


def held_by_process(memory, recomputed):
    """What a process holds beside its tensors: libraries, and what glibc's heap keeps of freed ones; the new total.

    Args:
        recomputed: the share of the blocks that are computed again.
    """
    moving = memory["activations"] + memory["loss"] + memory["gradients"]
    kept = HEAP_KEEPS[0] + recomputed * (HEAP_KEEPS[1] - HEAP_KEEPS[0])
    parts = {
        "Python and its libraries": resident_bytes(),
        "kept by the heap": kept * moving if platform.system() == "Linux" else 0,
    }
    return parts | {"total": memory["total"] + sum(parts.values())}


def resident_bytes():
    """What this process holds in memory: Python and the libraries that a training process has too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 5e8
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def tables(found):
    """The plan as tables for the terminal."""
    counts, tokens, times = found["parameters"], found["tokens"], found["seconds_per_step"]
    what = Table(title=f"Stage {found['stage']} on {found['num_devices']} x {found['device']}", show_header=False)
    what.add_row("parameters", f"{counts['trained']:,} trained, {counts['frozen']:,} frozen")
    for part, count in counts["parts"].items():
        blocks = f" in {counts['blocks_with_lora']} blocks" if part == "vision LoRA" else ""
        what.add_row(f"  {part}", f"{count:,}{blocks}")
    what.add_row("tokens per sample", f"{tokens['per_sample']:,.0f} ({tokens['samples_per_row']:.1f} samples per row)")
    what.add_row("FLOPs per sample", f"{found['flops_per_sample']['total'] / 1e12:,.2f} T")
    for part, value in found["flops_per_sample"].items():
        if part != "total" and value:
            what.add_row(f"  {part.replace('_', ' ')}", f"{value / 1e12:,.2f} T")
    memory = found["memory_bytes"]
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    what.add_row(
        "memory of each device", f"{gigabytes(memory['total'])}: {fits} {gigabytes(found['device_memory_bytes'])}"
    )
    for part, size in memory.items():
        if part != "total" and size:
            what.add_row(f"  {part}", gigabytes(size))
    what.add_row("disk", gigabytes(found["disk_bytes"]["total"]))
    for part, size in found["disk_bytes"].items():
        if part != "total" and size:
            what.add_row(f"  {part}", gigabytes(size))
    what.add_row("steps", f"{found['steps']:,} of {found['samples_per_step']:,.0f} samples: {found['samples']:,.0f}")
    for part, seconds in times.items():
        mark = "  <- the bottleneck" if part == found["bottleneck"] else ""
        what.add_row(f"  {part}", f"{seconds:,.3f} s a step{mark}")
    speed = f"{found['samples_per_second']:,.1f} at {found['utilization']:.0%} of the device's peak"
    what.add_row("samples per second", speed)
    what.add_row("time", f"{found['hours']:,.1f} hours, {found['device_hours']:,.0f} device hours")
    return what


def gigabytes(size):
    return f"{size / 1e9:,.2f} GB"
