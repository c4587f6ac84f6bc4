"""What a run does beside its steps: stops on a signal, shows its progress, writes cards, answers sample questions."""

import json
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vora.checkpoint.card import write_run_card
from vora.checkpoint.run_directory import best_checkpoint, replace_text
from vora.data.streams import Streams
from vora.distill.objective import LOSSES
from vora.model.fetch_image import fetch_image
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor
from vora.report.words import duration
from vora.train.from_recipe import fewest_of_processes
from vora.train.recipe_sections import SampleGenerationSection
from vora.train.run_log import read_log

ANSWERS_FILE = "sample_generations.jsonl"
NUM_TIMED = 50  # steps whose mean says how long the rest takes
QUIET_SECONDS = 30.0  # after which a file of a run gets a line, though nothing was logged


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM: save at the end of the step, stop, and let the run say how to go on; a second signal stops
    at once. A signal that reached only some of several processes stops all after the same step: else they would wait
    for each other."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.caught: str | None = None
        self.step = 0  # the last one that is done
        self._previous: dict[int, Any] = {}
        self._all: dist.ProcessGroup | None = None
        self._speaker: int | None = None  # the process that speaks: not the workers that it has forked

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._catch)
        if args.world_size > 1:
            self._all = dist.new_group(backend="gloo")  # on the host: no device is waited for
        self._speaker, self.step = os.getpid() if state.is_world_process_zero else None, state.global_step

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number).name
        if os.getpid() == self._speaker:
            with suppress(Exception, SystemExit):  # of a pipe whose reader the same Ctrl-C has ended
                self.console.print(
                    f"{self.caught}: saves a checkpoint after the step that is running, and stops. A second signal "
                    "stops at once, and loses the steps since the last checkpoint.", highlight=False, soft_wrap=True,
                )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step
        if self._all is not None:
            caught = torch.tensor(int(self.caught is not None))
            dist.all_reduce(caught, dist.ReduceOp.MAX, group=self._all)
            if caught:
                self.caught = self.caught or "A signal to another process"
        if self.caught:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.caught and self._all is None:  # no step more
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.caught and self._all is None:
            control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class EpochCallback(TrainerCallback):
    """Says how often the mixture has been read, and evaluates, saves and logs after each time where the recipe says
    `epoch`; the Trainer's own count takes a run for one epoch."""

    def __init__(self, sequences: Streams) -> None:
        self.sequences, self._num_whole = sequences, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._num_whole = self._whole_epochs(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.epoch, num_whole = self.sequences.epoch, self._whole_epochs(args)
        if num_whole > self._num_whole or state.global_step >= state.max_steps:
            control.should_log |= args.logging_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch" and args.eval_delay <= num_whole
            control.should_save |= args.save_strategy == "epoch"
        self._num_whole = num_whole

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log = control.should_evaluate = control.should_save = False  # done after the last step

    def _whole_epochs(self, args: TrainingArguments) -> int:
        """How many all processes have ended."""
        if "epoch" not in (args.logging_strategy, args.eval_strategy, args.save_strategy):
            return 0
        return fewest_of_processes(int(self.sequences.epoch), args)


class SaveAtStep(TrainerCallback):
    """A checkpoint after one step more than those that `save_steps` says, if any."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save |= state.global_step == self.step


class CardCallback(TrainerCallback):
    """A card in each checkpoint, since another run may go on from it, or it may be sent, whatever ends this one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # as the recipe says now, not as a checkpoint does
        if best := best_checkpoint(self.directory):  # which the Trainer forgets of a run that was moved
            state.best_model_checkpoint = str(best.folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = self.directory / f"checkpoint-{state.global_step}"
            write_run_card(folder, self.directory, state.global_step)
            shutil.rmtree(Path(self.directory, "final"), ignore_errors=True)  # of a shorter run: older now


class ProgressCallback(TrainerCallback):
    """A bar with the losses, speeds and the share of time spent waiting for data; log lines also go to a file, and
    those of validation to one of their own."""

    def __init__(self, console: Console, log_file: Path, validation_file: Path, distill_only_steps: int = 0) -> None:
        self.console, self.log_file, self.validation_file = console, log_file, validation_file
        self.distill_only_steps = distill_only_steps  # which are shorter than those with text
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self._figures = ""  # of the last log line, as the bar shows them
        self._line = 0.0  # when the last line was written
        self._since = 0.0  # when the step began, or what came after the last one ended
        self._seconds: deque[float] = deque(maxlen=NUM_TIMED)  # of the last steps, without validation and saving
        self._is_file = False  # which gets lines, not a bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        answers = self.log_file.with_name(ANSWERS_FILE)
        for file in (self.log_file, self.validation_file, answers):
            # lines after the checkpoint that the run resumes from are repeated: drop them
            kept = [json.dumps(line) + "\n" for line in read_log(file) if line["step"] <= state.global_step]
            if file.exists() or file == self.log_file:
                replace_text(file, "".join(kept))
        figures = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = [TextColumn("step"), MofNCompleteColumn(), TextColumn("{task.fields[left]} left"), figures]
        self._is_file = not self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, redirect_stdout=False, expand=True, disable=self._is_file)
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, left="?")
        self._line = self._since = time.monotonic()
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # also of a run that is shorter than the distance between two lines
        if self.bar is None:
            return
        if state.global_step == self.distill_only_steps + 1:
            self._seconds.clear()
        self._seconds.append(time.monotonic() - self._since)
        self._since = time.monotonic()
        self.bar.update(self.task, completed=state.global_step, left=self._left(state))
        if control.should_evaluate:
            self.bar.update(self.task, description="validating")
        if self._is_file and not control.should_log and self._since - self._line > QUIET_SECONDS:
            self.console.print(self._place(state), soft_wrap=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._since = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.bar is None or "samples_per_second" not in logs:
            return
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        losses = [f"{name} {logs[name]:.3f}" for name in LOSSES if name in logs]
        read = [f"epoch {logs['epoch']:.2f}"] if "epoch" in logs else []
        first = [*read, *losses, f"{logs['samples_per_second']:.1f} samples/s"]
        self._figures = "  ".join(first)
        self.bar.update(self.task, description=self._figures)
        if self._is_file:
            more = f"{logs['tokens_per_second']:.0f} tokens/s", f"{logs['data_wait_share']:.0%} waiting for data"
            self.console.print("  ".join([self._place(state), *first, *more]), soft_wrap=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        if self.bar is None:
            return
        self._since = time.monotonic()
        self.bar.update(self.task, description=self._figures)
        with self.validation_file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **metrics}) + "\n")
        values = [f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("eval_")]
        text = f"step {state.global_step}/{state.max_steps}  validation: " + "  ".join(values)
        self.console.print(text, highlight=False, soft_wrap=True)

    def _place(self, state: TrainerState) -> str:
        """The beginning of a line."""
        self._line = time.monotonic()
        return f"step {state.global_step}/{state.max_steps}  {self._left(state)} left"

    def _left(self, state: TrainerState) -> str:
        """How long the remaining steps take, at the pace of the last ones; more, while these only distill."""
        if not self._seconds:
            return "?"
        left = duration(fmean(self._seconds) * (state.max_steps - state.global_step))
        return f"over {left}" if state.global_step <= self.distill_only_steps < state.max_steps else left

    def stop(self) -> None:
        """Leave the terminal as it was, however the run ended."""
        if self.bar is not None:
            self.bar.stop()


class SampleGenerationCallback(TrainerCallback):
    """Answers the recipe's sample questions at each checkpoint; a ValueError if an image cannot be read, at once."""

    def __init__(
        self, samples: Sequence[SampleGenerationSection], processor: VoraProcessor, log_file: Path, console: Console
    ) -> None:
        self.samples = [(fetch_image(sample.image), sample) for sample in samples]
        self.processor, self.log_file, self.console = processor, log_file, console

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if not self.samples or not state.is_world_process_zero:
            return
        objective = getattr(model, "module", model)
        answers = [self.answer(objective.vora, image, sample.question) for image, sample in self.samples]
        objective.train()
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "answers": answers}) + "\n")
        for (image, sample), answer in zip(self.samples, answers):
            question = escape(f"{Path(sample.image).name}: {sample.question}")  # a model may say [/INST]
            self.console.print(f"  {question} [bold]{escape(answer)}[/bold]")

    @torch.inference_mode()
    def answer(self, model: VoraForConditionalGeneration, image: Image.Image, question: str) -> str:
        """A greedy answer to a question about an image."""
        model.eval()
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        messages, options = [{"role": "user", "content": content}], {"return_dict": True, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **options)
        output = model.generate(**inputs.to(model.device), max_new_tokens=24, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
