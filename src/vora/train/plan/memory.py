"""How much memory a training step needs on each device, part by part. Activations are traced: the objective's own
forward runs on tensors without storage (torch's FakeTensorMode), and what autograd saves is summed up."""

import copy
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from vora.distill.blocks import only_first_blocks
from vora.distill.blockwise import name_of
from vora.distill.label_loss import labels_at_once
from vora.distill.objective import Objective
from vora.model.attention import attention_masks
from vora.model.segmented_sdpa import SEGMENTED_SDPA
from vora.train.plan.flops import Row

STATES_OF_OPTIMIZER = {"adafactor": 0, "ademamix": 3, "adam": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}
# Share of what a step makes and frees that glibc's heap keeps: none, and all blocks computed again (dev/LOG.md)
HEAP_KEEPS = (0.35, 1.5)
BYTES_OF_STATE = {"4bit": 0.5, "8bit": 1, "32bit": 4}  # by the optimizer's name; else those of the parameter


def step_memory(
    objective: Objective, row: Row, num_rows: int, *, bf16: bool = False, num_recomputed: int = 0,
    accumulates: bool = False, optim: str = "adamw_torch", num_shards: int = 1, num_processes: int = 1,
) -> dict[str, float]:  # fmt: skip
    """{part: bytes} on one device at the moment of a step when most are in use, and their sum `total`. `loss` is zero
    when the optimizer's update is that moment, `gradients` when they do not exist yet.
    FSDP spreads weights, gradients and optimizer over `num_shards`, and gathers two blocks and what is in no block;
    without it, several processes hold gradients a second time, in DDP's buckets. Who accumulates holds those of
    earlier micro-batches in the forward pass."""
    found = traced(objective, row, num_rows, bf16, num_recomputed)
    gradients = bytes_of(trained_parameters(objective)) / num_shards
    blocks = [bytes_of(block.parameters()) for block in objective.vora.model.blocks]
    outside = bytes_of(objective.parameters()) - sum(blocks)  # embeddings, heads: gathered from forward to backward
    parts = {
        "frozen weights": bytes_of(p for p in objective.parameters() if not p.requires_grad) / num_shards,
        "trained weights": gradients,
        "optimizer": optimizer_bytes(objective, optim) / num_shards,
        "gradient buckets": gradients if num_processes > 1 and num_shards == 1 else 0,
        "gathered blocks": 0 if num_shards == 1 else 2 * max(blocks) + outside,
        "teacher": 0 if objective.teacher is None else bytes_of(objective.teacher.parameters()),
    }
    early = gradients if accumulates else 0  # gradients that are there before the backward pass
    at_loss, at_recomputation = (early, found.activations, found.loss), (early, found.recomputing, 0)
    peak = max([at_loss, at_recomputation, (gradients, found.one_block, 0)], key=sum)
    parts |= dict(zip(("gradients", "activations", "loss"), peak))
    return parts | {"total": sum(parts.values())}


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def optimizer_bytes(objective: nn.Module, optim: str) -> float:
    """What an optimizer keeps of all trained parameters; adafactor's rows and columns count as nothing, and an
    optimizer of an unknown name counts as Adam."""
    states = next((count for name, count in STATES_OF_OPTIMIZER.items() if name in optim), 2)
    size = next((size for mark, size in BYTES_OF_STATE.items() if mark in optim), None)
    return states * sum(p.numel() * (size or p.element_size()) for p in trained_parameters(objective))


@dataclass
class Traced:
    """Bytes of a step: saved until the losses; in use when the first of the blocks is computed again (0 where none
    is); saved by one block that keeps all; held by the losses at their largest."""

    activations: int
    recomputing: int
    one_block: int
    loss: int


