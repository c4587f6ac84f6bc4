"""transformers' Trainer with the named losses of VoRA."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerControl, TrainerState

from vora.checkpoint.load import digest_of, restore
from vora.checkpoint.manifest import OPTIMIZER_FOLDER, write_manifest
from vora.checkpoint.run_directory import begin_checkpoint, best_checkpoint, delete_older, last_step
from vora.checkpoint.save import save_training
from vora.data.packing import Batch
from vora.data.streams import PackedBatches
from vora.distill.objective import LOSSES
from vora.train import sharding
from vora.train.divergence import Divergence
from vora.train.recipe_sections import Recipe
from vora.train.resume import hyperparameters, use_hyperparameters
from vora.train.schedule import decay_of, distill_only_factor, in_phases
from vora.train.validation import Validation

ON_HOST = ("image_grid_thw", "num_samples", "distill_only", "branches", "places")  # of a batch: the host asks these
# by its name a parameter belongs to one of the parts that have learning rates, or to the rest
# what is counted over a step, and in which of a batch's lists of places
PLACES = {"num_image_tokens": "image_places", "num_text_tokens": "text_places"}
PART_MARKS = {"patch_embedding": "patch_embedding", "heads": "distillation.heads", "lora_b": "lora_B"}


class VoraTrainer(Trainer):
    """Trains an `Objective`; saves the adapter (stage 1) or the whole model (stage 2), never the teacher. Its
    `train_dataset` is a `Streams`, whose position is saved in every checkpoint; its `eval_dataset`, if any, a
    `Validation`."""

    def __init__(self, recipe: Recipe, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.learning_rates, self.distill_only_steps = recipe.learning_rates, recipe.distill_only_steps
        self.vision_lr_scale = recipe.teacher.vision_lr_scale if recipe.teacher else 1.0
        decay = decay_of(recipe, self.args.max_steps, self.args.max_steps)
        self.before_decay = None if decay is None else decay[0]
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the label tokens of all micro-batches
        self.most_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None  # see _save_checkpoint
        directory = Path(str(self.args.output_dir))
        self.divergence = Divergence(self.train_dataset, directory, self.args.process_index)
        self.num_samples_seen = self._samples_logged = 0
        self._terms: dict[str, tuple[Any, Any]] = {}  # of each loss since the last line: its sum, of how many
        self._num_tokens: dict[str, Any] = dict.fromkeys(PLACES, 0.0)  # of the step, per process
        self._last_counted: dict[str, int] = {}
        self._llm_digest: str | None = None
        self._last_batch: dict[str, Any] | None = None
        self._clock, self._tokens, self._waited = time.monotonic(), 0, 0.0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp or getattr(self.accelerator.state, "fsdp_plugin", None) is not None:
            sharding.shard(self.accelerator, self.args)
            self.is_fsdp_enabled: bool = True

    def get_train_dataloader(self) -> PackedBatches:
        return PackedBatches(self.train_dataset, self.args.per_device_train_batch_size)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        start = time.monotonic()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._waited += time.monotonic() - start
        self._begin_moments(batches)
        return batches, num_items

    def _begin_moments(self, batches: list[Batch]) -> None:
        """Before the first step, the moments of the teacher's features are those of all its micro-batches."""
        objective = self.accelerator.unwrap_model(self.model)
        if objective.teacher is None or not objective.distillation.center or objective.distillation.has_moments:
            return
        images: list[Any] = [
            {"pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}
            for batch in batches
            if "pixel_values" in batch
        ]
        if images or self.args.world_size > 1:
            objective.distillation.begin(objective.teach(**self._prepare_inputs(one)) for one in images)

    def _prepare_inputs(self, inputs: Batch) -> dict[str, Any]:
        """To the device, but for what only the host reads; a GPU is fed without being waited for."""
        kept = {name: tensor for name, tensor in inputs.items() if name in ON_HOST}
        moved: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name not in ON_HOST}
        if self.args.device.type == "cuda":
            moved = {name: t.pin_memory().to(self.args.device, non_blocking=True) for name, t in moved.items()}
        return super()._prepare_inputs(moved) | kept

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes  # gradients are averaged
        num_micro_batches = self.current_gradient_accumulation_steps if model.training else 1
        places, counts = inputs.pop("places", []), {}
        if model.training:
            counts = {"num_items_in_batch": num_items_in_batch, **self._num_tokens}
        losses = model(**inputs, **counts, num_micro_batches=num_micro_batches)
        if model.training and self.is_fsdp_enabled and "image_grid_thw" not in inputs:
            objective = self.accelerator.unwrap_model(model)
            parts = [objective.vora.model.patch_embedding, objective.distillation]
            losses["loss"] = sharding.tie_unused(losses["loss"], [part for part in parts if part is not None])
        if model.training:
            self._last_batch = dict(inputs)
            self.divergence.note(self.state.global_step + 1, losses["loss"], places)
            self._note(losses, inputs, num_items_in_batch)
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | float | None:
        if not batch_samples:
            return None
        # by what the language loss is divided: label tokens, or their weights; still on the host
        counted = [one["label_weights"] if "label_weights" in one else one["targets"] != -100 for one in batch_samples]
        counts: Any = [
            sum(float(labels.sum()) for labels in counted),
            *(float(sum(_count(one, places) for one in batch_samples)) for places in PLACES.values()),
        ]
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(torch.tensor(counts, device=device), "sum")
        self._num_tokens = {name: counts[number] / self.args.world_size for number, name in enumerate(PLACES, 1)}
        return counts[0]

    def _note(self, losses: dict[str, torch.Tensor], inputs: Batch, num_items: Any) -> None:
        """Add a micro-batch to what the next log line reports; stays on the device. What is learned of tokens is
        divided by those of the whole step, so that a step's micro-batches, of all processes, add up to one value."""
        learned = "answer_loss" if "answer_loss" in losses or "label_weights" in inputs else "lm_loss"
        of_step = {learned: num_items, "text_loss": self._num_tokens["num_text_tokens"]}
        if self.accelerator.unwrap_model(self.model).teacher is not None:
            of_step |= dict.fromkeys(("distill_loss", "pair_losses"), self._num_tokens["num_image_tokens"])
        for name in (*LOSSES, "pair_losses"):
            total, counted = self._terms.get(name, (0.0, 0.0))
            value = losses[name].detach().float() if name in losses else 0.0
            if name in of_step:
                if name != learned and name in losses:
                    places = "text_places" if name == "text_loss" else "image_places"
                    value = value * (_count(inputs, places) / of_step[name])
                is_new = self._last_counted.get(name) != self.state.global_step
                counted = counted + is_new * (of_step[name] > 0)
                self._last_counted[name] = self.state.global_step
            elif name in losses:  # a mean over micro-batches
                value = value * (self.current_gradient_accumulation_steps if name == "lm_loss" else 1)
                counted = counted + 1
            self._terms[name] = total + value, counted
        self.num_samples_seen += int(inputs["num_samples"])
        self._tokens += inputs["input_ids"].numel()
        if inputs["input_ids"].device.type == "cpu":  # elsewhere it would wait for the device: see log
            self._check_loss(losses["loss"].item(), self.state.global_step + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the named losses, as means since the last line, and the speed."""
        if "loss" in logs and self._terms:
            logs |= self._means()
            self._check_loss(logs["loss"], self.state.global_step)
            self.divergence.forget()
            logs |= self._speed()
        super().log(logs, start_time)

    def _check_loss(self, loss: float, step: int, name: str = "loss") -> None:
        """Stop at the first one that is no number."""
        if not math.isfinite(loss):
            self.divergence.stop(f"The {name} is {loss} at step {step}")

    def check_weights(self) -> None:
        """Stop, in all processes together, before weights are saved that are not finite, or that make the last batch's
        loss so, or that such a loss came before: where nothing is logged between two checkpoints, nobody else has
        looked. Waits for a device once."""
        model = self.accelerator.unwrap_model(self.model)
        if self._last_batch is not None:
            self.divergence.note_again(self._loss_without_a_trace(model, self._last_batch))
        bad = self.accelerator.reduce(self.divergence.num_bad(model, self.args.device), "sum").tolist()
        if any(bad):
            what = f"{bad[0]} tensors of weights and {bad[1]} losses are not finite"
            self.divergence.stop(f"After step {self.state.global_step} {what}")
        self.divergence.forget()

    @torch.no_grad()
    def _loss_without_a_trace(self, objective: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Of a batch, which changes neither weights nor moments and draws no random number."""
        is_training = objective.training
        with self.accelerator.autocast():
            loss = objective.eval()(**batch)["loss"]
        objective.train(is_training)
        if self.is_fsdp_enabled:
            objective.reshard()  # which otherwise follows a backward pass
        return loss

    def _means(self) -> dict[str, float]:
        """Means of what was noted since the last line, over all processes, of which some may have seen no text, or no
        image."""
        distillation = self.accelerator.unwrap_model(self.model).distillation
        pairs = [] if distillation is None else [f"pair_{s}_{t}" for s, t in distillation.pairs]
        names = {name: [name] for name in LOSSES} | {"pair_losses": pairs}
        rows = {term: torch.zeros(len(parts) + 1, device=self.args.device) for term, parts in names.items()}
        for term, (total, counted) in self._terms.items():
            rows[term][:-1], rows[term][-1] = total, counted
        rows = self.accelerator.reduce(rows, "sum")
        means = {term: (row[:-1] / row[-1]).tolist() for term, row in rows.items() if row[-1] > 0}
        return {name: value for term, row in means.items() for name, value in zip(names[term], row)}

    def _speed(self) -> dict[str, float]:
        """Samples seen, and speeds since the last line, of all processes together."""
        now, device = time.monotonic(), self.args.device
        counts = [self.num_samples_seen, self.num_samples_seen - self._samples_logged, self._tokens]
        seen, samples, tokens = self.accelerator.reduce(torch.tensor(counts, device=device), "sum").tolist()
        seconds, waited = now - self._clock, self._waited
        self._clock, self._tokens, self._waited, self._samples_logged = now, 0, 0.0, self.num_samples_seen
        self._terms = {}
        speeds = {"tokens_per_second": tokens, "samples_per_second": samples, "data_wait_share": waited}
        return {"samples_seen": seen} | {name: amount / seconds for name, amount in speeds.items()}

    def evaluate(
        self, eval_dataset: Validation | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The named losses on the validation samples of all processes, each a mean over all that it is of, their
        weighted sum as `eval_loss`, and what a probe finds. The clock of the training's speed stands still."""
        start, validation = time.monotonic(), eval_dataset or self.eval_dataset
        objective = self.accelerator.unwrap_model(self.model)
        is_training = objective.training
        with torch.no_grad(), self.accelerator.autocast():
            sums = validation.sums(objective.eval(), self._prepare_inputs)
        objective.train(is_training)
        device = self.args.device
        totals = self.accelerator.reduce(torch.tensor(list(sums.values()), device=device), "sum").tolist()
        samples_seen = self.accelerator.reduce(torch.tensor(self.num_samples_seen, device=device), "sum")
        means = {name: total / count for name, (total, count) in zip(sums, totals) if count > 0}
        if not means:
            raise ValueError(
                f"All {len(validation.samples)} validation samples are bad: {validation.bad.file} says why."
            )
        self._check_loss(loss := objective.weighted(means), self.state.global_step, "validation loss")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {"loss": loss, **means}.items()}
        seconds = time.monotonic() - start
        self._clock += seconds
        self.log(metrics | {f"{metric_key_prefix}_runtime": round(seconds, 3)})
        metrics |= {"samples_seen": int(samples_seen)}
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def step_of_weights(self) -> int:
        """After which step the model had the weights that it has: the last one, or the best one."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else last_step(best)

    def _load_best_model(self) -> None:
        """The weights of the checkpoint that was best on the validation samples."""
        objective = self.accelerator.unwrap_model(self.model)
        restore(objective.student, Path(str(self.state.best_model_checkpoint)), objective.distillation)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, its groups split by the part that a parameter belongs to."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if "part" in optimizer.param_groups[0]:
            return optimizer  # asked for a second time
        vision = {id(p) for p in self.accelerator.unwrap_model(self.model).vision_parameters()}
        parts = {}
        for name, p in self.model.named_parameters():
            own = next((key for key, mark in PART_MARKS.items() if mark in name), "rest")
            parts[id(p)] = own, id(p) in vision
        groups, optimizer.param_groups = optimizer.param_groups, []
        for group in groups:
            for part in dict.fromkeys(parts[id(p)] for p in group["params"]):
                members = [p for p in group["params"] if parts[id(p)] == part]
                rate = getattr(self.learning_rates, part[0], None) or group["lr"]
                optimizer.add_param_group({**group, "params": members, "lr": rate, "part": part})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The recipe's schedule; steps that only distill have a phase of their own before it, down to zero. Vision
        learns shapes only once its learning rate falls, and the first gradients of the language loss would undo them
        (dev/LOG.md): so the warm-up starts anew with these, and vision goes on at `vision_lr_scale` of its rates."""
        first = min(self.distill_only_steps, num_training_steps)
        scheduler = super().create_scheduler(num_training_steps - first, optimizer)
        if not first and self.vision_lr_scale == 1.0:
            return scheduler
        of_first = distill_only_factor(self.args, first, num_training_steps - first)
        schedules: list[Callable[[int], float]] = []
        for group, rest, rate in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, scheduler.base_lrs):
            _, is_vision = group["part"]
            group["lr"], scale = rate, self.vision_lr_scale if is_vision else 1.0
            schedules.append(partial(in_phases, of_first, rest, first, scale))
        self.lr_scheduler = LambdaLR(scheduler.optimizer, schedules)
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Of a checkpoint; rates and decay are the recipe's, which may have changed since."""
        if checkpoint is None:
            return
        wanted = hyperparameters(self.optimizer)
        if self.is_fsdp_enabled or Path(checkpoint, OPTIMIZER_FOLDER).exists():
            sharding.load_optimizer(self.model, self._bare_optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        use_hyperparameters(wanted, self.optimizer, self.lr_scheduler)

    @property
    def _bare_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer would gather a sharded LLM and all of its optimizer's state in the first process."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharding.save_optimizer(self.model, self._bare_optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        """What was trained; sharded weights are gathered, but not those that are frozen."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        objective = self.accelerator.unwrap_model(self.model)
        whole = sharding.gathered(sharding.saved_tensors(objective), self.args.should_save)
        self._save(output_dir, state_dict=whole)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Whole, or not at all; older ones are deleted once it is, and nothing else: the Trainer would delete whatever
        is called checkpoint-*."""
        self.check_weights()
        directory = Path(str(self.args.output_dir))
        if self.args.should_save:
            begin_checkpoint(directory / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            named = [f"checkpoint-{self.before_decay}", self.state.best_model_checkpoint or ""]
            delete_older(directory, self.most_checkpoints, named)

    def _save_rng_state(self, output_dir: str) -> None:
        """Also where this process stands in the data; then, once all processes have written, what lies there. Only
        trainer_state.json follows, which says that all is there."""
        super()._save_rng_state(output_dir)
        samples_seen = torch.tensor(self.num_samples_seen, device=self.args.device)
        self.train_dataset.save(Path(output_dir), int(self.accelerator.reduce(samples_seen, "sum")))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        objective = self.accelerator.unwrap_model(self.model)
        save_training(
            objective.student, self.processing_class, folder, distillation=objective.distillation,
            state_dict=state_dict, llm_digest=self._llm_digest, max_images=self.train_dataset.max_images,
        )  # fmt: skip
        if folder.name.startswith("checkpoint-"):
            torch.save(self.args, folder / "training_args.bin")

    def restore(self, checkpoint: str | Path) -> None:
        """Stand where a checkpoint was saved, without a step."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and (best := best_checkpoint(Path(str(self.args.output_dir)))):
            self.state.best_model_checkpoint = str(best.folder)
            self._load_best_model()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if resume_from_checkpoint is not None and self.is_fsdp_enabled:
            self._load_from_checkpoint(resume_from_checkpoint)  # whole weights, which are spread then
        if self.is_fsdp_enabled:
            self._llm_digest = digest_of(self.accelerator.unwrap_model(self.model).vora)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str | Path, model: Any = None) -> None:
        """Weights, and this process's place in the data; a ValueError where it was made with other data."""
        if model is not None and self.is_fsdp_enabled:
            return  # done before weights were spread
        checkpoint = Path(resume_from_checkpoint)
        seen = self.train_dataset.load(checkpoint, last_step(checkpoint))
        self.num_samples_seen = self._samples_logged = seen if self.args.process_index == 0 else 0  # adds up to all
        objective = self.accelerator.unwrap_model(model or self.model)
        restore(objective.student, checkpoint, objective.distillation)


def _count(batch: Batch, places: str) -> int:
    found: Any = batch.get(places, ())
    return len(found)
