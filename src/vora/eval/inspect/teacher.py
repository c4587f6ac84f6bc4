"""What a model learned to see from: its teacher, the distill heads beside it, and the pairs of their blocks."""

from pathlib import Path

from vora.checkpoint.layout import CheckpointInfo, read_info
from vora.checkpoint.lineage import read_card
from vora.checkpoint.load import distillation_of
from vora.checkpoint.names import is_hub_id
from vora.distill.blockwise import SUMMARY, Pair, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher


def take_teacher(objective: Objective, model: str, name: str | None = None) -> tuple[list[Pair], str | None]:
    """Give an objective the teacher to compare it with, and of a model with distill heads beside it these.

    Args:
        objective: it may have a teacher and heads already.
        model: folder, run directory or hub id that it comes from.
        name: folder or hub id of a teacher; by default the one that the objective has, else the one that the model
            names, if that can be found.

    Returns:
        ([(student block, teacher block)] to show side by side, what a reader must know about the choice or None).
        The pairs are those of the heads; without heads, those that the model or the recipe on its card names; else
        `block_pairs`.

    Raises:
        ValueError: the teacher that `name` asks for cannot be loaded.
    """
    info = read_info(model)
    named = info.teacher or "not stated"
    remark = _choose(objective, info, name, named)
    if objective.teacher is None:
        return [], remark
    if objective.distillation is not None:
        return [pair for pair in objective.distillation.pairs if pair[1] != SUMMARY], remark
    if info.block_pairs and _is_same(objective.teacher.name, named):
        return [pair for pair in info.block_pairs if pair[1] != SUMMARY], remark
    card = read_card(info.path) or {}
    depth, teacher_depth = len(objective.vora.model.blocks), objective.teacher.num_blocks
    recipes = [stage["recipe"] for stage in card.get("stages", []) if (stage.get("recipe") or {}).get("teacher")]
    how = recipes[0]["teacher"] if recipes else {"spread": teacher_depth > depth}
    num_blocks = (recipes[0].get("lora") or {}).get("num_blocks") if recipes else None
    pairing = how.get("pairing", "outputs")
    if pairing != "outputs" or num_blocks is None:
        num_blocks = min(depth, teacher_depth)
    return block_pairs(num_blocks, teacher_depth, how.get("spread", False), pairing), remark


def _choose(objective: Objective, info: CheckpointInfo, name: str | None, named: str) -> str | None:
    """Put teacher and heads into an objective; what there is to say about it.

    Args:
        named: the teacher that the model names.
    """
    has = objective.teacher.name if objective.teacher is not None else None
    if has is not None and name in (None, has):
        return None
    is_there = info.run is not None and Path(named).is_dir()  # only a run's recipe keeps a folder's whole path
    if name is None and not (is_hub_id(named) or is_there):
        known = "" if named == "not stated" else f" The model calls it {named}, without its folder."
        return f"No teacher to compare with: name its folder or hub id with --teacher.{known}"
    objective.distillation = None
    if name is not None and not (Path(name).is_dir() or is_hub_id(name)):
        raise ValueError(f"--teacher {name} is no folder, and no hub id (owner/name) either: name one of a plain ViT.")
    try:
        objective.set_teacher(Teacher.from_pretrained(name or named))
    except (OSError, ValueError) as error:
        cause = f"The teacher {name or named} cannot be loaded ({' '.join(str(error).split())})"
        if name is not None:
            raise ValueError(f"{cause}: name another folder or hub id with --teacher.") from None
        return f"{cause}, so nothing is compared: name its folder with --teacher."
    if has is None and _is_same(name or named, named):
        heads = distillation_of(info)
        state = heads.state_dict() if heads is not None else {}
        sizes = {len(tensor) for name, tensor in state.items() if name.endswith(".1.weight")}
        objective.distillation = heads if sizes == {objective.teacher.hidden_size} else None
    elif has is not None or info.has_heads:
        return f"The heads were trained with {has or named}, not with {name}, and are left aside."
    return None


def _is_same(teacher: str | None, named: str) -> bool:
    """Whether a teacher is the one that a model names, which may have moved since."""
    return Path(teacher or "").name == Path(named).name
