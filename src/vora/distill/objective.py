"""What a training step minimizes: total = sum of weight * term, over one forward pass of the student.

Dims: B rows, T tokens, P patches, N images, L labels, I image tokens, R rows of text, D LLM width, D_t teacher width,
m = patch_merge.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vora.distill.blocks import block_outputs, only_first_blocks
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation
from vora.distill.branches import inputs_of_branches
from vora.distill.label_loss import label_losses
from vora.distill.teacher import TeacherProtocol, images_of_patches
from vora.distill.text_kl import divergence, lora_off, unexplained
from vora.model.patch_embed import merge_neighbours

if TYPE_CHECKING:
    from peft import PeftModel

    from vora.model.configuration_vora import VoraConfig
    from vora.model.image_processing_vora import VoraImageProcessor
    from vora.model.modeling_vora import VoraForConditionalGeneration

LOSSES = ("lm_loss", "answer_loss", "distill_loss", "text_loss")  # see `Objective.forward`


@dataclass
class MicroBatch:
    """A packed batch, see `Objective.forward`, and what the student made of it."""

    inputs: dict[str, Tensor]  # with `images` those of `VoraModel.forward`
    images: dict[str, Tensor]
    targets: Tensor
    label_places: Tensor
    image_places: Tensor
    label_weights: Tensor | None = None
    text_rows: Any = None
    text_places: Any = None
    text_inputs: Any = None  # of rows of text that the student has not run
    num_items_in_batch: Tensor | float | None = None
    num_micro_batches: int = 1
    num_image_tokens: float | None = None  # of the step, by which the distillation's sum is divided
    num_text_tokens: float | None = None  # of the step, by which that of text to keep is
    in_branches: bool = False  # one row, see `vora.data.packing.images_in_branches`
    only_paired_blocks: bool = False  # the student ran no block above the last paired one
    hidden_states: Any = None  # float[B, T, D] after all blocks and the last norm; None with `only_paired_blocks`
    block_states: dict[int, Tensor] = field(default_factory=dict)  # {paired block: float[B, T, D]}


@dataclass
class Term:
    """A part of the objective. A term of your own: subclass, and append it to `Objective.terms`."""

    weight: float = 1.0

    def applies(self, objective: "Objective", batch: MicroBatch) -> bool:
        """Whether a batch holds something that this term is of."""
        raise NotImplementedError

    def __call__(self, objective: "Objective", batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(this micro-batch's share of the step's loss, before the weight; the losses to report, by name)."""
        raise NotImplementedError


