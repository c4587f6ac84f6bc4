"""What a training step computes, counted from the objective's own layers, as PyTorch's FlopCounterMode counts: without
norms, activations and embeddings, and with every pair of places of a row (or segment), seen or masked."""

from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from vora.distill.label_loss import labels_at_once
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher

SPECIAL_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # beside a ViT's patches


@dataclass
class Row:
    """What one packed row holds."""

    num_tokens: float  # padding included
    num_images: float  # frames count as images
    tokens_per_image: float
    num_labels: float  # places at which something is predicted; 0 in rows of images alone
    num_segments: float = 1  # parts that attend by themselves (`segmented_sdpa`)

    @property
    def num_image_tokens(self) -> float:
        return self.num_images * self.tokens_per_image


def sequence_flops(objective: Objective, row: Row, num_recomputed: int = 0, num_rows: int = 1) -> dict[str, float]:
    """{part: FLOPs} of one row, forward and backward, and their sum `total`. The first `num_recomputed` blocks are
    computed again in the backward pass, and the heads; so are the logits of a batch of `num_rows` if they are made in
    parts (`label_losses`)."""
    config, paired = objective.config.get_text_config(), objective.paired_blocks
    num_pairs = 0 if objective.distillation is None else len(objective.distillation.pairs)
    blocks = list(objective.vora.model.blocks)
    if not row.num_labels and paired:
        blocks = blocks[: paired[-1] + 1]
    parts = dict.fromkeys(("student_forward", "student_backward", "lora", "teacher", "heads", "recomputation"), 0.0)
    width_of_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * row.num_tokens**2 / row.num_segments * config.num_attention_heads * width_of_head
    for index, block in enumerate(blocks):
        base, base_trained, lora = layer_sizes(block)
        parts["student_forward"] += 2 * base * row.num_tokens + attention
        parts["student_backward"] += 2 * (base + base_trained) * row.num_tokens + 2 * attention
        parts["lora"] += 6 * lora * row.num_tokens
        if index < num_recomputed:
            parts["recomputation"] += 2 * (base + lora) * row.num_tokens + attention
    head = objective.vora.lm_head.weight
    parts["student_forward"] += 2 * head.numel() * row.num_labels
    parts["student_backward"] += 2 * head.numel() * row.num_labels * (2 if head.requires_grad else 1)
    num_labels = round(num_rows * row.num_labels)
    if num_labels and labels_at_once(num_labels, len(head)) < num_labels:
        parts["recomputation"] += 2 * head.numel() * row.num_labels
    embedding = objective.vora.model.patch_embedding
    embedding = getattr(embedding, "modules_to_save", {"default": embedding})["default"]
    patches = row.num_image_tokens * objective.config.patch_merge**2
    cutting = 2 * embedding.patch.weight.numel() * patches
    projection = 2 * embedding.projection.weight.numel() * row.num_image_tokens
    parts["student_forward"] += cutting + projection
    parts["student_backward"] += cutting + 2 * projection
    if objective.teacher is not None:
        parts["teacher"] = row.num_images * teacher_flops(objective.teacher, patches / max(row.num_images, 1e-9))
        heads = 2 * num_pairs * config.hidden_size * objective.teacher.hidden_size * row.num_image_tokens
        parts["heads"] = 3 * heads
        parts["recomputation"] += heads if num_recomputed else 0
    return parts | {"total": sum(parts.values())}


def layer_sizes(block: nn.Module) -> tuple[int, int, int]:
    """(weights of linear layers, those of them that train, weights of LoRA) of a transformer block."""
    base = trained = lora = 0
    for name, module in block.named_modules():
        if isinstance(module, LoraLayer) or not isinstance(module, nn.Linear | Conv1D):
            continue
        size = module.weight.numel()
        if "lora_" in name:
            lora += size
        else:
            base += size
            trained += size * module.weight.requires_grad
    return base, trained, lora


def teacher_flops(teacher: Teacher, num_patches: float) -> float:
    """FLOPs of a teacher on one image of so many patches; one that cannot resample its positions sees its own grid."""
    if not teacher.takes_any_grid:
        num_patches = teacher.own_grid[0] ** 2
    width, embeddings = teacher.hidden_size, teacher.vit.embeddings.named_parameters()
    num_tokens = num_patches + sum(p.numel() // width for name, p in embeddings if name in SPECIAL_TOKENS)
    linear = sum(layer_sizes(block)[0] for block in teacher.blocks)
    attention = 4 * num_tokens**2 * width * len(teacher.blocks)
    pooling = 4 * num_tokens * width**2 if hasattr(teacher.vit, "head") else 0  # keys and values of SigLIP and AIMv2
    return 2 * linear * num_tokens + attention + pooling + 2 * teacher.embedding.weight.numel() * num_patches
