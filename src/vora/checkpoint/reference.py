"""Checkpoints of the paper's released code (github.com/Hon-Wong/VoRA, commit f138756), made into ours.

Two layouts: stage 1 (`lora_A`, `lora_B` and `aux_vision` beside the LLM) and merged (the released weights). In both
the adapted projections have biases, also where the LLM has none: they were trained, so they are kept, exactly.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

from vora.build.base_llm import EXAMPLE, choose_image_token, load_tokenizer
from vora.build.from_llm import processor_from_llm
from vora.build.hub import loading, located, remote_code
from vora.build.lora import attach_vision_lora, keep_trained_in_fp32, merge_vision_lora
from vora.checkpoint.card import CardFacts, write_card
from vora.checkpoint.layout import HEADS_FILE, AdapterInfo, CheckpointInfo, fetched, write_info
from vora.checkpoint.load import AnyProcessor
from vora.checkpoint.names import loadable
from vora.checkpoint.save import Tensors, whole_folder, write_adapter_files
from vora.model.configuration_vora import VoraConfig
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

# Both of its teachers, CLIP and AIMv2, normalise like this.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

LLM, BIASES, PATCHES, LORA, HEADS, TEACHER, UNKNOWN = (
    "LLM",
    "biases of the adapted projections (and the LLM's own)",
    "patch embedding",
    "vision LoRA",
    "distill heads",
    "left behind: the frozen teacher, which trains nothing and is fetched by its name",
    "unknown",
)
# (part, its names in a checkpoint, our names); the first that matches counts
NAMES = (
    (LORA, r"llm\.model\.(layers\.\d+\..+\.lora_[AB])\.weight", r"model.language_model.\1.default.weight"),
    (BIASES, r"llm\.model\.(layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.bias)", r"model.language_model.\1"),
    (LLM, r"llm\.model\.(.+)", r"model.language_model.\1"),
    (LLM, r"llm\.(.+)", r"\1"),
    (PATCHES, "vision_embedding.patchifier.proj.weight", "model.patch_embedding.patch.weight"),
    (PATCHES, "vision_embedding.patchifier.proj.bias", "model.patch_embedding.patch.bias"),
    (PATCHES, "vision_embedding.patchifier.norm.weight", "model.patch_embedding.norm.weight"),
    (PATCHES, "vision_embedding.pos_embed", "model.patch_embedding.position"),
    (PATCHES, "vision_embedding.out_proj.weight", "model.patch_embedding.projection.weight"),
    (HEADS, r"aux_vision\.aux_layer_(\d+\.[01])\.weight", r"\1"),
    (TEACHER, r"aux_vision\.aux_model\.(.+)", r"\1"),
    (UNKNOWN, "(.+)", r"\1"),
)
LORA_NAME = re.compile(r"model\.language_model\.layers\.(\d+)\.(.+)\.lora_[AB]\.default\.weight")
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
POSITION, PATCH = "model.patch_embedding.position", "model.patch_embedding.patch.weight"


@dataclass
class Reference:
    """A checkpoint of the released code, in its own precision."""

    model: VoraForConditionalGeneration  # without LoRA
    info: CheckpointInfo
    processor: AnyProcessor
    lora: Tensors  # under our names
    heads: Tensors  # state dict of a `BlockwiseDistillation` with the pairs of `info`; empty in a merged checkpoint
    places: dict[str, tuple[int, int]]  # where tensors went: how many, how many parameters

    def with_lora(self) -> PeftModel:
        """The model with its LoRA on, as `attach_vision_lora` returns it; it goes into `model` itself, so only once.
        ValueError where the checkpoint has none, because it is merged, or its LoRA fits no layer."""
        if self.info.adapter is None:
            raise ValueError("This model has no LoRA to put on.")
        peft_model = attach_vision_lora(self.model, **vars(self.info.adapter))
        keep_trained_in_fp32(peft_model)
        if strange := peft_model.get_base_model().load_state_dict(self.lora, strict=False).unexpected_keys:
            raise ValueError(f"{len(strange)} LoRA tensors fit no layer: {strange[0]}.")
        return peft_model.eval()


def import_reference(checkpoint: Path | str, llm: Path | str, out: Path | str, merge: bool = False) -> Reference:
    """Write what `load_reference` reads as a model of ours with its processor and card, and of a stage-1 checkpoint
    the adapter and the distill heads; or `merge`, fold LoRA into the weights, in fp32."""
    with whole_folder(out) as folder:
        reference = load_reference(checkpoint, llm)
        if reference.info.adapter and merge:
            reference.model = merge_vision_lora(reference.with_lora())
            reference.info = replace(reference.info, kind="merged", adapter=None)
        reference.model.save_pretrained(folder)
        reference.processor.save_pretrained(folder)
        if reference.info.adapter:
            peft_model = reference.with_lora()
            write_adapter_files(peft_model, folder, get_peft_model_state_dict(peft_model, save_embedding_layers=False))
            if reference.heads:
                save_file(reference.heads, folder / HEADS_FILE)
        write_info(reference.info, folder)
        facts = CardFacts("imported", reference.info.stage or "not stated", str(llm), reference.info.teacher)
        command = "vora merge THIS_FOLDER -o my-vora"
        write_card(folder, replace(facts, source=str(checkpoint), merge_command=command))
    return reference


def load_reference(checkpoint: Path | str, llm: Path | str) -> Reference:
    """Read a checkpoint of the released code, whichever of its layouts it has.

    Args:
        checkpoint: folder (or hub id) with config.json and safetensors, in one file or in shards.
        llm: folder or hub id of the LLM it was made from; its config.json is enough, its tokenizer names the image
            token.

    Raises:
        ValueError: it is no such checkpoint, tensors are missing, unknown or of another shape than the LLM's, or the
            LLM's family has no place for the biases.
    """
    folder = fetched(checkpoint)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json: it is no checkpoint.")
    fields, parts = json.loads((folder / "config.json").read_text()), _sorted(_read_tensors(folder), folder)
    place = located(llm, "--llm", EXAMPLE)
    with loading(place, "--llm"):
        llm_config = AutoConfig.from_pretrained(place, **remote_code()).get_text_config()
    tokenizer = _tokenizer_of(llm, checkpoint)
    state = parts[LLM] | parts[BIASES] | parts[PATCHES]
    num_positions, patch = state[POSITION].shape[-2], state[PATCH]
    grid = round(num_positions**0.5)
    if grid**2 != num_positions:
        raise ValueError(f"{folder} has {num_positions} positions, which make no square grid.")
    last = llm_config.vocab_size - 1  # which padded vocabularies leave unused
    config = VoraConfig(
        text_config=text_config_with_biases(llm_config, {name.split(".")[4] for name in parts[BIASES]}),
        image_token_id=last if tokenizer is None else min(choose_image_token(tokenizer)[1], last),
        patch_size=patch.shape[-1],
        image_size=grid * patch.shape[-1],
        num_channels=patch.shape[1],
        vision_hidden_size=patch.shape[0],
        patch_norm_eps=getattr(llm_config, "rms_norm_eps", fields.get("rms_norm_eps", 1e-5)),
        image_attention=fields.get("vision_attention_mask") or "bidirectional",
        lm_head_bias="lm_head.bias" in state,
        # which holds every weight exactly: trained parts may be wider than frozen ones
        dtype=reduce(torch.promote_types, [tensor.dtype for tensor in state.values()]),
    )
    model = _build_model(config, state, _needed_biases(llm_config, fields.get("lora") or {}), folder)
    processor = _processor_of(config, tokenizer)
    if isinstance(processor, VoraProcessor):
        processor.end_turns_of(model)
    adapter, heads, teacher = _adapter_of(parts[LORA]), _heads_of(parts[HEADS]), fields.get("aux_vision") or None
    levels = sorted(int(name.split(".")[1]) for name in heads if name.endswith(".1.weight"))
    shift = 1 if "aimv2" in (teacher or "").lower() else 0  # see `block_pairs`: "inputs", or "hidden_states"
    info = CheckpointInfo(
        kind="unmerged" if adapter else "merged",
        path=folder,
        model_type=config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        stage="pretrain" if adapter else None,
        base_llm=loadable(str(llm)),
        adapter=adapter,
        teacher=teacher,
        block_pairs=tuple((level, level + shift) for level in levels),
    )
    places = {part: (len(found), sum(t.numel() for t in found.values())) for part, found in parts.items() if found}
    return Reference(model, info, processor, parts[LORA], heads, places)


def text_config_with_biases(llm_config: PreTrainedConfig, kinds: set[str]) -> PreTrainedConfig:
    """The configuration of a stock LLM that computes what the given one does and has biases in these projections
    ("self_attn", "mlp") besides; ValueError where the family has no place for them, and Llama's cannot stand in."""
    flags = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
    wanted = {flags[kind]: True for kind in kinds}
    if all(hasattr(llm_config, flag) for flag in wanted):
        return type(llm_config).from_dict({**llm_config.to_dict(), **wanted})
    windows = set(getattr(llm_config, "layer_types", None) or ()) - {"full_attention"}
    if llm_config.model_type == "mistral" and llm_config.sliding_window:
        windows.add("sliding_attention")
    if llm_config.model_type not in ("qwen2", "mistral") or windows:
        raise ValueError(
            f"The checkpoint has biases in {' and '.join(sorted(kinds))}, for which {llm_config.model_type} "
            f"{'with sliding windows ' if windows else ''}has no place, and Llama's architecture cannot stand in for "
            "it: it cannot be imported."
        )
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    shared = {name: value for name, value in llm_config.to_dict().items() if name in known}
    return LlamaConfig(**{**shared, "attention_bias": "self_attn" in kinds, "mlp_bias": "mlp" in kinds})