def traced(objective: Objective, row: Row, num_rows: int, bf16: bool, num_recomputed: int) -> Traced:
    """What a step saves, found on tensors without storage."""
    attention = objective.vora.model.language_model.config._attn_implementation
    fake = copy.deepcopy(objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake.set_teacher(None)
        fake.to_empty(device="cpu")
        fake.vora.set_attn_implementation(SEGMENTED_SDPA if row.num_segments > 1 else attention)
        fake.train()
        found = saved_by_blocks(fake, row, num_rows, bf16, num_recomputed)
        embedding = saved_by_patch_embedding(fake, row, num_rows, bf16)
        found.activations += embedding
        found.recomputing += embedding if num_recomputed else 0
        found.loss = held_by_losses(fake, row, num_rows, bf16)
        return found


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Within it, what autograd saves for the backward pass is summed up, each storage once, parameters aside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        self._storages: dict[int, Any] = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._storages[storage._cdata] = storage
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> "Saved":  # type: ignore[override]
        super().__enter__()
        return self


def computing_in(bf16: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def saved_by_blocks(objective: Objective, row: Row, num_rows: int, bf16: bool, num_recomputed: int) -> Traced:
    """The `Traced` of the blocks alone."""
    lm, blocks = objective.vora.model.language_model, objective.vora.model.blocks
    length, width = round(row.num_tokens), objective.config.get_text_config().hidden_size
    masks: Any = torch.empty(num_rows, 1, length, length, dtype=torch.bool)
    kinds = set(getattr(lm.config, "layer_types", None) or ())
    if row.num_segments > 1:
        masks = masks_with_segments(lm.config, row, num_rows, bf16)
    elif len(kinds) > 1:
        masks = dict.fromkeys(kinds, masks)

    def saved(num_blocks: int, num_recomputed: int) -> int:
        if num_recomputed:
            objective.gradient_checkpointing_enable(num_blocks=num_recomputed)
        else:
            lm.gradient_checkpointing_disable()
        embeds = torch.empty(num_rows, length, width, dtype=objective.vora.dtype, requires_grad=True)
        positions = torch.empty(num_rows, length, dtype=torch.long)
        with only_first_blocks(lm, blocks, num_blocks), Saved(lm) as found, computing_in(bf16):
            lm(inputs_embeds=embeds, attention_mask=masks, position_ids=positions, use_cache=False)
        return found.num_bytes

    depth = len(blocks)
    if not row.num_labels and objective.distillation is not None:
        depth = max(student for student, _ in objective.distillation.pairs) + 1
    one_block, recomputing = saved(2, 0) - saved(1, 0), 0
    if num_recomputed:  # those above have been through their backward pass then, and their memory is free
        recomputing = saved(min(num_recomputed, depth), num_recomputed) + one_block
    return Traced(saved(depth, num_recomputed), recomputing, one_block, 0)


def masks_with_segments(config: Any, row: Row, num_rows: int, bf16: bool) -> Any:
    """`attention_masks` of rows of equal samples, each with its images first."""
    length = round(row.num_tokens)
    of_sample = length / row.num_segments
    with unset_fake_temporarily(), computing_in(bf16):  # segments follow from a mask's values
        places = torch.arange(length).expand(num_rows, -1)
        number = (places / of_sample).floor()
        ends = ((number + 1) * of_sample).ceil().long() - 1
        is_image = places - number * of_sample < row.num_image_tokens / row.num_segments
        states = torch.zeros(num_rows, length, 1, dtype=config.dtype)
        blocks = torch.where(is_image, number, -1).long()
        return attention_masks(config, states, None, None, None, blocks, ends.clamp(max=length - 1))


def saved_by_patch_embedding(objective: Objective, row: Row, num_rows: int, bf16: bool) -> int:
    """Bytes that the patch embedding saves."""
    embedding, config = objective.vora.model.patch_embedding, objective.config
    side, num_images = max(1, round(row.tokens_per_image**0.5)), round(num_rows * row.num_images)
    height, width = (config.patch_merge * max(1, round(size)) for size in (side, row.tokens_per_image / side))
    if not num_images:
        return 0
    pixels = torch.empty(num_images * height * width, config.num_channels * config.patch_size**2)
    grids = SimpleNamespace(tolist=lambda: [(1, height, width)] * num_images)  # a tensor without storage has no values
    with Saved(embedding) as found, computing_in(bf16):
        embedding(pixels, grids)
    return found.num_bytes


def held_by_losses(objective: Objective, row: Row, num_rows: int, bf16: bool) -> int:
    """Bytes of output layer, heads and losses at their largest: saved ones, and the gradient of the logits, of which
    there is one part at a time (`label_losses`)."""
    vora, heads, config = objective.vora, objective.distillation, objective.config.get_text_config()
    num_labels, num_images = round(num_rows * row.num_labels), round(num_rows * row.num_image_tokens)
    held = 0
    if num_labels:
        size = labels_at_once(num_labels, config.vocab_size)
        states = torch.empty(size, config.hidden_size, dtype=vora.dtype, requires_grad=True)
        with Saved(vora.lm_head) as found, computing_in(bf16):
            logits = vora.logits(states)
            nn.functional.cross_entropy(logits.float(), torch.empty(size, dtype=torch.long), reduction="sum")
        held += found.num_bytes + size * config.vocab_size * (4 + logits.element_size())
        if size < num_labels:  # what enters each part is kept for the second time
            held += num_labels * config.hidden_size * states.element_size()
    if heads is not None and num_images:
        width = heads.heads[name_of(heads.pairs[0])][1].out_features
        shape = {"size": (num_images, config.hidden_size), "dtype": vora.dtype, "requires_grad": True}
        of_pairs = {s: torch.empty(**shape) for s, _ in heads.pairs}
        features = {t: torch.empty(num_images, width) for _, t in heads.pairs}
        with Saved(heads) as found, computing_in(bf16):
            heads(of_pairs, features)
        held += found.num_bytes
        if heads.recomputes:  # one of them, once the others are done
            student, teacher = pair = heads.pairs[-1]
            with Saved(heads) as found, computing_in(bf16):
                heads.loss_of_pair(pair, of_pairs[student], features[teacher])
            held += found.num_bytes
    return held


def held_by_process(memory: dict[str, float], recomputed: float) -> dict[str, float]:
    """What a process holds beside its tensors, and the new total; `recomputed` is the share of blocks that are."""
    moving = memory["activations"] + memory["loss"] + memory["gradients"]
    kept = HEAP_KEEPS[0] + recomputed * (HEAP_KEEPS[1] - HEAP_KEEPS[0])
    heap = kept * moving if platform.system() == "Linux" else 0
    parts = {"Python and its libraries": resident_bytes(), "kept by the heap": heap}
    return parts | {"total": memory["total"] + sum(parts.values())}


def resident_bytes() -> float:
    """What this process holds in memory: Python and the libraries that a training process has too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 5e8
    return 1024 * int(status.read_text().partition("VmRSS:")[2].split()[0])
