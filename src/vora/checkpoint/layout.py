"""What lies in a model folder: one typed description, written beside everything that is saved, and read here alone."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from pydantic import TypeAdapter
from safetensors import safe_open

from vora.build.hub import loading, located
from vora.checkpoint.adapter import CONFIG_FILE, read_adapter_config
from vora.checkpoint.lineage import read_card
from vora.checkpoint.names import HUB_ID_OF_ALIAS, is_hub_id, loadable, published
from vora.checkpoint.run_directory import read_recipe, run_of, weights_of_run
from vora.distill.blockwise import SHIFTS, SUMMARY, Pair

INFO_FILE = "vora.json"
HEADS_FILE = "distillation.safetensors"
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"]  # on the hub, of the same weights

Kind = Literal["adapter", "unmerged", "merged", "llm"]


@dataclass(frozen=True)
class AdapterInfo:
    """A vision LoRA: of this rank, in so many blocks from the bottom, on the linear layers of these names."""

    rank: int
    num_blocks: int
    target_modules: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointInfo:
    """A model folder: an "adapter" (vision LoRA and patch embedding without their LLM), "unmerged" (a whole model and
    an adapter beside it), "merged" (a whole model), or an "llm" (no vision).

    Encoder (of LLaVA's way) and teacher are, of a run, as its recipe names them; else hub ids, or of folders the last
    part, as in all that is published.
    """

    kind: Kind
    path: Path  # of a run, its best checkpoint, else its `final`, else its newest checkpoint
    model_type: str  # `vora`, `vora_llava`, or an LLM's
    dtype: str
    stage: Literal["pretrain", "finetune"] | None = None
    base_llm: str | None = None  # hub id or alias of the LLM it began with; of a run perhaps a folder, else None then
    llm_digest: str | None = None  # `digest_of` the LLM that an adapter goes over
    adapter: AdapterInfo | None = None
    encoder: str | None = None
    teacher: str | None = None
    max_images: int | None = None  # most of a sample that it was trained on; None where that is not known
    block_pairs: tuple[Pair, ...] = ()  # (student block, teacher block or `SUMMARY`) of the distillation
    has_heads: bool = False  # of the distillation, beside it
    has_processor: bool = False  # with its tokenizer
    run: Path | None = None  # the directory that it belongs to
    source: str | None = None  # what that run went on from, as its recipe names it

    @property
    def is_llava(self) -> bool:
        return self.model_type == "vora_llava"


def read_info(path: Path | str) -> CheckpointInfo:
    """What lies in a folder, the directory of a run, or under a hub id (which is fetched). ValueError where nothing is
    there that this package or transformers saved, or a run that has saved nothing yet."""
    if str(path) in HUB_ID_OF_ALIAS:
        raise ValueError(f"{path} is an LLM without vision: train some with `vora train`, or name a VoRA model.")
    folder = fetched(path)
    run = run_of(folder)
    if run == folder:
        folder = weights_of_run(run)
    if not (folder / "config.json").exists():
        raise ValueError(_is_no_model(folder))
    info = _written_info(folder) if (folder / INFO_FILE).exists() else _older_info(folder)
    has_processor = (folder / "processor_config.json").exists() and (folder / "tokenizer_config.json").exists()
    info = replace(info, has_heads=(folder / HEADS_FILE).exists(), has_processor=has_processor)
    return info if run is None else as_run_names(info, run)


def write_info(info: CheckpointInfo, folder: Path) -> None:
    """Write a description into a folder that has just been saved; folders of this machine stay out of it."""
    info = replace(
        info,
        base_llm=loadable(info.base_llm),
        encoder=info.encoder and published(info.encoder),
        teacher=info.teacher and published(info.teacher),
    )
    seen = ("path", "run", "source", "has_heads", "has_processor")  # when it is read
    values = {name: value for name, value in asdict(info).items() if name not in seen}
    (folder / INFO_FILE).write_text(json.dumps(values, indent=1) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """The files of a whole model's weights."""
    return sorted([*folder.glob("model.safetensors"), *folder.glob("model-*.safetensors")])


def fetched(name: Path | str) -> Path:
    """The folder of a name: itself, or the snapshot of a hub id. ValueError where it is neither."""
    place = located(name, "The model", "me/my-vora")
    if os.path.exists(place):
        return Path(place)
    with loading(place, "The model"):
        return Path(snapshot_download(place, ignore_patterns=OTHER_FORMATS))


def _is_no_model(folder: Path) -> str:
    """What to do about a path without a model."""
    if folder.is_file():
        return f"{folder} is a file: name the folder of the model, such as {folder.absolute().parent}."
    inside = [one for one in sorted(folder.iterdir()) if run_of(one) == one or (one / "config.json").exists()]
    if inside:
        names = ", ".join(map(str, inside[:3]))
        return f"{folder} is no model and no run, but holds {len(inside)} of them: name one, such as {names}."
    if (folder / "adapter_config.json").exists():
        return f"{folder} is an adapter without vision: merge it into its LLM with PEFT, and train that as model.llm."
    found = f"{sum(1 for _ in folder.iterdir())} other files"
    return (
        f"{folder} holds no config.json and no recipe.yaml (but {found}), so it is no saved model and no run of vora "
        "train: check the path."
    )


def _written_info(folder: Path) -> CheckpointInfo:
    try:
        values = json.loads((folder / INFO_FILE).read_text())
        return TypeAdapter(CheckpointInfo).validate_python(values | {"path": folder})
    except (ValueError, TypeError) as error:
        cause = f"{folder / INFO_FILE} is no description of a model ({' '.join(str(error).split())})"
        raise ValueError(f"{cause}: delete it, and it is read from the files.") from None


def as_run_names(info: CheckpointInfo, run: Path) -> CheckpointInfo:
    """A run's own description, with the paths of this machine that its recipe has and published files have not."""
    recipe = read_recipe(run)
    model, teacher = recipe["model"], recipe.get("teacher") or {}
    return replace(
        info,
        stage=recipe.get("stage", "pretrain"),
        base_llm=model.get("llm") or info.base_llm,
        encoder=model.get("encoder") or info.encoder,
        teacher=teacher.get("name") or info.teacher,
        run=run,
        source=model.get("vora"),
    )


def _older_info(folder: Path) -> CheckpointInfo:
    """Of a folder that was saved without a description: by its files, and its card."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == "vora" and "aux_vision" in config:
        raise ValueError(
            f"{folder} is of the paper's code: vora import-reference {folder} --llm LLM -o OUT, and name OUT."
        )
    text, card, adapter = config.get("text_config") or config, read_card(folder) or {}, None
    if (folder / CONFIG_FILE).exists():
        lora = read_adapter_config(folder)
        adapter = adapter_info(lora.r, lora.layers_to_transform, lora.target_modules)
    kind: Kind = "merged"
    if not config.get("model_type", "").startswith("vora"):
        kind = "llm"
    elif adapter is not None:
        kind = "unmerged" if weight_files(folder) else "adapter"
    recipes = [stage["recipe"] for stage in card.get("stages", []) if (stage.get("recipe") or {}).get("teacher")]
    run = run_of(folder)
    teacher = (read_recipe(run).get("teacher") if run else None) or (recipes[-1]["teacher"] if recipes else {})
    named = {name: value for name, value in card.items() if value not in ("none", "not stated")}
    known_llm = named.get("base_llm", "") if is_hub_id(named.get("base_llm", "")) else None
    known_llm = {hub_id: alias for alias, hub_id in HUB_ID_OF_ALIAS.items()}.get(known_llm or "", known_llm)
    return CheckpointInfo(
        kind=kind,
        path=folder,
        model_type=config.get("model_type", ""),
        dtype=config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32",
        stage=card["stages"][-1]["stage"] if card else None,
        base_llm=loadable(text.get("_name_or_path")) or known_llm,
        llm_digest=config.get("llm_digest"),
        adapter=adapter,
        encoder=named.get("encoder"),
        teacher=named.get("teacher"),
        block_pairs=_pairs_of_heads(folder, teacher, named.get("teacher", "")),
    )


def adapter_info(rank: int, blocks: list[int], target_modules: Any) -> AdapterInfo:
    """As PEFT's configuration says it."""
    return AdapterInfo(rank, len(blocks), tuple(sorted(target_modules)))


def _pairs_of_heads(folder: Path, teacher: dict[str, Any], name: str) -> tuple[Pair, ...]:
    """The pairs that distill heads were trained for; none where only the teacher's depth would tell. Where the
    recipe's section `teacher` is not known and so empty, heads that begin with what enters block 0 come from the
    released code (see `block_pairs`)."""
    if not (folder / HEADS_FILE).exists() or teacher.get("spread"):
        return ()
    with safe_open(folder / HEADS_FILE, "pt") as file:
        heads = {key.split(".")[1] for key in file.keys() if key.startswith("heads.")}
    blocks, pairing = sorted(int(head) for head in heads - {SUMMARY}), teacher.get("pairing") or "outputs"
    if -1 in blocks and pairing == "outputs":
        pairing = "inputs" if "aimv2" in name.lower() else "hidden_states"
    student, teachers = SHIFTS[pairing]
    pairs: list[Pair] = [(block, block + teachers - student) for block in blocks]
    return (*pairs, (blocks[-1], SUMMARY)) if blocks and SUMMARY in heads else tuple(pairs)