def _read_tensors(folder: Path) -> Tensors:
    """{name: tensor} of all safetensors files of a folder, mapped into memory rather than read."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} shards, such as {missing[0]}: fetch them.")
    tensors: Tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"Cannot read {file}: {error}.") from None
    return tensors


def _sorted(tensors: Tensors, folder: Path) -> dict[str, Tensors]:
    """{part: {our name: tensor}}; ValueError where the layout is another, or tensors have no place here."""
    parts: dict[str, Tensors] = {part: {} for part, *_ in NAMES}
    for name, tensor in tensors.items():
        part, pattern, ours = next(known for known in NAMES if re.fullmatch(known[1], name))
        parts[part][re.sub(pattern, ours, name)] = tensor
    if missing := [theirs for part, theirs, ours in NAMES if part == PATCHES and ours not in parts[PATCHES]]:
        raise ValueError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors of a patch embedding: it is no "
            "checkpoint of the released code with AIMv2Embedding."
        )
    if unknown := list(parts.pop(UNKNOWN)):
        raise ValueError(
            f"{folder} has {len(unknown)} tensors that no part of the released code has, such as {unknown[0]}: "
            "nothing was imported."
        )
    return parts


def _adapter_of(lora: Tensors) -> AdapterInfo | None:
    """None of a merged checkpoint; ValueError where the blocks do not have the same pairs, or the ranks differ."""
    if not lora:
        return None
    blocks, layers = (set(found) for found in zip(*(LORA_NAME.findall(name)[0] for name in lora)))
    num_blocks = len(blocks)
    ranks = {tensor.shape[0 if ".lora_A." in name else 1] for name, tensor in lora.items()}
    is_whole = len(lora) == 2 * num_blocks * len(layers) and blocks == set(map(str, range(num_blocks)))
    if not is_whole or len(ranks) != 1:
        raise ValueError(
            f"The checkpoint's {len(lora)} LoRA tensors are no pairs of one rank in its first blocks: {num_blocks} "
            f"blocks, {len(layers)} layers, ranks {sorted(ranks)}. Is a shard missing?"
        )
    return AdapterInfo(ranks.pop(), num_blocks, tuple(sorted(layer.rpartition(".")[2] for layer in layers)))


def _heads_of(tensors: Tensors) -> Tensors:
    """The released code's heads under the names of a `BlockwiseDistillation`, whose biases and means are zero then."""
    if not tensors:
        return {}
    state = {"num_updates": torch.zeros((), dtype=torch.long)}
    for name, tensor in tensors.items():
        level, part = name.split(".")
        student = int(level) - 1  # level i looks at what enters block i
        state[f"heads.{student}.{part}.weight"] = tensor.float().contiguous()
        if part == "1":
            state[f"heads.{student}.1.bias"] = torch.zeros(len(tensor))
            state[f"mean_{student}"] = torch.zeros(len(tensor))
    return state


