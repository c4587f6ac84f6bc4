"""What a model learned to see from: its teacher, the distill heads beside it, and the pairs of their blocks."""

from pathlib import Path

from vora.checkpoint.layout import CheckpointInfo, read_info
from vora.checkpoint.load import distillation_of
from vora.checkpoint.names import is_hub_id
from vora.distill.blockwise import SUMMARY, Pair, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher


def take_teacher(objective: Objective, model: str, name: str | None = None) -> tuple[list[Pair], str | None]:
    """Give an objective the teacher to compare it with, and of a model with distill heads beside it these: ((student
    block, teacher block) pairs to show side by side: of the heads, else as the model names them, else `block_pairs`;
    what a reader must know about the choice or None).

    The teacher is by default the one that the objective has, else the one that the model (folder, run directory or hub
    id) names, if that can be found. ValueError if the one that `name` asks for cannot be loaded.
    """
    info = read_info(model)
    named = info.teacher or "not stated"
    remark = _choose(objective, info, name, named)
    teacher = objective.teacher
    if teacher is None:
        return [], remark
    pairs = info.block_pairs if _is_same(teacher.name, named) else ()
    if objective.distillation is not None:
        pairs = objective.distillation.pairs
    if pairs:
        return [pair for pair in pairs if pair[1] != SUMMARY], remark
    depth = len(objective.vora.model.blocks)
    return block_pairs(depth, teacher.num_blocks, spread=teacher.num_blocks > depth), remark


def _choose(objective: Objective, info: CheckpointInfo, name: str | None, named: str) -> str | None:
    """Put teacher and heads into an objective; what there is to say about it. `named` is the model's own teacher."""
    has = None if objective.teacher is None else objective.teacher.name
    if has is not None and name in (None, has):
        return None
    is_there = info.run is not None and Path(named).is_dir()  # only a run's recipe keeps a folder's whole path
    if name is None and not (is_hub_id(named) or is_there):
        known = "" if named == "not stated" else f" The model calls it {named}, without its folder."
        return f"No teacher to compare with: name its folder or hub id with --teacher.{known}"
    objective.distillation = None
    try:
        objective.set_teacher(Teacher.from_pretrained(name or named))
    except (OSError, ValueError) as error:
        if name is not None:
            raise
        return f"{' '.join(str(error).split())} So nothing is compared: name its folder with --teacher."
    if has is None and _is_same(name or named, named):
        heads = distillation_of(info)
        sizes = {len(head.get_parameter("1.weight")) for head in heads.heads.values()} if heads is not None else set()
        objective.distillation = heads if sizes == {objective.teacher.hidden_size} else None
    elif has is not None or info.has_heads:
        return f"The heads were trained with {has or named}, not with {name}, and are left aside."
    return None


def _is_same(teacher: str | None, named: str) -> bool:
    """Whether a teacher is the one that a model names, which may have moved since."""
    return Path(teacher or "").name == Path(named).name
