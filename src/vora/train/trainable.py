"""Which parts of a student train, counted, checked and shown before the first step."""

from rich.table import Column, Table
from torch import nn

from vora.distill.objective import Objective

TRAINED_FIRST = ("vision LoRA", "patch embedding", "projector", "distill heads")  # in stage pretrain
FROZEN_COPY = "frozen copy of the "


def part_of_model(name: str) -> str:
    """Which part of an `Objective` a parameter belongs to."""
    if name.startswith("distillation."):
        return "distill heads"
    if "lora_" in name:
        return "vision LoRA"
    if "patch_embedding.encoder." in name:
        return "encoder"
    if "patch_embedding" in name:
        part = "projector" if "patch_embedding.projector." in name else "patch embedding"
        return FROZEN_COPY + part if "original_module" in name else part
    return "LLM"


def trainable_counts(objective: nn.Module) -> dict[str, list[int]]:
    """{part: [trained parameters, all parameters]}."""
    counts: dict[str, list[int]] = {}
    for name, parameter in objective.named_parameters():
        count = counts.setdefault(part_of_model(name), [0, 0])
        count[0] += parameter.numel() * parameter.requires_grad
        count[1] += parameter.numel()
    return counts


def check_trainable(objective: nn.Module, stage: str) -> None:
    """Refuse to start unless exactly the parts that a stage trains do."""
    for part, (trained, total) in trainable_counts(objective).items():
        should = part != "encoder" if stage == "finetune" else part in TRAINED_FIRST
        if trained != (total if should else 0):
            raise ValueError(
                f"Stage {stage} should train {'all' if should else 'none'} of the {part}, but {trained:,} of its "
                f"{total:,} parameters would train: reset requires_grad, or start from a fresh model."
            )


def trainable_table(objective: Objective, stage: str) -> Table:
    """The table that a run prints before its first step."""
    table = Table("part", Column("trained", justify="right"), Column("of", justify="right"))
    table.title = f"What trains in stage {stage}"
    for part, (trained, total) in trainable_counts(objective).items():
        if not part.startswith(FROZEN_COPY):
            table.add_row(part, f"{trained:,}", f"{total:,}")
    if objective.teacher is not None:
        table.add_row("teacher (not saved)", "0", f"{sum(p.numel() for p in objective.teacher.parameters()):,}")
    return table
