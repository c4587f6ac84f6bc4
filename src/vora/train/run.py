"""A run from recipe to trained weights, and what it leaves in its directory.

RUN/recipe.yaml, versions.json     what was run, with what
RUN/log.jsonl                      every log line
RUN/watch.jsonl                    answers to the watched images at each evaluation
RUN/bad_samples.jsonl              records that were skipped, with their causes
RUN/checkpoint-N/                  to resume from, or for another run to go on from; with its model card
RUN/final/                         what was trained: adapter (stage 1) or model (stage 2), with its model card
RUN/loss.png, report.md            the losses, and the run in short
"""

import json
import platform
import shutil
import signal
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from vora.checkpoint.run_directory import find_checkpoint, last_step, newest_checkpoint
from vora.data.columns import RowOptions
from vora.data.readers import load_source
from vora.data.stream import PackedSequences
from vora.model.segmented_sdpa import use_segmented_sdpa_on_cpu
from vora.train.blocks import compile_blocks, recompute_blocks
from vora.train.devices import check_fsdp, check_one_gpu_per_process
from vora.train.progress import ProgressCallback, draw_losses, write_report
from vora.train.recipe import CHECKPOINTING, check_recipe, save_recipe
from vora.train.sample_generations import SampleGenerationCallback
from vora.train.stages import build_learner, trainable_table, vision_is_frozen
from vora.train.throughput import steps_that_fit
from vora.train.trained import write_run_card
from vora.train.trainer import VoraTrainer

