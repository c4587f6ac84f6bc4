"""The student with its scaffolding: one forward to all the losses of a training step.

Dims: B rows, T tokens, P patches of all images.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from vora.distill.blockwise import SUMMARY
from vora.distill.teacher import hook_on_output, images_of_patches
from vora.distill.text_kl import divergence, lora_off, unexplained
from vora.model.patch_embed import merge_neighbours

LOSSES = ("lm_loss", "answer_loss", "distill_loss", "text_loss")  # see `VisionLearner.forward`


class VisionLearner(nn.Module):
    """What the Trainer trains: the student, and in stage 1 the distillation heads beside it.

    Args:
        student: a `VoraForConditionalGeneration`, or the `PeftModel` around it.
        image_processor: the student's, for its normalisation.
        teacher: a `Teacher`, or None to learn from text alone.
        distillation: a `BlockwiseDistillation`, or None with no teacher.
        distill_weight: of `distill_loss` in `loss` (1 in the paper).
        text_weight: of `text_loss` in `loss`, see `vora.distill.text_kl`.
    """

    def __init__(self, student, image_processor, teacher=None, distillation=None, distill_weight=1.0, text_weight=0.0):
        super().__init__()
        self.student = student
        self.image_processor = image_processor
        self.distillation = distillation
        self.distill_weight, self.text_weight = distill_weight, text_weight
        self._teacher = [teacher]  # in a list, so that it is neither trained nor saved nor wrapped with the student

    @property
    def teacher(self):
        return self._teacher[0]

    def set_teacher(self, teacher):
        """Another teacher, or None."""
        self._teacher = [teacher]

    @property
    def vora(self):
        """The bare `VoraForConditionalGeneration`, under PEFT or not."""
        return self.student.get_base_model() if hasattr(self.student, "get_base_model") else self.student

    @property
    def config(self):
        return self.vora.config

    @property
    def _no_split_modules(self):
        """What FSDP wraps one by one: the LLM's blocks."""
        return self.vora.model._no_split_modules

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, num_blocks=None, **kwargs):
        """Keep only what enters a block, or a distill head, and compute the rest again when gradients are.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
            num_blocks: of so many blocks, the first ones; all by default. The first are the right ones: they are
                computed again last, when what the others kept is free, so any other choice of as many needs more.
            kwargs: as for a model of transformers.

        Raises:
            ValueError: the LLM has fewer blocks, or they cannot be told one by one.
        """
        blocks, how = self.vora.model.blocks, {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if num_blocks is not None and not 1 <= num_blocks <= len(blocks):
            raise ValueError(f"{num_blocks} blocks are to be computed again, but the LLM has {len(blocks)}.")
        self.vora.model.language_model.gradient_checkpointing_enable(how, **kwargs)
        if self.distillation is not None:
            self.distillation.recomputes = True
        for block in [] if num_blocks is None else blocks[num_blocks:]:
            if not hasattr(block, "gradient_checkpointing"):
                raise ValueError(
                    f"The blocks of {self.config.get_text_config().model_type} are computed again all or none: give "
                    f"true instead of {num_blocks}."
                )
            block.gradient_checkpointing = False

    def eyes(self):
        """The trained parameters that images alone can teach: patch embedding, heads, and LoRA up to the last
        paired block; none without a teacher."""
        if self.distillation is None:
            return []
        last = max(student for student, _ in self.distillation.pairs)
        parts = [self.vora.model.patch_embedding, self.distillation, *self.vora.model.blocks[: last + 1]]
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def freeze_vision(self):
        """Let what images alone can teach stay as it is: words alone are learned, and no teacher is asked.

        Raises:
            ValueError: nothing else learns.
        """
        for parameter in self.eyes():
            parameter.requires_grad_(False)
        self.set_teacher(None)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            last = max(student for student, _ in self.distillation.pairs)
            raise ValueError(
                f"The eyes are to rest, and 0 parameters are left to learn: block {last} is taught, and no LoRA lies "
                f"above it. Raise lora.num_blocks above {last + 1}, or teacher.vision_lr_scale above 0."
            )

    def forward(
        self,
        targets,
        pixel_values=None,
        image_grid_thw=None,
        label_places=None,
        label_weights=None,
        image_places=None,
        text_rows=None,
        text_places=None,
        distill_only=None,
        num_samples=None,
        num_items_in_batch=None,
        num_micro_batches=1,
        **inputs,
    ):
        """Named losses of a packed batch.

        Args:
            targets: int[B, T], the token that each place should predict, -100 where masked.
            pixel_values, image_grid_thw, inputs: as for `VoraModel.forward`.
            label_places, image_places: int[L] and int[I], where in the flattened rows something is to be predicted
                and where image tokens are, if that is known (`vora.data.packing.places`): then no GPU is waited for.
            label_weights: float[L], how much each label counts (`vora.data.packing.label_weights`); None: all alike.
            text_rows, text_places: int[R] and int[L], which rows hold text alone that is to be kept as it was, and
                where in them, flattened, its tokens are; None: none.
            distill_only: False where steps without words are over, though this batch has nothing to predict.
            num_samples: of the batch; for who counts, not used here.
            num_items_in_batch: label tokens of the whole optimizer step, or their summed weights, by which what the
                language loss adds to `loss` is divided.
            num_micro_batches: of the step, by which `distill_loss` is divided in `loss`.

        Returns:
            dict: `loss`; `lm_loss` if there are targets, each label counting alike, and with weights `answer_loss`,
            which is what is learned then; with a teacher and images `distill_loss` and `pair_losses`
            float[pairs]; with text to keep `text_loss`. With images alone only the paired blocks run: what lies
            above them would learn nothing. Then text is kept after the last of them.
        """
        images = {} if pixel_values is None else {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        if label_places is None:
            label_places = (targets != -100).flatten().nonzero()[:, 0]
        if image_places is None:
            image_places = (inputs["input_ids"] == self.config.image_token_id).flatten().nonzero()[:, 0]
        predicts, distills = len(label_places) > 0, self.teacher is not None and len(image_places) > 0
        keeps_text = text_rows is not None
        stops_early = not predicts and self.distillation is not None
        if distill_only is not None:
            stops_early = stops_early and bool(distill_only)
        losses, hidden_states = {"loss": 0.0}, None
        with self.paired_states(distills or stops_early, stops_early) as states:
            try:
                hidden_states = self.vora.model(**inputs, **images, use_cache=False).last_hidden_state
            except _EnoughBlocks:
                pass
        if predicts or not (distills or keeps_text):  # with none of them, lm_loss says that nothing could be learned
            each = self.vora.label_losses(hidden_states, targets, label_places)
            if label_weights is None:
                learned = losses["lm_loss"] = each.sum() / (
                    len(each) if num_items_in_batch is None else num_items_in_batch
                )
            else:
                total = label_weights.sum() if num_items_in_batch is None else num_items_in_batch
                learned = losses["answer_loss"] = (label_weights * each).sum() / total
                losses["lm_loss"] = each.detach().mean() / num_micro_batches
            losses["loss"] = losses["loss"] + learned
        if keeps_text:
            reached = states[max(states)] if stops_early else hidden_states
            losses["text_loss"] = self.text_loss(reached, inputs, text_rows, text_places, stops_early)
            losses["loss"] = losses["loss"] + self.text_weight / num_micro_batches * losses["text_loss"]
        if distills:
            states = {block: hidden.flatten(0, 1)[image_places] for block, hidden in states.items()}
            losses["distill_loss"], losses["pair_losses"] = self.distillation(states, self.teach(**images))
            losses["loss"] = losses["loss"] + self.distill_weight / num_micro_batches * losses["distill_loss"]
        return losses

    def text_loss(self, reached, inputs, rows, places, stops_early):
        """How far the LLM is from its own self on rows of text: float[], the mean over this micro-batch's tokens.

        Args:
            reached: float[B, T, D], of all rows, after the last paired block or at the end.
            inputs: of all rows.
            rows, places: int[R], int[L], see `forward`.
        """
        of_rows = {name: inputs[name][rows] for name in ("position_ids", "seen_until") if name in inputs}
        # embeddings, for with tokens alone a GPU would be waited for, to see whether images are missing
        of_rows["inputs_embeds"] = self.vora.get_input_embeddings()(inputs["input_ids"][rows])
        with torch.no_grad(), lora_off(self.vora), self.paired_states(stops_early, stops_early) as states:
            try:
                own = self.vora.model(**of_rows, use_cache=False).last_hidden_state
            except _EnoughBlocks:
                own = states[max(states)]
        states, own = reached[rows].flatten(0, 1)[places], own.flatten(0, 1)[places]
        if stops_early:
            return unexplained(states, own)
        return divergence(self.vora.logits, states, own, self.vora.lm_head.out_features)

    @contextmanager
    def paired_states(self, distills, stop_early):
        """Collect the paired blocks' outputs while the student runs: {student block: float[B, T, D]}. Nothing is
        computed on them here: inside a checkpointed block it would be done once and missed later.

        Args:
            distills: whether there is something to distill; without, nothing is collected.
            stop_early: end the student's forward after the last paired block.
        """
        states, hooks = {}, []
        if distills:
            blocks, paired = self.vora.model.blocks, sorted({student for student, _ in self.distillation.pairs})
            for student in paired:
                keep = partial(_keep_states, states, student, stop_early and student == paired[-1])
                hooks.append(hook_on_output(blocks, student, keep))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def teach(self, pixel_values, image_grid_thw, blocks=None):
        """What each image token is to say: the mean of the teacher's features of its m x m patches; it teaches better
        than all of them (docs/LOG.md). {teacher block: float[P / m^2, D_t]}, by default of the paired blocks; the
        summary is the same at all tokens of an image. The teacher goes where the images are, for it is no part of
        what the Trainer moves."""
        if self.teacher.device != pixel_values.device:
            self.teacher.to(pixel_values.device)
        if blocks is None:
            blocks = list(dict.fromkeys(teacher for _, teacher in self.distillation.pairs))
        grids = [(h, w) for t, h, w in image_grid_thw.tolist() for _ in range(t)]
        processor = self.image_processor
        images = images_of_patches(
            pixel_values, grids, self.config.patch_size, processor.image_mean, processor.image_std
        )
        features = self.teacher(images, grids, blocks)
        summary, merge = features.pop(SUMMARY, None), self.config.patch_merge
        shapes = image_grid_thw.tolist()
        taught = {block: merge_neighbours(f, shapes, merge).mean(1) for block, f in features.items()}
        if summary is not None:
            repeated = [said.expand(h * w // merge**2, -1) for said, (h, w) in zip(summary.split(1), grids)]
            taught[SUMMARY] = torch.cat(repeated)
        return taught


class _EnoughBlocks(Exception):
    """Ends a forward pass that needs no further blocks."""


def _keep_states(states, block, stop, hidden):
    states[block] = hidden
    if stop:
        raise _EnoughBlocks
