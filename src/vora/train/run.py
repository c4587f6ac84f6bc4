"""A run from recipe to trained weights, and what it leaves in its directory.

RUN/recipe.yaml, versions.json     what was run, with what
RUN/log.jsonl                      every log line
RUN/validation.jsonl               what was measured on the validation samples, if the recipe has some
RUN/sample_generations.jsonl       answers about the recipe's sample images at each checkpoint
RUN/bad_samples.jsonl              rows that were skipped, with their causes
RUN/diverged.jsonl                 samples of the step at which a training diverged, if one did
RUN/run.lock                       which process trains here, while it does
RUN/checkpoint-N/                  to resume from, or for another run to go on from; with its model card
RUN/final/                         what was trained: adapter (stage 1) or model (stage 2), with its model card
RUN/loss.png, report.md            the losses, and the run in short
"""

import json
import platform
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    AttentionInterface,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vora.checkpoint.card import write_run_card
from vora.checkpoint.manifest import write_manifest
from vora.checkpoint.run_directory import find_checkpoint, last_step, newest_checkpoint, replace_text, set_aside_newer
from vora.data.few_answers import few_answers
from vora.data.source import Source
from vora.data.stream import PackedSequences
from vora.data.streams import num_streams_of
from vora.distill.branches import takes_branches
from vora.distill.objective import Objective
from vora.model.attention import longest_sequence
from vora.model.segmented_sdpa import SEGMENTED_SDPA, segmented_sdpa, use_segmented_sdpa_on_cpu
from vora.train.callbacks import (
    ANSWERS_FILE,
    CardCallback,
    EpochCallback,
    ProgressCallback,
    SampleGenerationCallback,
    SaveAtStep,
    StopOnSignal,
)
from vora.train.from_recipe import (
    check_fsdp,
    check_one_gpu_per_process,
    check_recipe,
    check_sequence_length,
    of_first_process,
    open_sources,
    open_validation,
    packed_sequences,
    streams_of_run,
    training_arguments,
    with_epochs,
    with_planned_steps,
    with_sequence_length,
)  # fmt: skip
from vora.train.recipe import save_recipe
from vora.train.recipe_sections import AUTO_LENGTH, Recipe
from vora.train.resume import check_ended, checkpoint_to_resume, tell_changes
from vora.train.run_lock import run_lock
from vora.train.run_log import draw_losses, write_report
from vora.train.schedule import check_schedule, schedule_in_words
from vora.train.sharding import check_sharding
from vora.train.stages import build_objective, trainable_table, vision_is_frozen
from vora.train.trainer import VoraTrainer
from vora.train.training_values import check_libraries
from vora.train.validation import Validation

MOST_KINDS = 64  # of compiled blocks: with and without LoRA, of each sort that the LLM has, for one length or any