def _needed_biases(llm_config: PreTrainedConfig, lora: dict[str, Any]) -> set[str]:
    """Our names of the biases that a whole checkpoint has: the LLM's own, and those of the projections that the
    section `lora` of its configuration adapts."""
    with torch.device("meta"):
        names = {name for name in AutoModel.from_config(llm_config).state_dict() if name.endswith("_proj.bias")}
    layers = lora.get("layers") or 0
    depth = layers if isinstance(layers, int) else llm_config.num_hidden_layers
    names |= {f"layers.{i}.{target}.bias" for i in range(depth) for target in lora.get("target_modules") or ()}
    return {f"model.language_model.{name}" for name in names}


def _build_model(config: VoraConfig, state: Tensors, needed: set[str], folder: Path) -> VoraForConditionalGeneration:
    """A model of exactly the checkpoint's tensors; biases that it need not have are zero. ValueError where tensors are
    missing, left over, or of another shape."""
    with torch.device("meta"):
        wanted = VoraForConditionalGeneration(config).state_dict()
    state |= {POSITION: state[POSITION][0], PATCH: state[PATCH].flatten(1)}  # there a convolution's
    if config.tie_word_embeddings:  # files hold one of the two names, or both
        tables = [state.pop(name) for name in (HEAD, EMBEDDINGS) if name in state]
        if len(tables) == 2 and not torch.equal(*tables):
            raise ValueError(
                f"{folder} has an output layer that differs from its embeddings, but the LLM given ties the two: set "
                "tie_word_embeddings to false in its config.json, so that both are kept."
            )
        state |= {EMBEDDINGS: tables[0]} if tables else {}
        del wanted[HEAD]
    for name in wanted.keys() - state.keys() - needed:
        if name.endswith("_proj.bias"):  # of a layer that was not adapted
            state[name] = torch.zeros(wanted[name].shape)
    missing, left = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    bent = [name for name in state if name in wanted and state[name].shape != wanted[name].shape]
    for names, fault in ((missing, "are missing"), (left, "have no place in it"), (bent, "have another shape")):
        if names:
            raise ValueError(
                f"{folder} does not fit the LLM given ({config.text_config.model_type}): {len(names)} of "
                f"{len(wanted)} tensors {fault}, such as {names[0]}. Is --llm the one it was made from?"
            )
    state = {name: tensor.to(config.dtype).contiguous() for name, tensor in state.items()}
    model = VoraForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype)
    model.generation_config.suppress_tokens = [config.image_token_id]  # no answer holds an image
    return model.eval()


def _tokenizer_of(*places: Path | str) -> PreTrainedTokenizerBase | None:
    """The first tokenizer among folders and hub ids; None where none has one."""
    for place in places:
        with suppress(Exception):  # transformers raises many kinds where files are missing
            return load_tokenizer(place)
    return None


def _processor_of(config: VoraConfig, tokenizer: PreTrainedTokenizerBase | None) -> AnyProcessor:
    """The released code's: black squares, ChatML."""
    tokens = (config.image_size // config.patch_size) ** 2
    settings: dict[str, Any] = {"patch_size": config.patch_size, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    settings |= {"pad_to_square": True, "min_image_tokens": tokens, "max_image_tokens": tokens}
    if tokenizer is None:
        return VoraImageProcessor(**settings)
    template = None
    if "<|im_start|>" in tokenizer.get_vocab():  # ChatML with a system turn, and a new line after the image
        template = (files("vora.checkpoint") / "released_chat.jinja").read_text()
    return processor_from_llm(tokenizer, chat_template=template, **settings)
