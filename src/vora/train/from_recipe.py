"""What a recipe must not ask for, and what its sections become before training: arguments, sources, sequences."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import fields
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, TrainerState, TrainingArguments

from vora.data.bad_samples import BadSamples
from vora.data.columns import RowOptions
from vora.data.held_out import HeldOut
from vora.data.packing import tokenize_sample
from vora.data.readers import load_source
from vora.data.schema import Sample
from vora.data.sequence_length import length_that_fits
from vora.data.source import Source
from vora.data.stream import PackedSequences
from vora.data.streams import Streams, streams_of_process
from vora.distill.objective import Objective
from vora.model.attention import longest_sequence
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe import load_recipe
from vora.train.recipe_sections import AUTO_LENGTH, CHECKPOINTING, NEAR_LENGTH, DataSection, Recipe, SourceSection
from vora.train.throughput import steps_that_fit
from vora.train.training_values import check_precision
from vora.train.validation import LOOKS, Validation, validation_samples

Found = TypeVar("Found")

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
EVALUATION = ("eval_strategy", "eval_on_start", "load_best_model_at_end", "metric_for_best_model")
OWN_LOADER = "would change nothing: sequences are read, packed and handed on by vora's own loader"
LONGEST_SAMPLE = 1 << 17  # of tokens, that is looked at to choose a length
NOT_SUPPORTED = {  # fields of TrainingArguments
    "data_seed": "would change nothing: the order of the data follows training.seed",
    "label_smoothing_factor": "would change nothing: losses are those of vora.distill.Objective, not the Trainer's",
    "auto_find_batch_size": "would change nothing: sequences are packed before a batch is tried; ask `vora plan`",
    "save_only_model": "would leave checkpoints without their place in the data, from which nothing can resume",
    "use_liger_kernel": "would change nothing: logits are made at labels alone already, in parts of bounded size",
    "neftune_noise_alpha": "is not supported: its noise would reach the text tokens alone, and the KL's LLM too",
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "would change nothing: `vora train` trains, `vora eval` asks"
    ),
    "resume_from_checkpoint": "would change nothing: --resume goes on from the newest checkpoint",
    "dataloader_drop_last": OWN_LOADER,
    "dataloader_persistent_workers": OWN_LOADER,
    "dataloader_prefetch_factor": OWN_LOADER,
    "dataloader_multiprocessing_context": OWN_LOADER,
    "dataloader_in_order": OWN_LOADER,
    "train_sampling_strategy": OWN_LOADER,
    "length_column_name": OWN_LOADER,
    "label_names": OWN_LOADER,
}


def check_recipe(recipe: Recipe) -> None:
    """Raise where a run that is to begin asks for what nothing would come of; recipes of runs that were trained before
    may, and are read."""
    if recipe.stage == "finetune" and recipe.teacher is not None:
        raise ValueError("stage finetune has no teacher, so its section would change nothing: set teacher=null")
    if (num := recipe.distill_only_steps) and recipe.teacher is not None and recipe.teacher.weight == 0:
        raise ValueError(f"with teacher.weight 0 nothing is distilled, but distill_only_steps is {num}: set it to 0")
    if recipe.stage == "finetune" and recipe.model.dtype != "float32":
        raise ValueError(
            f"stage finetune trains the LLM's own weights, and most updates of weights in {recipe.model.dtype} round "
            "to nothing: set model.dtype=float32 (training.bf16=true computes in bfloat16 all the same)"
        )
    if recipe.model.dtype == "float16" and recipe.training.get("bf16"):
        raise ValueError("model.dtype is float16, but training.bf16 computes in bfloat16: set model.dtype=bfloat16")
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for key, why in NOT_SUPPORTED.items():
        if recipe.training.get(key, defaults[key]) != defaults[key]:
            raise ValueError(f"training.{key} {why}: leave it out")
    check_validation(recipe, defaults)


def check_validation(recipe: Recipe, defaults: Mapping[str, Any]) -> None:
    """Raise where nothing is there to evaluate on, or it is trained on too, or the wanted metric will not be there."""
    validation, wanted = recipe.data.validation, recipe.training.get("metric_for_best_model")
    if validation is None:
        asks = [key for key in EVALUATION if recipe.training.get(key, defaults[key]) not in (defaults[key], "no")]
        if asks:
            raise ValueError(
                f"training.{asks[0]} has no samples to evaluate on: hold some out with data.validation.share=0.02, or "
                "name files of their own in data.validation.sources"
            )
        return
    trained = [(source.path, source.split, source.subset) for source in recipe.data.sources]
    for source in validation.sources:
        if (source.path, source.split, source.subset) in trained:
            raise ValueError(
                f"data.validation.sources has {source.path} ({source.split}), which is trained on too: name another "
                "split, or give data.validation.share alone to hold some of it out"
            )
    metrics = {
        "loss": True, "lm_loss": True, "answer_loss": recipe.data.answer_balance > 0,
        "distill_loss": recipe.teacher is not None and recipe.teacher.weight > 0 and not recipe.data.text_only,
        "text_loss": recipe.stage == "pretrain" and recipe.lora.text_kl_weight > 0,
        LOOKS: validation.probe_samples > 0,
    }  # fmt: skip
    known = [name for name, is_there in metrics.items() if is_there]
    if wanted is not None and wanted.removeprefix("eval_") not in known:
        more = ": set data.validation.probe_samples" if wanted.removeprefix("eval_") == LOOKS else ""
        raise ValueError(f"training.metric_for_best_model {wanted} is not measured (known: {', '.join(known)}){more}")


def check_apart(trained: Sequence[Source], measured: Sequence[Source]) -> None:
    """Raise where a file or a folder of images that is measured is trained on too, whatever it is called there."""
    ours = {Path(file).resolve() for source in trained for file in source.files}
    around = ours.union(*(file.parents for file in ours))
    for source in measured:
        theirs = [Path(file).resolve() for file in source.files]
        both = [one for one in theirs if one in around or not ours.isdisjoint(one.parents)]
        if both:
            raise ValueError(
                f"data.validation.sources has {source.name}, of which {len(both)} of {len(theirs)} files, such as "
                f"{both[0]}, are trained on too: name other files, or give data.validation.share alone"
            )


def check_one_gpu_per_process(arguments: TrainingArguments) -> None:
    """Raise where one process sees several GPUs: packed batches cannot be cut for `torch.nn.DataParallel`, which
    transformers' Trainer would take."""
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs: start one for each with `torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m vora.cli train ...`, or show it one with CUDA_VISIBLE_DEVICES=0."
        )