def train(
    recipe: Recipe, run_directory: str | Path, resume: bool = False, console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> VoraTrainer:  # fmt: skip
    """Run a recipe, or go on from the newest checkpoint in its directory; the trainer is returned after training. A
    ValueError names a bad recipe, data or directory, before any work where that can be known; an InterruptedError says
    how to go on from where a signal stopped the run."""
    console, directory = console or Console(stderr=True), Path(run_directory)
    check_recipe(recipe)
    arguments = training_arguments(recipe, directory)
    check_schedule(recipe, arguments)
    check_libraries(arguments)
    check_one_gpu_per_process(arguments)
    check_sharding(arguments)
    check_fsdp(recipe, bool(arguments.fsdp))
    with run_lock(directory, arguments):
        checkpoint = of_first_process(lambda: find_checkpoint(directory, resume, console.print), arguments)
        return _train(recipe, directory, checkpoint, arguments, console, callbacks)


def _train(
    recipe: Recipe, directory: Path, checkpoint: str | None, arguments: TrainingArguments, console: Console,
    callbacks: Sequence[TrainerCallback],
) -> VoraTrainer:  # fmt: skip
    sources = open_sources(recipe.data)
    torch.manual_seed(arguments.seed)
    objective, processor = build_objective(recipe)
    context = longest_sequence(objective.config)
    if recipe.data.sequence_length == AUTO_LENGTH:
        recipe = with_sequence_length(recipe, sources, processor, arguments, context)
        console.print(f"Packed sequences of {recipe.data.sequence_length:,} tokens, which the data fills best.")
    check_sequence_length(recipe, objective.config)
    prepare(objective, recipe, arguments)
    branches = recipe.distill_only_steps > 0 and takes_branches(objective, recipe.data.sequence_length)
    bad_samples = directory / "bad_samples.jsonl"
    sequences = packed_sequences(recipe, sources, processor, arguments, bad_samples, branches)
    validation = open_validation(recipe, sequences, arguments, bad_samples)
    with_epochs(recipe, sequences, arguments)
    recipe = with_planned_steps(recipe, objective, sequences, arguments, checkpoint)
    check_schedule(recipe, arguments)  # once more, with the steps that were planned
    if (found := checkpoint) is not None:
        going_on = partial(checkpoint_to_resume, found, recipe, directory, arguments.max_steps, console.print)
        checkpoint = of_first_process(going_on, arguments)
    num_streams = arguments.world_size if checkpoint is None else num_streams_of(checkpoint)
    streams = streams_of_run(recipe, sequences, arguments, num_streams)
    num_done = 0 if checkpoint is None else last_step(checkpoint)
    if num_done >= arguments.max_steps:
        check_ended(recipe, directory, num_done)
    elif checkpoint is not None:
        tell_changes(recipe, directory, console.print)
    console.print(trainable_table(objective, recipe.stage))
    console.print(length_of_run(sequences, arguments, validation), highlight=False)
    console.print(rows_of_sources(sources), highlight=False, markup=False, soft_wrap=True)
    if line := schedule_in_words(recipe, arguments.max_steps):
        console.print(line, highlight=False)
    warning = None
    if recipe.distill_only_steps >= arguments.max_steps:
        console.print(
            f"Warning: all {arguments.max_steps} steps only distill, so that no text is learned: raise "
            "training.max_steps, or lower teacher.distill_only_steps.", highlight=False,
        )  # fmt: skip
    elif warning := few_answers(sources):
        console.print(f"Warning: {warning}", highlight=False, markup=False)
    logs = directory / "log.jsonl", directory / "validation.jsonl"
    stop, progress = StopOnSignal(console), ProgressCallback(console, *logs, recipe.distill_only_steps)
    answers = directory / ANSWERS_FILE
    samples = SampleGenerationCallback(recipe.sample_generations, processor, answers, console)
    files = RunFiles(recipe, directory, checkpoint, console.print)
    own = [files, EpochCallback(streams), stop, progress, CardCallback(directory), samples, *callbacks]
    trainer = VoraTrainer(
        recipe, objective, arguments, train_dataset=streams, eval_dataset=validation,
        processing_class=processor, callbacks=own,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(SaveAtStep(trainer.before_decay))
    check_fsdp(recipe, trainer.is_fsdp_enabled)  # as an accelerate configuration may ask
    try:
        if checkpoint is not None and num_done >= arguments.max_steps:
            what = f"Step {num_done} of {arguments.max_steps} is done: nothing is left to train."
            console.print(what, highlight=False)
            trainer.restore(checkpoint)  # killed after its last step: the Trainer would do one more
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if not stop.caught:  # before or after the steps
            raise
        raise InterruptedError(
            f"Stopped at once, after step {stop.step} of {arguments.max_steps}. {_go_on(directory)}"
        ) from None
    finally:
        stop.release()
        progress.stop()
    if stop.caught:
        if trainer.is_world_process_zero():
            draw_losses(directory)
        raise InterruptedError(
            f"{stop.caught}: stopped and saved at step {trainer.state.global_step} of {arguments.max_steps}. "
            f"{_go_on(directory)}"
        )
    trainer.check_weights()
    trainer.save_model(directory / "final")  # on all processes, for each may hold a part
    if trainer.is_world_process_zero():
        write_manifest(directory / "final")
        write_run_card(directory / "final", directory, trainer.step_of_weights)
        write_report(recipe, trainer.state.global_step, trainer.num_samples_seen, directory, warning)
    return trainer


def _go_on(directory: Path) -> str:
    """How to, in a sentence, from the newest checkpoint if there is one."""
    if (found := newest_checkpoint(directory)) is None:
        return "There is no checkpoint yet, so it would begin anew."
    command = shlex.join(["vora", "train", str(directory / "recipe.yaml"), "--out", str(directory), "--resume"])
    return f"Go on from {Path(found).name} with: {command}"


def length_of_run(sequences: PackedSequences, arguments: TrainingArguments, validation: Validation | None) -> str:
    """In a line: steps, rows and, if any, what is measured."""
    text, held_out = f"{arguments.max_steps:,} steps on {sequences.num_rows:,} rows", sequences.maker.held_out
    if held_out is not None:
        text += f" less about {held_out.share:.1%} of the images, which are held out"
    if validation is None or arguments.eval_strategy == "no":
        return text
    return f"{text}; validation on {len(validation.samples):,} samples of {'these' if held_out else 'their own'}"


def rows_of_sources(sources: Sequence[Source]) -> str:
    """In a line: what each source has, so that one sees which files a pattern has found here."""
    found = [f"{len(source):,} rows of {len(source.files):,} files ({source.name})" for source in sources]
    return f"Read: {', '.join(found)}."


def prepare(objective: Objective, recipe: Recipe, arguments: TrainingArguments) -> None:
    """Freeze, recompute and compile what the recipe says, and choose how attention is computed."""
    if vision_is_frozen(recipe):
        objective.freeze_vision()
    use_segmented_sdpa_on_cpu(objective.vora, arguments.device)
    if wanted := recipe.recomputed_blocks:  # by the objective: the Trainer knows nothing of the first n
        options = dict(arguments.gradient_checkpointing_kwargs or {})
        how = {"offload": options.pop("offload")} if "offload" in options else {}
        objective.gradient_checkpointing_enable(options, None if wanted is True else wanted, **how)
    if arguments.torch_compile:
        compile_blocks(objective, arguments)


def compile_blocks(objective: Objective, arguments: TrainingArguments) -> None:
    """Compile each block by itself, once for all blocks alike, the teacher's too; hooks stay outside of what is
    compiled, and so does attention by segments, which differ from batch to batch. Sequences of another length cost one
    more compilation, which then serves all lengths. Sample generations, token by token, are not compiled."""
    AttentionInterface.register(SEGMENTED_SDPA, torch.compiler.disable(segmented_sdpa))
    torch._dynamo.config.recompile_limit = max(MOST_KINDS, torch._dynamo.config.recompile_limit)
    how = {"backend": arguments.torch_compile_backend, "mode": arguments.torch_compile_mode}
    # not again by the Trainer, as a whole, hooks and all
    arguments.torch_compile, arguments.torch_compile_backend, arguments.torch_compile_mode = False, None, None
    for block in objective.vora.model.blocks:
        plain = block.forward
        block.forward = partial(_while_training, block, torch.compile(plain, **how), plain)
    for block in [] if objective.teacher is None else objective.teacher.blocks:
        block.forward = torch.compile(block.forward, **how)


def _while_training(block: nn.Module, compiled: Callable, plain: Callable, *args: Any, **kwargs: Any) -> Any:
    return (compiled if block.training else plain)(*args, **kwargs)


class RunFiles(TrainerCallback):
    """Writes what runs once the run begins, after all that may refuse it, a checkpoint of other data among it; newer
    checkpoints than the one that it goes on from are set aside then. Whatever is refused leaves a run as it was."""

    def __init__(self, recipe: Recipe, directory: Path, checkpoint: str | None, tell: Callable[[str], None]) -> None:
        self.recipe, self.directory, self.checkpoint, self.tell = recipe, directory, checkpoint, tell

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self.checkpoint is not None and (names := set_aside_newer(Path(self.checkpoint))):
            self.tell(f"Newer than {Path(self.checkpoint).name}, so kept under another name: {', '.join(names)}.")
        write_what_runs(self.recipe, self.directory)


def write_what_runs(recipe: Recipe, directory: Path) -> None:
    """Write the resolved recipe and the versions of what runs it: Python, the libraries, the machine."""
    directory.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, directory / "recipe.yaml")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "machine": platform.platform(), "gpu": gpu}
    for name in ("vora-vlm", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"):
        try:
            versions[name] = version(name)
        except ImportError:
            versions[name] = "source tree"
    replace_text(directory / "versions.json", json.dumps(versions, indent=1))