DEFAULTS = {
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
    "disable_tqdm": True,  # ProgressCallback shows its own bar, with both losses
    "dataloader_pin_memory": False,
}


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM: save at the end of the step, stop, and let the run say how to go on. A signal that reached
    one of several processes, or some of them a step later, stops all after the same step: else they would wait for
    each other."""

    def __init__(self):
        self.caught = None
        self._previous, self._all = {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._catch)
        if args.world_size > 1:
            self._all = dist.new_group(backend="gloo")  # on the host: no device is waited for

    def _catch(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt  # a second signal does not wait for the step
        self.caught = signal.Signals(number).name

    def on_step_end(self, args, state, control, **kwargs):
        if self._all is not None:
            caught = torch.tensor(int(self.caught is not None))
            dist.all_reduce(caught, dist.ReduceOp.MAX, group=self._all)
            if caught:
                self.caught = self.caught or "A signal to another process"
        if self.caught:
            control.should_save = control.should_training_stop = True
        return control

    def release(self):
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class CardCallback(TrainerCallback):
    """A card in each checkpoint, since another run may go on from it, or its eyes be sent, whatever ends this one.

    Args:
        directory: of the run.
    """

    def __init__(self, directory):
        self.directory = directory

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = newest_checkpoint(self.directory)
            write_run_card(folder, self.directory, state.global_step, asks_hub=False)  # the last card does
            shutil.rmtree(Path(self.directory, "final"), ignore_errors=True)  # of a shorter run: older now


def train(recipe, run_directory, resume=False, console=None, callbacks=()):
    """Run a recipe.

    Args:
        recipe: a `Recipe`.
        run_directory: where everything goes.
        resume: go on from the newest checkpoint in it.

    Returns:
        The `VoraTrainer`, after training.

    Raises:
        ValueError: bad recipe, data or directory; before any work starts where that can be known.
        InterruptedError: a signal stopped the run; the message says how to go on.
    """
    console, directory = console or Console(stderr=True), Path(run_directory)
    check_recipe(recipe)
    checkpoint = find_checkpoint(directory, resume)
    arguments = training_arguments(recipe, directory)
    check_one_gpu_per_process(arguments)
    check_fsdp(recipe, bool(arguments.fsdp), checkpoint is not None)
    sources = open_sources(recipe.data)
    torch.manual_seed(arguments.seed)
    learner, processor = build_learner(recipe)
    if vision_is_frozen(recipe):
        learner.freeze_vision()
    if not arguments.torch_compile:  # lengths change each step
        use_segmented_sdpa_on_cpu(learner.vora, arguments.device)
    check_sequence_length(recipe, learner)
    if recipe.recomputed_blocks:
        recompute_blocks(learner, recipe.recomputed_blocks, arguments)
    if arguments.torch_compile:
        compile_blocks(learner, arguments)
    rows = packed_sequences(recipe, sources, processor, arguments, directory / "bad_samples.jsonl")
    if recipe.max_minutes is not None:
        recipe = recipe.model_copy(deep=True)
        if checkpoint is not None:  # planned when it began: another number would be another schedule
            arguments.max_steps = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))).max_steps
        else:
            steps = steps_that_fit(
                learner,
                rows,
                arguments,
                recipe.max_minutes,
                recipe.teacher.distill_only_steps if recipe.teacher else 0,
            )
            arguments.max_steps = fewest_of_processes(steps, arguments)
        recipe.training["max_steps"], recipe.max_minutes = arguments.max_steps, None  # what a resumed run repeats
    directory.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, directory / "recipe.yaml")
    (directory / "versions.json").write_text(json.dumps(versions(), indent=1))
    console.print(trainable_table(learner, recipe.stage))
    stop = StopOnSignal()
    trainer = VoraTrainer(
        model=learner,
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
        learning_rates=recipe.learning_rates.model_dump(exclude_none=True),
        distill_only_steps=recipe.teacher.distill_only_steps if recipe.teacher else 0,
        vision_lr_scale=recipe.teacher.vision_lr_scale if recipe.teacher else 1.0,
        callbacks=[
            stop,
            ProgressCallback(console, directory / "log.jsonl"),
            CardCallback(directory),
            SampleGenerationCallback(
                recipe.sample_generations, processor, directory / "sample_generations.jsonl", console
            ),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    # an accelerate configuration may ask for FSDP too
    check_fsdp(recipe, trainer.is_fsdp_enabled, checkpoint is not None)
    try:
        if checkpoint is not None and last_step(checkpoint) >= arguments.max_steps:
            trainer.restore(checkpoint)  # killed after its last step: the Trainer would do one more
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        stop.release()
    if stop.caught:
        raise InterruptedError(
            f"{stop.caught}: stopped and saved at step {trainer.state.global_step} of {arguments.max_steps}. "
            f"Go on with: vora train {directory / 'recipe.yaml'} --out {directory} --resume"
        )
    trainer.save_model(directory / "final")  # on all processes, for each may hold a part
    if trainer.is_world_process_zero():
        write_run_card(directory / "final", directory, trainer.state.global_step)
        draw_losses(directory / "log.jsonl", directory / "loss.png")
        write_report(recipe, trainer, directory)
    return trainer


def training_arguments(recipe, directory):
    """TrainingArguments of a recipe, over our defaults; which blocks are computed again is not the Trainer's part.

    Raises:
        ValueError: `max_steps` is missing, or a value is not accepted.
    """
    values = DEFAULTS | {key: value for key, value in recipe.training.items() if key not in CHECKPOINTING}
    if values.get("max_steps", -1) < 1:
        raise ValueError(
            "training.max_steps is missing: rows are packed from an endless stream, so say how many steps."
        )
    try:
        arguments = TrainingArguments(output_dir=str(directory), **values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"training: {error}") from None
    arguments.ignore_data_skip = True  # a checkpoint holds the position in the data
    return arguments


def fewest_of_processes(steps, arguments):
    """The least of what the processes of a run have each measured."""
    if arguments.world_size > 1:
        steps = torch.tensor(steps, device=arguments.device)
        dist.all_reduce(steps, dist.ReduceOp.MIN)
    return int(steps)


def open_sources(data):
    """The sources of a recipe's data section.

    Raises:
        ValueError: one of them holds nothing usable.
    """
    return [
        load_source(
            source.path,
            source.split,
            RowOptions(data.prompts, source.columns or {}, data.allow_urls),
            subset=source.subset,
            image_folder=source.image_folder,
            max_samples=source.max_samples,
        )
        for source in data.sources
    ]


def packed_sequences(recipe, sources, processor, arguments, bad_samples=None):
    """This process's part of the rows that a recipe trains on."""
    data, steps = recipe.data, recipe.teacher.distill_only_steps if recipe.teacher else 0
    weights = [source.weight for source in data.sources]
    return PackedSequences(
        sources,
        processor,
        data.sequence_length,
        weights=None if weights[0] is None else weights,
        distill_only_sequences=steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
        seed=arguments.seed,
        bad_samples=bad_samples,
        max_bad_share=data.max_bad_share,
        num_workers=arguments.dataloader_num_workers,
        rank=arguments.process_index,
        num_ranks=arguments.world_size,
        answer_balance=data.answer_balance,
        questions_per_image=data.questions_per_image,
        image_tokens=data.image_tokens,
        augment=[source.augment and source.augment.model_dump() for source in data.sources],
        text_only=data.text_only,
        text_kl_weight=recipe.stage == "pretrain" and recipe.lora.text_kl_weight > 0,
    )


def check_sequence_length(recipe, learner):
    """Raise before work starts if a row would exceed the LLM's context.

    Raises:
        ValueError: names both lengths.
    """
    limit = getattr(learner.config.get_text_config(), "max_position_embeddings", None)
    if limit and recipe.data.sequence_length > limit:
        raise ValueError(
            f"data.sequence_length is {recipe.data.sequence_length}, but the LLM's context holds {limit} "
            "tokens: lower it."
        )


def versions():
    """What ran: Python, the libraries, the machine."""
    names = ("vora-vlm", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:
            found[name] = "source tree"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "machine": platform.platform(), "gpu": gpu, **found}