class LanguageModeling(Term):
    """Next-token cross-entropy at the labels, each of which counts alike or by its weight."""

    def applies(self, objective: "Objective", batch: MicroBatch) -> bool:
        return len(batch.label_places) > 0

    def __call__(self, objective: "Objective", batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        each = label_losses(objective.vora, batch.hidden_states, batch.targets, batch.label_places)
        total = batch.num_items_in_batch
        if batch.label_weights is None:
            loss = each.sum() / (len(each) if total is None else total)
            return loss, {"lm_loss": loss}
        loss = (batch.label_weights * each).sum() / (batch.label_weights.sum() if total is None else total)
        return loss, {"answer_loss": loss, "lm_loss": each.detach().mean() / batch.num_micro_batches}


class TextKL(Term):
    """How far the LLM is from itself without LoRA on rows of text: the KL divergence, or, where only the paired blocks
    ran, the distance of the last one's output (`vora.distill.text_kl`). A mean over the step's tokens."""

    def applies(self, objective: "Objective", batch: MicroBatch) -> bool:
        return batch.text_places is not None

    def __call__(self, objective: "Objective", batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        vora, early, rows = objective.vora, batch.only_paired_blocks, batch.text_rows
        hidden, states = batch.hidden_states, batch.block_states
        if rows is None:
            of_rows, rows = dict(batch.text_inputs), slice(None)
        else:
            of_rows = {name: batch.inputs[name][rows] for name in ("input_ids", "position_ids", "seen_until")}
        # embeddings, for with tokens alone a GPU would be waited for, to see whether images are missing
        of_rows["inputs_embeds"] = vora.get_input_embeddings()(of_rows.pop("input_ids"))
        if batch.text_inputs is not None:
            hidden, states = objective.run_student(of_rows, early, early)
        with torch.no_grad(), lora_off(vora):
            own_hidden, own_states = objective.run_student(of_rows, early, early)
        own: Any = own_states[max(own_states)] if early else own_hidden
        reached: Any = states[max(states)] if early else hidden
        reached, own = (states.flatten(0, 1)[batch.text_places] for states in (reached[rows], own))
        of_logits = vora.logits, reached, own, vora.lm_head.out_features
        loss = unexplained(reached, own) if early else divergence(*of_logits)
        count, total = len(batch.text_places), batch.num_text_tokens
        return loss * (1 / batch.num_micro_batches if total is None else count / total), {"text_loss": loss}


class Distillation(Term):
    """The paired blocks' outputs at image tokens against the teacher's features (`BlockwiseDistillation`)."""

    def applies(self, objective: "Objective", batch: MicroBatch) -> bool:
        return objective.teacher is not None and len(batch.image_places) > 0

    def __call__(self, objective: "Objective", batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        places, first = batch.image_places, batch.targets.numel() - len(batch.image_places)
        states = {
            block: hidden.flatten(0, 1)[first:] if batch.in_branches else hidden.flatten(0, 1)[places]
            for block, hidden in batch.block_states.items()
        }
        features, count = objective.teach(**batch.images), batch.num_micro_batches
        loss, pair_losses = objective.distillation(states, features, count)
        share = 1 / count if batch.num_image_tokens is None else len(places) / batch.num_image_tokens
        return share * loss, {"distill_loss": loss, "pair_losses": pair_losses}


class Objective(nn.Module):
    """The student, in stage 1 the distillation heads beside it, and the terms of the loss.

    Call it with a packed batch (`vora.data.packing`) in any training loop: `objective(**batch)["loss"].backward()`.

    Args:
        student: a `VoraForConditionalGeneration`, or the `PeftModel` around it (`attach_vision_lora`).
        image_processor: the student's, for its normalisation; needed with a teacher, as is `distillation`.
        teacher: None to learn from text alone.
        distill_weight: 1 in the paper.
        text_kl_weight: of what keeps text as the LLM has it.
    """

    distillation: Any  # BlockwiseDistillation or None

    def __init__(
        self, student: "VoraForConditionalGeneration | PeftModel", image_processor: "VoraImageProcessor | None" = None,
        teacher: TeacherProtocol | None = None, distillation: BlockwiseDistillation | None = None,
        distill_weight: float = 1.0, text_kl_weight: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student = student
        self.image_processor: Any = image_processor
        self.distillation = distillation
        self.terms: list[Term] = [LanguageModeling(), TextKL(text_kl_weight), Distillation(distill_weight)]
        self._teacher = [teacher]  # in a list, so that it is neither trained nor saved nor wrapped with the student

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def set_teacher(self, teacher: TeacherProtocol | None) -> None:
        self._teacher = [teacher]

    @property
    def vora(self) -> "VoraForConditionalGeneration":
        """The bare `VoraForConditionalGeneration`, under PEFT or not."""
        return self.student.get_base_model() if hasattr(self.student, "get_base_model") else self.student

    @property
    def config(self) -> "VoraConfig":
        return self.vora.config

    @property
    def paired_blocks(self) -> list[int]:
        """The student's blocks that a teacher's are paired with, ascending."""
        return [] if self.distillation is None else sorted({student for student, _ in self.distillation.pairs})

    @property
    def _no_split_modules(self) -> list[str]:
        """What FSDP wraps one by one: the LLM's blocks."""
        return self.vora.model._no_split_modules

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, num_blocks: int | None = None, **kwargs: Any
    ) -> None:
        """Keep only what enters a block, or a distill head, and compute the rest again when gradients are.

        Args:
            num_blocks: of so many blocks, the first ones; all by default. The first are the right ones: they are
                computed again last, when what the others kept is free, so any other choice of as many needs more.

        Raises:
            ValueError: the LLM has fewer blocks, or they are recomputed all or none.
        """
        blocks: Any = self.vora.model.blocks
        how = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
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

    def vision_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that images alone can teach: patch embedding, heads, and LoRA up to the last
        paired block; none without distillation."""
        if self.distillation is None:
            return []
        blocks = self.vora.model.blocks[: self.paired_blocks[-1] + 1]
        parts = [self.vora.model.patch_embedding, self.distillation, *blocks]
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def freeze_vision(self) -> None:
        """Leave what images alone can teach as it is, and ask no teacher; ValueError if nothing else learns."""
        for parameter in self.vision_parameters():
            parameter.requires_grad_(False)
        self.set_teacher(None)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            last = self.paired_blocks[-1]
            raise ValueError(
                f"With vision frozen 0 parameters are left to learn: block {last} is paired, and no LoRA lies above "
                f"it. Raise lora.num_blocks above {last + 1}, or teacher.vision_lr_scale above 0."
            )

    def forward(
        self, targets: Tensor, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None,
        label_places: Tensor | None = None, label_weights: Tensor | None = None, image_places: Tensor | None = None,
        text_rows: Tensor | None = None, text_places: Tensor | None = None, distill_only: Tensor | bool | None = None,
        num_samples: Tensor | int | None = None, num_items_in_batch: Tensor | float | None = None,
        num_micro_batches: int = 1, num_image_tokens: float | None = None, num_text_tokens: float | None = None,
        branches: Tensor | None = None, **inputs: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Named losses of a packed batch.

        Args:
            targets: int[B, T], the token that each place should predict, -100 where masked.
            pixel_values, image_grid_thw, inputs: as for `VoraModel.forward`.
            label_places, image_places: int[L] and int[I], where in the flattened rows something is to be predicted
                and where image tokens are, if that is known: then no GPU is waited for.
            label_weights: float[L], how much each label counts; None: all alike.
            text_rows, text_places: int[R] and int[K], which rows hold text alone that is to stay as the LLM has it,
                and where in them, flattened, its tokens are.
            distill_only: False where the steps that only distill are over, though this batch has nothing to predict.
            num_samples: for who counts, not used here.
            num_items_in_batch: label tokens of the whole optimizer step, or their summed weights, by which what the
                language loss adds to `loss` is divided.
            num_micro_batches: of the step, by which the other terms are divided in `loss`.
            num_image_tokens, num_text_tokens: of the whole step, image tokens and those of `text_places`, so that in
                `loss` each counts alike, in whatever micro-batch.
            branches: int[G, 2] on the host, of one row of images alone (`vora.data.packing.images_in_branches`);
                text that is to stay is then in inputs that begin with `text_`.

        Returns:
            `loss`; `lm_loss` if there are targets, each label counting alike, and with weights `answer_loss`, which is
            learned then; with a teacher and images `distill_loss` and `pair_losses` float[pairs]; with text to keep
            `text_loss`. With images alone only the blocks up to the last paired one run, after which text is kept.
        """
        if label_places is None:
            label_places = (targets != -100).flatten().nonzero()[:, 0]
        if image_places is None:
            image_places = (inputs["input_ids"] == self.config.image_token_id).flatten().nonzero()[:, 0]
        images: Any = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        images = {} if pixel_values is None else images
        text_inputs: Any = {name[5:]: inputs.pop(name) for name in list(inputs) if name.startswith("text_")} or None
        batch = MicroBatch(
            inputs, images, targets, label_places, image_places, label_weights, text_rows, text_places,
            text_inputs, num_items_in_batch, num_micro_batches, num_image_tokens, num_text_tokens,
            branches is not None,
        )  # fmt: skip
        batch.only_paired_blocks = (
            len(label_places) == 0 and self.distillation is not None and (distill_only is None or bool(distill_only))
        )
        if not (terms := [term for term in self.terms if term.applies(self, batch)]):
            raise ValueError(
                f"All {targets.numel()} labels are masked (-100), and there is no image and no text to keep: there is "
                "nothing to learn. Check the labels, or leave that batch out."
            )
        collects = batch.only_paired_blocks or (self.teacher is not None and len(image_places) > 0)
        given = inputs | images
        if branches is not None:
            given = inputs_of_branches(self.vora, inputs["input_ids"], inputs["position_ids"], images, branches)
        batch.hidden_states, batch.block_states = self.run_student(given, collects, batch.only_paired_blocks)
        losses: dict[str, Any] = {"loss": 0.0}
        for term in terms:
            loss, named = term(self, batch)
            losses |= named | {"loss": losses["loss"] + term.weight * loss}
        if self.teacher is not None and "distill_loss" not in losses:
            self.distillation.without_images(num_micro_batches)
        return losses

    def weighted(self, losses: Mapping[str, float]) -> float:
        """The total of named losses of `forward`, each with its term's weight."""
        language, text_kl, distillation = (term.weight for term in self.terms[:3])
        learned = "answer_loss" if "answer_loss" in losses else "lm_loss"  # which goes unlearned then
        weights = {learned: language, "text_loss": text_kl, "distill_loss": distillation}
        return sum(weight * losses[name] for name, weight in weights.items() if name in losses)

    def run_student(
        self, inputs: dict[str, Tensor], collects: bool, only_paired_blocks: bool
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The student's (`MicroBatch.hidden_states`, `MicroBatch.block_states`), the latter only if it `collects`."""
        model, wanted = self.vora.model, self.paired_blocks if collects else []
        held: AbstractContextManager[None] = nullcontext()
        if only_paired_blocks:
            held = only_first_blocks(model.language_model, model.blocks, max(1, wanted[-1] + 1))
        with block_outputs(model.blocks, wanted) as states, held:
            hidden_states = model(**inputs, use_cache=False).last_hidden_state
        return (None if only_paired_blocks else hidden_states), states

    def teach(
        self, pixel_values: Tensor, image_grid_thw: Tensor, blocks: Iterable[int | str] | None = None
    ) -> dict[int | str, Tensor]:
        """What each image token is to say: the mean of the teacher's features of its m x m patches, which teaches
        better than all of them (dev/LOG.md).

        Returns:
            {teacher block or `SUMMARY`, by default the paired ones: float[P / m^2, D_t]}; the summary is the same at
            all tokens of an image.
        """
        if self.teacher.device != pixel_values.device:  # it is no part of what the Trainer moves
            self.teacher.to(pixel_values.device)
        if blocks is None:
            blocks = dict.fromkeys(teacher for _, teacher in self.distillation.pairs)
        shapes, merge, processor = image_grid_thw.tolist(), self.config.patch_merge, self.image_processor
        grids = [(rows, columns) for frames, rows, columns in shapes for _ in range(frames)]
        how = self.config.patch_size, processor.image_mean, processor.image_std
        features = self.teacher(images_of_patches(pixel_values, grids, *how), grids, list(blocks))
        summary = features.pop(SUMMARY, None)
        targets = {block: merge_neighbours(f, shapes, merge).mean(1) for block, f in features.items()}
        if summary is not None:
            repeated = [one.expand(h * w // merge**2, -1) for one, (h, w) in zip(summary.split(1), grids)]
            targets[SUMMARY] = torch.cat(repeated)
        return targets
