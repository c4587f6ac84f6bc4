"""What the sections of a recipe become before training: arguments, sources, packed sequences."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerState, TrainingArguments

from vora.data.columns import RowOptions
from vora.data.readers import load_source
from vora.data.source import Source
from vora.data.stream import PackedSequences
from vora.distill.objective import Objective
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe_sections import CHECKPOINTING, DataSection, Recipe
from vora.train.throughput import steps_that_fit

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
    "remove_unused_columns": False,
    "disable_tqdm": True,  # ProgressCallback shows its own bar, with all losses
    "dataloader_pin_memory": False,
}


def training_arguments(recipe: Recipe, directory: str | Path) -> TrainingArguments:
    """TrainingArguments of a recipe, over our defaults; a ValueError where `max_steps` is missing, or a value is not
    accepted. Which blocks are computed again is not the Trainer's part."""
    values = DEFAULTS | {key: value for key, value in recipe.training.items() if key not in CHECKPOINTING}
    if values.get("max_steps", -1) < 1:
        raise ValueError(
            "training.max_steps is missing: sequences are packed from an endless stream, so say how many steps."
        )
    try:
        arguments = TrainingArguments(output_dir=str(directory), **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"training: {error}") from None
    arguments.ignore_data_skip = True  # a checkpoint holds the position in the data
    return arguments


def open_sources(data: DataSection) -> list[Source]:
    """The sources of a recipe's data section; a ValueError where one of them holds nothing usable."""
    sources = []
    for one in data.sources:
        options = RowOptions(data.prompts, one.columns or {}, data.allow_urls)
        part: dict[str, Any] = {"subset": one.subset, "max_samples": one.max_samples}
        sources.append(load_source(one.path, one.split, options, image_folder=one.image_folder, **part))
    return sources


def packed_sequences(
    recipe: Recipe, sources: list[Source], processor: VoraProcessor, arguments: TrainingArguments,
    bad_samples: Path | None = None,
) -> PackedSequences:  # fmt: skip
    """This process's part of the sequences that a recipe trains on."""
    data = recipe.data
    weights = [source.weight for source in data.sources if source.weight is not None]  # of all sources, or of none
    sequences_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return PackedSequences(
        sources, processor, data.sequence_length, weights=weights or None, seed=arguments.seed,
        distill_only_sequences=recipe.distill_only_steps * sequences_per_step,
        bad_samples=bad_samples, max_bad_share=data.max_bad_share, num_workers=arguments.dataloader_num_workers,
        rank=arguments.process_index, num_ranks=arguments.world_size,
        answer_balance=data.answer_balance, questions_per_image=data.questions_per_image,
        image_tokens=data.image_tokens, text_only=data.text_only,
        augment=[source.augment and source.augment.model_dump() for source in data.sources],
        text_kl_weight=recipe.stage == "pretrain" and recipe.lora.text_kl_weight > 0,
    )  # fmt: skip


def with_planned_steps(
    recipe: Recipe, objective: Objective, sequences: PackedSequences, arguments: TrainingArguments,
    checkpoint: str | None,
) -> Recipe:  # fmt: skip
    """The recipe with as many steps as fit its `max_minutes`, which a resumed run repeats; `arguments` get them too. A
    run that goes on from a checkpoint has the steps planned when it began: others would be another schedule."""
    if recipe.max_minutes is None:
        return recipe
    recipe = recipe.model_copy(deep=True)
    if checkpoint is not None:
        arguments.max_steps = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).max_steps
    else:
        steps = steps_that_fit(objective, sequences, arguments, recipe.max_minutes, recipe.distill_only_steps)
        arguments.max_steps = fewest_of_processes(steps, arguments)
    recipe.training["max_steps"], recipe.max_minutes = arguments.max_steps, None
    return recipe


def fewest_of_processes(steps: int, arguments: TrainingArguments) -> int:
    """The least of what the processes of a run have each measured."""
    if arguments.world_size == 1:
        return steps
    fewest = torch.tensor(steps, device=arguments.device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return int(fewest)
