"""The tensors of the paper's released checkpoints (github.com/Hon-Wong/VoRA, commit f138756): read and sorted.

Two layouts: stage 1 (`lora_A`, `lora_B` and `aux_vision` beside the LLM) and merged (the released weights).

Dims: D LLM width, D_v width of the patch embedding, p patch side, G side of the position grid, r rank.
"""

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]

PATCH_EMBEDDING_NAMES = {
    "vision_embedding.patchifier.proj.weight": "patch.weight",
    "vision_embedding.patchifier.proj.bias": "patch.bias",
    "vision_embedding.patchifier.norm.weight": "norm.weight",
    "vision_embedding.pos_embed": "position",
    "vision_embedding.out_proj.weight": "projection.weight",
}
LORA = re.compile(r"llm\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
HEAD = re.compile(r"aux_vision\.aux_layer_(\d+)\.([01])\.weight")
BIAS = re.compile(r"llm\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.bias")


def checkpoint_folder(checkpoint: Path | str) -> Path:
    """A local folder, or the snapshot of a hub id.

    Raises:
        ValueError: there is neither.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client raises many kinds
        cause = str(error).splitlines()[0]
        raise ValueError(f"{checkpoint} is no folder, and the hub does not give it: {cause}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file as a dict; ValueError where there is none."""
    try:
        return json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{path.parent} holds no {path.name}: it is no checkpoint.") from None


def read_tensors(folder: Path) -> Tensors:
    """{name: tensor} of all safetensors files of a folder, mapped into memory rather than read.

    Raises:
        ValueError: there are none, a shard that the index names is missing, or a file is broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} shards, such as {missing[0]}: fetch them.")
    if not files:
        raise ValueError(f"{folder} holds no safetensors files: convert its weights to them first.")
    tensors: Tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}
        except Exception as error:  # safetensors has an error of its own
            raise ValueError(f"Cannot read {file}: {error}.") from None
    return tensors


def sort_tensors(tensors: Tensors, folder: Path) -> dict[str, Tensors]:
    """{part: {name: tensor}}; the LLM's and the patch embedding's under our names, the others under the checkpoint's.

    Raises:
        ValueError: the layout is another, or tensors have no place here.
    """
    parts: dict[str, Tensors] = {part: {} for part in ("llm", "biases", "patch_embedding", "lora", "heads", "teacher")}
    unknown = []
    for name, tensor in tensors.items():
        if name in PATCH_EMBEDDING_NAMES:
            parts["patch_embedding"][PATCH_EMBEDDING_NAMES[name]] = tensor
        elif LORA.fullmatch(name):
            parts["lora"][name] = tensor
        elif HEAD.fullmatch(name):
            parts["heads"][name] = tensor
        elif name.startswith("aux_vision.aux_model."):
            parts["teacher"][name] = tensor
        elif BIAS.fullmatch(name):
            parts["biases"][name] = tensor
        elif name.startswith("llm."):
            parts["llm"][name.removeprefix("llm.")] = tensor
        else:
            unknown.append(name)
    if missing := sorted(set(PATCH_EMBEDDING_NAMES) - set(tensors)):
        raise ValueError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more of {len(PATCH_EMBEDDING_NAMES)} tensors of a "
            "patch embedding: it is no checkpoint of the released code with AIMv2Embedding."
        )
    if unknown:
        raise ValueError(
            f"{folder} has {len(unknown)} tensors that no part of the released code has, such as {unknown[0]}: "
            "nothing was imported."
        )
    return parts


def widest_dtype(parts: dict[str, Tensors]) -> torch.dtype:
    """The precision that holds every weight of the model exactly: trained parts may be wider than frozen ones."""
    dtypes = [tensor.dtype for part in ("llm", "biases", "patch_embedding") for tensor in parts[part].values()]
    return reduce(torch.promote_types, dtypes)


def lora_of(tensors: Tensors) -> tuple[Tensors, int, int, list[str]]:
    """A checkpoint's pairs under PEFT's names, with their rank, depth and targets.

    Raises:
        ValueError: the blocks do not have the same pairs, or the ranks differ.
    """
    found: dict[str, dict[int, Tensors]] = {}
    for name, tensor in tensors.items():
        block, layer, side = _groups(LORA, name)
        found.setdefault(layer, {}).setdefault(int(block), {})[side] = tensor
    depths = {len(blocks) for blocks in found.values()}
    ranks = {pair["A"].shape[0] for blocks in found.values() for pair in blocks.values() if len(pair) == 2}
    whole = all(len(pair) == 2 and block < len(blocks) for blocks in found.values() for block, pair in blocks.items())
    if len(depths) != 1 or len(ranks) != 1 or not whole:
        raise ValueError(
            f"The checkpoint's {len(tensors)} LoRA tensors are no pairs of one rank in its first blocks: depths "
            f"{sorted(depths)}, ranks {sorted(ranks)}. Is a shard missing?"
        )
    prefix = "base_model.model.model.language_model.layers"
    lora = {
        f"{prefix}.{block}.{layer}.lora_{side}.weight": tensor.float()
        for layer, blocks in found.items()
        for block, pair in blocks.items()
        for side, tensor in pair.items()
    }
    return lora, ranks.pop(), depths.pop(), sorted(layer.rpartition(".")[2] for layer in found)


def heads_of(tensors: Tensors) -> Tensors:
    """The released code's heads under the names of a `BlockwiseDistillation`, whose biases and means are zero then."""
    state = {"num_updates": torch.zeros((), dtype=torch.long)}
    for name, tensor in tensors.items():
        level, part = _groups(HEAD, name)
        student = int(level) - 1  # level i looks at what enters block i
        state[f"heads.{student}.{part}.weight"] = tensor.float().contiguous()
        if part == "1":
            state[f"heads.{student}.1.bias"] = torch.zeros(len(tensor))
            state[f"mean_{student}"] = torch.zeros(len(tensor))
    return state


def places_of(parts: dict[str, Tensors]) -> dict[str, tuple[int, int]]:
    """{where tensors went: (how many, how many parameters)}, empty parts left out."""
    where = {
        "llm": "LLM",
        "biases": "biases of the adapted projections (and the LLM's own)",
        "patch_embedding": "patch embedding",
        "lora": "vision LoRA",
        "heads": "distill heads",
        "teacher": "left behind: the frozen teacher, which trains nothing and is fetched by its name",
    }
    return {
        place: (len(parts[part]), sum(tensor.numel() for tensor in parts[part].values()))
        for part, place in where.items()
        if parts[part]
    }


def _groups(pattern: re.Pattern[str], name: str) -> tuple[str, ...]:
    match = pattern.fullmatch(name)
    assert match is not None, name
    return match.groups()
