"""What a run must not ask for, said before any work."""

from dataclasses import fields

from transformers import TrainingArguments

from vora.distill.objective import Objective
from vora.train.recipe_sections import Recipe

NO_EVALUATION = "has no samples to evaluate on: `vora eval` measures a checkpoint, sample_generations shows answers"
NOT_SUPPORTED = {  # fields of TrainingArguments
    "data_seed": "would change nothing: the order of the data follows training.seed",
    "label_smoothing_factor": "would change nothing: losses are those of vora.distill.Objective, not the Trainer's",
    "auto_find_batch_size": "would change nothing: sequences are packed before a batch is tried; ask `vora plan`",
    "save_only_model": "would leave checkpoints without their place in the data, from which nothing can resume",
    "use_liger_kernel": "would change nothing: logits are made at labels alone already, in parts of bounded size",
    "neftune_noise_alpha": "is not supported: its noise would reach the text tokens alone, and the KL's LLM too",
    "eval_strategy": NO_EVALUATION,
    "eval_on_start": NO_EVALUATION,
    "load_best_model_at_end": NO_EVALUATION,
}


def check_recipe(recipe: Recipe) -> None:
    """Raise where a run that is to begin asks for what nothing would come of; recipes of runs that were trained before
    may, and are read."""
    if recipe.stage == "finetune" and recipe.teacher is not None:
        raise ValueError("stage finetune has no teacher, so its section would change nothing: set teacher=null")
    if (num := recipe.distill_only_steps) and recipe.teacher is not None and recipe.teacher.weight == 0:
        raise ValueError(f"with teacher.weight 0 nothing is distilled, but distill_only_steps is {num}: set it to 0")
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for key, why in NOT_SUPPORTED.items():
        if recipe.training.get(key, defaults[key]) != defaults[key]:
            raise ValueError(f"training.{key} {why}: leave it out")


def check_one_gpu_per_process(arguments: TrainingArguments) -> None:
    """Raise where one process sees several GPUs: packed batches cannot be cut for `torch.nn.DataParallel`, which
    transformers' Trainer would take."""
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs: start one for each with `torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m vora.cli train ...`, or show it one with CUDA_VISIBLE_DEVICES=0."
        )


def check_fsdp(recipe: Recipe, are_spread: bool, resumes: bool = False) -> None:
    """Raise where weights that FSDP spreads over processes, which then have to compute in step, are asked for what one
    process does alone, or for whole weights. `are_spread` by the recipe, or by an accelerate configuration."""
    needs = {
        "--resume reads whole weights back": resumes,
        "sample_generations are made in one process alone": recipe.sample_generations,
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


def check_sequence_length(recipe: Recipe, objective: Objective) -> None:
    """Raise if a packed sequence would exceed the LLM's context."""
    limit = getattr(objective.config.get_text_config(), "max_position_embeddings", None)
    if limit and recipe.data.sequence_length > limit:
        raise ValueError(
            f"data.sequence_length is {recipe.data.sequence_length}, but the LLM's context holds {limit} tokens: "
            "lower it."
        )
