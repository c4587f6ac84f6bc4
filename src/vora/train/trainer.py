"""transformers' Trainer with the named losses of VoRA."""

import time
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import Trainer

from vora.model.modeling_vora import VoraForConditionalGeneration

DISTILLATION_FILE = "distillation.safetensors"


class VoraTrainer(Trainer):
    """Trains a `VisionLearner`; saves the adapter (stage 1) or the whole model (stage 2), never the teacher.

    Logs `lm_loss`, `distill_loss`, the loss of each block pair, and samples and tokens per second.
    """

    def __init__(self, *args, eyes_learning_rate=None, image_only_steps=0, **kwargs):
        super().__init__(*args, **kwargs)
        self.eyes_learning_rate = eyes_learning_rate
        self.image_only_steps = image_only_steps
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the label tokens of all micro-batches
        self.num_samples_seen = 0
        self._terms, self._clock, self._tokens = {}, time.monotonic(), 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes  # gradients are averaged
        losses = model(
            **inputs,
            num_items_in_batch=num_items_in_batch,
            num_micro_batches=self.current_gradient_accumulation_steps if model.training else 1,
        )
        if model.training:
            self._note(losses, inputs)
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def _get_num_items_in_batch(self, batch_samples, device):
        if not batch_samples:
            return None
        count = sum((batch["targets"] != -100).sum() for batch in batch_samples).to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _note(self, losses, inputs):
        """Add a micro-batch to what the next log line reports; stays on the device."""
        for name in ("lm_loss", "distill_loss", "pair_losses"):
            if name in losses:
                total, count = self._terms.get(name, (0.0, 0))
                scale = self.current_gradient_accumulation_steps if name == "lm_loss" else 1
                self._terms[name] = (total + scale * losses[name].detach(), count + 1)
        self.num_samples_seen += count_samples(inputs)
        self._tokens += inputs["input_ids"].numel()
        if inputs["input_ids"].device.type == "cpu":  # elsewhere it would wait for the device: see log
            refuse_non_finite(losses["loss"].item(), self.state.global_step)

    def log(self, logs, start_time=None):
        """Adds the named losses, as means since the last line, and the speed."""
        if "loss" in logs and self._terms:
            for name, (total, count) in self._terms.items():
                value = total / count
                if name == "pair_losses":
                    pairs = self.accelerator.unwrap_model(self.model).distillation.pairs
                    logs |= {f"pair_{s}_{t}": loss for (s, t), loss in zip(pairs, value.tolist())}
                else:
                    logs[name] = float(value)
            refuse_non_finite(logs["loss"], self.state.global_step)
            now = time.monotonic()
            logs["samples_seen"] = self.num_samples_seen
            logs["tokens_per_second"] = self._tokens / (now - self._clock)
            logs["samples_per_second"] = (self.num_samples_seen - self._samples_logged) / (now - self._clock)
            self._terms, self._clock, self._tokens = {}, now, 0
            self._samples_logged = self.num_samples_seen
        super().log(logs, start_time)

    _samples_logged = 0

    def create_optimizer(self, *args, **kwargs):
        """AdamW over what trains, with the learning rate of the patch embedding apart if the recipe says so."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.eyes_learning_rate is not None and len(optimizer.param_groups) < 3:
            eyes = {id(p) for n, p in self.model.named_parameters() if "patch_embedding" in n and p.requires_grad}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in eyes]
                if apart:
                    group["params"] = [p for p in group["params"] if id(p) not in eyes]
                    rest = {key: value for key, value in group.items() if key not in ("params", "lr")}
                    optimizer.add_param_group({**rest, "params": apart, "lr": self.eyes_learning_rate})
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The recipe's schedule; steps that distill pictures alone come before it, at the full rate.

        The warm-up starts anew with the language loss, whose first gradients are many times larger: without it they
        undo half of what the eyes have learned (docs/LOG.md).
        """
        first = self.image_only_steps
        scheduler = super().create_scheduler(num_training_steps - first, optimizer)
        if first:
            warmup = max(1, self.args.get_warmup_steps(num_training_steps - first))
            scheduler.lr_lambdas = [
                partial(_after_eyes_alone, rest=rest, num_first=first, num_warmup=warmup)
                for rest in scheduler.lr_lambdas
            ]
            scheduler.last_epoch = -1
            scheduler.step()
        return scheduler

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        save_student(self.accelerator.unwrap_model(self.model), self.processing_class, folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_student(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))


def _after_eyes_alone(step, rest, num_first, num_warmup):
    return min(1.0, (step + 1) / num_warmup) if step < num_first else rest(step - num_first)


def count_samples(inputs):
    """Conversations in a batch (branches that predict something), or pictures where nothing is to be predicted."""
    documents, branches, predicts = inputs["document_ids"], inputs["branch_ids"], inputs["targets"] != -100
    rows = torch.arange(len(documents), device=documents.device)[:, None].expand_as(documents)
    counted = predicts if predicts.any() else documents >= 0
    return len(torch.unique(torch.stack([rows, documents, branches], -1)[counted], dim=0))


def refuse_non_finite(loss, step):
    """Raise at the first loss that is no number.

    Raises:
        FloatingPointError: names the step and the cure.
    """
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise FloatingPointError(
            f"The loss is {loss} at step {step}: training diverged. Lower training.learning_rate, lengthen "
            "training.warmup_steps, or train in bfloat16 or float32; earlier checkpoints are intact."
        )


def save_student(learner, processor, folder):
    """Write what was trained: the adapter and the distillation heads (stage 1), or the whole model (stage 2)."""
    folder.mkdir(parents=True, exist_ok=True)
    learner.student.save_pretrained(folder)
    if isinstance(learner.student, PeftModel):
        learner.config.save_pretrained(folder)
    if learner.distillation is not None:
        save_file(learner.distillation.state_dict(), folder / DISTILLATION_FILE)
    processor.save_pretrained(folder)


def load_student(learner, folder):
    """Read back what `save_student` wrote, into a learner of the same recipe.

    Raises:
        ValueError: the folder holds another kind of checkpoint, or tensors are missing from it.
    """
    if isinstance(learner.student, PeftModel):
        if not (folder / "adapter_model.safetensors").exists():
            raise ValueError(f"{folder} holds no adapter_model.safetensors: it is no checkpoint of stage pretrain.")
        loaded = set_peft_model_state_dict(learner.student, load_peft_weights(folder, device="cpu"))
        if loaded.unexpected_keys:
            raise ValueError(
                f"{len(loaded.unexpected_keys)} tensors of {folder} do not fit this model, such as "
                f"{loaded.unexpected_keys[0]}: was the recipe's LLM or rank changed?"
            )
    else:
        trained = VoraForConditionalGeneration.from_pretrained(folder, dtype=learner.vora.dtype)
        learner.student.load_state_dict(trained.state_dict())
    if learner.distillation is not None:
        learner.distillation.load_state_dict(load_file(folder / DISTILLATION_FILE))