def check_fsdp(recipe: Recipe, are_spread: bool) -> None:
    """Raise where weights that FSDP spreads over processes, which then have to compute in step, are asked for what one
    process does alone. `are_spread` by the recipe, or by an accelerate configuration."""
    needs = {
        "sample_generations are made in one process alone": recipe.sample_generations,
        "data.validation is measured by each process in its own batches": recipe.data.validation,
        "lora.text_kl_weight runs the LLM once more only where a batch has text": (
            recipe.stage == "pretrain" and recipe.lora.text_kl_weight
        ),
    }
    wrong = [what for what, is_so in needs.items() if is_so]
    if are_spread and wrong:
        raise ValueError(
            f"{'; '.join(wrong)}: with weights that FSDP spreads that fails, or waits for ever. Train with DDP "
            "(torchrun alone, without training.fsdp), or leave it out."
        )


def check_sequence_length(recipe: Recipe, config: PretrainedConfig) -> None:
    """Raise if a packed sequence would exceed the context of a configuration's LLM, or its sliding window."""
    limit, length = longest_sequence(config), recipe.data.sequence_length
    if limit and length != AUTO_LENGTH and length > limit:
        has_window = limit != getattr(config.get_text_config(), "max_position_embeddings", None)
        what = "sliding window" if has_window else "context"
        raise ValueError(f"data.sequence_length is {length}, but the LLM's {what} holds {limit} tokens: lower it.")


def check_chat_template(processor: VoraProcessor) -> None:
    """Raise where an LLM's chat template is such that every conversation would be a bad sample."""
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]
    try:
        tokenize_sample(Sample("", [], []), processor, [[*turns, *turns]])
    except Exception as error:  # templates raise what they like
        raise ValueError(f"No conversation can be learned, set model.chat_template. {error}") from error


