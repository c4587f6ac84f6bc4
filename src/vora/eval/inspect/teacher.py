"""What a model learned to see from: its teacher, the distill heads beside it, and the pairs of their blocks."""

from pathlib import Path

from safetensors.torch import load_file

from vora.build.lora import DISTILLATION_FILE
from vora.checkpoint.card import read_card
from vora.checkpoint.names import is_hub_id
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, Pair, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher


def take_teacher(objective: Objective, model: str, name: str | None = None) -> tuple[list[Pair], str | None]:
    """Give an objective the teacher to compare it with, and of an unmerged model the heads that it was trained with.

    Args:
        objective: a run's may have its teacher and heads already.
        model: folder or hub id that it comes from.
        name: folder or hub id of a teacher; by default the one that the objective has, else the one that the model's
            card names, if that is on the hub.

    Returns:
        ([(student block, teacher block)] to show side by side, what a reader must know about the choice or None).
        The pairs are those of the heads; without heads, those of the recipe on the model's card; else `block_pairs`.

    Raises:
        ValueError: the teacher that `name` asks for cannot be loaded.
    """
    card = read_card(model) or {}
    remark = _choose(objective, model, name, card.get("teacher", "not stated"))
    if objective.teacher is None:
        return [], remark
    if objective.distillation is not None:
        return [pair for pair in objective.distillation.pairs if pair[1] != SUMMARY], remark
    depth, teacher_depth = len(objective.vora.model.blocks), objective.teacher.num_blocks
    recipes = [stage["recipe"] for stage in card.get("stages", []) if (stage.get("recipe") or {}).get("teacher")]
    how = recipes[0]["teacher"] if recipes else {"spread": teacher_depth > depth}
    num_blocks = (recipes[0].get("lora") or {}).get("num_blocks") if recipes else None
    pairing = how.get("pairing", "outputs")
    if pairing != "outputs" or num_blocks is None:
        num_blocks = min(depth, teacher_depth)
    return block_pairs(num_blocks, teacher_depth, how.get("spread", False), pairing), remark


def _choose(objective: Objective, model: str, name: str | None, named: str) -> str | None:
    """Put teacher and heads into an objective; what there is to say about it.

    Args:
        named: the teacher that the model's card names.
    """
    has = objective.teacher.name if objective.teacher is not None else None
    if has is not None and name in (None, has):
        return None
    if name is None and not is_hub_id(named):
        known = "" if named in ("none", "not stated") else f" The model's card calls it {named}, without its folder."
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
    if has is not None:
        return f"The heads were trained with {has}, not with {name}, and are left aside."
    if Path(name or named).name == Path(named).name:
        objective.distillation = heads_beside(model, objective.teacher, objective.config.get_text_config().hidden_size)
    return None


def heads_beside(model: str, teacher: Teacher, width: int) -> BlockwiseDistillation | None:
    """The distill heads that lie beside an unmerged model, or None where there are none that fit the teacher.

    Which blocks they belong to follows from the first: heads that begin with what enters block 0 come from the
    released code (see `block_pairs`).

    Args:
        width: the student's.
    """
    file = Path(model) / DISTILLATION_FILE
    if not file.exists():
        return None
    state = load_file(file)
    pairing = "outputs"
    if "heads.-1.1.weight" in state:
        pairing = "inputs" if "aimv2" in teacher.vit.config.model_type else "hidden_states"
    num_heads = sum(name.endswith(".1.weight") for name in state)
    pairs = block_pairs(num_heads, teacher.num_blocks, pairing=pairing)
    distillation = BlockwiseDistillation(pairs, width, teacher.hidden_size).eval()
    shapes = {key: tensor.shape for key, tensor in distillation.state_dict().items()}
    if {key: tensor.shape for key, tensor in state.items()} != shapes:
        return None
    distillation.load_state_dict(state)
    return distillation