def with_sequence_length(
    recipe: Recipe, sources: list[Source], processor: VoraProcessor, arguments: TrainingArguments,
    most: int | None = None,
) -> Recipe:  # fmt: skip
    """The recipe with a length of packed sequences, at most `most`: of `auto`, the one that the data fills best."""
    if recipe.data.sequence_length != AUTO_LENGTH:
        return recipe
    found = recipe.model_copy(deep=True)
    found.data.sequence_length = most or LONGEST_SAMPLE
    sequences = packed_sequences(found, sources, processor, arguments)
    found.data.sequence_length = length_that_fits(sequences, NEAR_LENGTH, most)
    return found


def training_arguments(recipe: Recipe, directory: str | Path) -> TrainingArguments:
    """TrainingArguments of a recipe, over our defaults; a ValueError where it has no end, or a value is not accepted.
    Which blocks are computed again is not the Trainer's part. `max_steps` is -1 where epochs alone say the end."""
    values = DEFAULTS | {key: value for key, value in recipe.training.items() if key not in CHECKPOINTING}
    if values.get("max_steps", -1) < 1 and not values.get("num_train_epochs"):
        raise ValueError(
            "training.max_steps is missing: sequences are packed without end, so say how many steps, or "
            "training.num_train_epochs."
        )
    if values.get("max_steps", -1) > 0 and "logging_steps" not in recipe.training:  # a short run has lines, too
        values["logging_steps"] = max(1, min(values["logging_steps"], values["max_steps"] // 20))
    if recipe.data.validation is not None:  # measured whenever a checkpoint is saved
        strategy = "epoch" if values.get("save_strategy") == "epoch" else "steps"
        values = {"eval_strategy": strategy, "eval_steps": values["save_steps"]} | values
    check_precision(values)
    if values.get("deepspeed") and find_spec("deepspeed") is None:
        raise ValueError("training.deepspeed is set, but deepspeed is not installed: pip install deepspeed.")
    try:
        arguments = TrainingArguments(output_dir=str(directory), **values)
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"training: {error}") from None
    arguments.ignore_data_skip = True  # a checkpoint holds the position in the data
    return arguments


def open_sources(data: DataSection, listed: Sequence[SourceSection] | None = None) -> list[Source]:
    """The sources of a recipe's data section, by default those that are trained on; a ValueError where one of them
    holds nothing usable."""
    sources = []
    for one in data.sources if listed is None else listed:
        options = RowOptions(data.prompts, one.columns or {}, data.allow_urls)
        part: dict[str, Any] = {"subset": one.subset, "max_samples": one.max_samples}
        sources.append(load_source(one.path, one.split, options, image_folder=one.image_folder, **part))
    return sources


def packed_sequences(
    recipe: Recipe, sources: list[Source], processor: VoraProcessor, arguments: TrainingArguments,
    bad_samples: Path | None = None, branches: bool = False, part: tuple[int, int] | None = None,
) -> PackedSequences:  # fmt: skip
    """A part of the sequences that a recipe trains on, (number, of how many), by default one of as many as there are
    processes; ValueError where the LLM's chat template is such that no conversation could be learned."""
    check_chat_template(processor)
    data = recipe.data
    weights = [source.weight for source in data.sources if source.weight is not None]  # of all sources, or of none
    sequences_per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    rank, num_ranks = part or (arguments.process_index, arguments.world_size)
    return PackedSequences(
        sources, processor, data.sequence_length, weights=weights or None, seed=arguments.seed,
        distill_only_sequences=recipe.distill_only_steps * sequences_per_step,
        bad_samples=bad_samples, max_bad_share=data.max_bad_share, num_workers=arguments.dataloader_num_workers,
        rank=rank, num_ranks=num_ranks,
        answer_balance=data.answer_balance, questions_per_image=data.questions_per_image,
        image_tokens=data.image_tokens, text_only=data.text_only,
        augment=[source.augment and source.augment.model_dump() for source in data.sources],
        branches=branches, text_kl_weight=recipe.stage == "pretrain" and recipe.lora.text_kl_weight > 0,
        held_out=held_out_of(data),
    )  # fmt: skip


def streams_of_run(
    recipe: Recipe, sequences: PackedSequences, arguments: TrainingArguments, num_streams: int
) -> Streams:
    """This process's part of a run's sequences: `sequences`, or of a run that began on another number of processes,
    what they would have read."""
    rank, num_ranks = arguments.process_index, arguments.world_size
    parts = {rank: sequences}
    if num_streams != num_ranks:
        numbers, maker = streams_of_process(rank, num_ranks, num_streams), sequences.maker
        alone = copy(arguments)
        alone.dataloader_num_workers //= len(numbers)  # they share the workers
        parts = {}
        for number in numbers:
            is_first = number % gcd(num_ranks, num_streams) == rank  # of those who read it: it alone names what is bad
            parts[number] = packed_sequences(
                recipe, list(maker.sources), maker.processor, alone, sequences.bad.file if is_first else None,
                sequences.branches, (number, num_streams),
            )  # fmt: skip
    of_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return Streams(parts, num_streams, rank, num_ranks, num_ranks * of_process, recipe.distill_only_steps)


def held_out_of(data: DataSection) -> HeldOut | None:
    """What is not trained on, of what is read."""
    if data.validation is None or data.validation.share is None:
        return None
    return HeldOut(data.validation.share, data.validation.seed)


def read_held_out(place: Path) -> HeldOut:
    """What the recipe in a file, or of a run's directory, holds out of its sources; ValueError where it is nothing."""
    file = place
    if place.is_dir():  # or what a run has saved within it
        file = next((f for f in (place / "recipe.yaml", place.parent / "recipe.yaml") if f.exists()), place)
    if (found := held_out_of(load_recipe(file).data)) is None:
        raise ValueError(f"{file} holds no image out of its sources: its data.validation.share is not set.")
    return found


def open_validation(
    recipe: Recipe, sequences: PackedSequences, arguments: TrainingArguments, bad_samples: Path
) -> Validation | None:
    """What a recipe's run is measured on while it trains, if it is."""
    data, wanted = recipe.data, recipe.data.validation
    if wanted is None:
        return None
    sources = open_sources(data, wanted.sources) if wanted.sources else list(sequences.maker.sources)
    if wanted.sources:
        check_apart(sequences.maker.sources, sources)
    bad = BadSamples(bad_samples, max_share=1.0)  # named, and left out; a few stop no run late
    samples = validation_samples(sources, wanted.max_samples, wanted.seed, held_out_of(data), bad)
    return Validation(samples, sequences, bad, arguments.per_device_eval_batch_size, wanted.probe_samples)


def with_epochs(recipe: Recipe, sequences: PackedSequences, arguments: TrainingArguments) -> None:
    """Set `max_steps` to what the recipe's epochs take, unless it ends before. Steps that only distill come on top."""
    epochs = recipe.training.get("num_train_epochs")
    if not epochs:
        return
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    steps = math.ceil(epochs * sequences.sequences_per_epoch() / per_step)
    steps = fewest_of_processes(max(1, steps) + recipe.distill_only_steps, arguments)
    arguments.max_steps = min(steps, arguments.max_steps) if arguments.max_steps > 0 else steps


def with_planned_steps(
    recipe: Recipe, objective: Objective, sequences: PackedSequences, arguments: TrainingArguments,
    checkpoint: str | None,
) -> Recipe:  # fmt: skip
    """The recipe with as many steps as fit its `max_minutes`, which a resumed run repeats; `arguments` get them too. A
    run that goes on from a checkpoint has the steps planned when it began: others would be another schedule."""
    minutes = recipe.max_minutes
    if minutes is None:
        return recipe
    recipe = recipe.model_copy(deep=True)
    if checkpoint is not None:
        arguments.max_steps = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).max_steps
    else:
        steps = steps_that_fit(objective, sequences, arguments, minutes, recipe.distill_only_steps)
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


def of_first_process(find: Callable[[], Found], arguments: TrainingArguments) -> Found:
    """What the first process of a run finds, or its error, for all of them: each might find something else."""
    if arguments.world_size == 1:
        return find()
    found: list[Any] = [None, None]
    if arguments.process_index == 0:
        try:
            found[0] = find()
        except (ValueError, OSError) as error:
            found[1] = error
    dist.broadcast_object_list(found, device=arguments.device)
    if found[1] is not None:
        raise found[1]
    return found[0]
