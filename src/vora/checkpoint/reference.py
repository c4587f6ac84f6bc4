"""Checkpoints of the paper's released code, made into ours; see `reference_tensors` for what they are.

In both of their layouts the adapted projections have biases, also where the LLM has none: they were trained, so they
are kept, exactly.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

from vora.build.base_llm import choose_image_token, load_tokenizer
from vora.build.from_llm import processor_from_llm
from vora.build.lora import PATCH_EMBEDDING, attach_vision_lora, keep_trained_in_fp32, merge_vision_lora
from vora.checkpoint.card import CardFacts, write_card
from vora.checkpoint.layout import HEADS_FILE, AdapterInfo, CheckpointInfo, write_info
from vora.checkpoint.names import loadable
from vora.checkpoint.reference_tensors import (
    Tensors,
    checkpoint_folder,
    heads_of,
    lora_of,
    places_of,
    read_json,
    read_tensors,
    sort_tensors,
    widest_dtype,
)
from vora.checkpoint.save import whole_folder, write_adapter_files
from vora.model.configuration_vora import VoraConfig
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

# Both of its teachers, CLIP and AIMv2, normalise like this.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What its conversations look like: ChatML with a system turn, and a new line after the image.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass
class Reference:
    """A checkpoint of the released code.

    Attributes:
        model: the `VoraForConditionalGeneration` without LoRA.
        rank, num_blocks, target_modules: of its LoRA; rank 0 in a merged checkpoint.
        lora: {our name: tensor} of its pairs.
        heads: state dict of a `BlockwiseDistillation` with the pairs of `block_pairs(..., pairing="hidden_states")`
            for teachers of transformers, or "inputs" for AIMv2's own code; empty in a merged checkpoint.
        teacher: what its configuration names.
        places: {where tensors went: (how many, how many parameters)}.
    """

    model: VoraForConditionalGeneration
    rank: int = 0
    num_blocks: int = 0
    target_modules: list[str] = field(default_factory=list)
    lora: Tensors = field(default_factory=dict)
    heads: Tensors = field(default_factory=dict)
    teacher: str = ""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def with_lora(self) -> PeftModel:
        """The model with its LoRA on, as `attach_vision_lora` returns it; it goes into `model` itself, so only once.

        Raises:
            ValueError: the checkpoint has none, because it is merged, or the model has it already.
        """
        if not self.rank or isinstance(self.model.model.patch_embedding, ModulesToSaveWrapper):
            raise ValueError("This model has no LoRA to put on, or has it on already.")
        peft_model = attach_vision_lora(
            self.model, rank=self.rank, num_blocks=self.num_blocks, target_modules=self.target_modules
        )
        keep_trained_in_fp32(peft_model)
        state = self.model.model.patch_embedding.modules_to_save["default"].state_dict()
        state = {f"base_model.model.model.{PATCH_EMBEDDING}.{name}": tensor for name, tensor in state.items()}
        loaded = set_peft_model_state_dict(peft_model, self.lora | state)
        if loaded.unexpected_keys:
            raise ValueError(f"{len(loaded.unexpected_keys)} LoRA tensors fit no layer: {loaded.unexpected_keys[0]}.")
        return peft_model.eval()


def load_reference(checkpoint: Path | str, llm: Path | str) -> Reference:
    """Read a checkpoint of the released code, whichever of its layouts it has.

    Args:
        checkpoint: folder (or hub id) with config.json and safetensors, in one file or in shards.
        llm: folder or hub id of the LLM it was made from; its config.json is enough, its tokenizer names the image
            token.

    Returns:
        A `Reference`, in the checkpoint's own precision.

    Raises:
        ValueError: it is no such checkpoint, tensors are missing, unknown or of another shape than the LLM's, or the
            LLM's family has no place for the biases.
    """
    folder = checkpoint_folder(checkpoint)
    config = read_json(folder / "config.json")
    tensors = read_tensors(folder)
    llm_config = AutoConfig.from_pretrained(llm).get_text_config()
    parts = sort_tensors(tensors, folder)
    dtype = widest_dtype(parts)
    text_config = text_config_with_biases(llm_config, {name.split(".")[4] for name in parts["biases"]})
    position, patch = (parts["patch_embedding"][name] for name in ("position", "patch.weight"))
    grid = round(position.shape[-2] ** 0.5)
    if grid**2 != position.shape[-2]:
        raise ValueError(f"{folder} has {position.shape[-2]} positions, which make no square grid.")
    vora_config = VoraConfig(
        text_config=text_config,
        image_token_id=image_token_of(llm, checkpoint, text_config.vocab_size),
        patch_size=patch.shape[-1],
        image_size=grid * patch.shape[-1],
        num_channels=patch.shape[1],
        vision_hidden_size=patch.shape[0],
        patch_norm_eps=getattr(llm_config, "rms_norm_eps", config.get("rms_norm_eps", 1e-5)),
        image_attention=config.get("vision_attention_mask") or "bidirectional",
        lm_head_bias="lm_head.bias" in parts["llm"],
        dtype=dtype,
    )
    needed = needed_biases(llm_config, config.get("lora") or {})
    model = build_model(vora_config, parts, needed, folder)
    reference = Reference(model, teacher=config.get("aux_vision") or "", places=places_of(parts))
    if parts["lora"]:
        found = lora_of(parts["lora"])
        reference.lora, reference.rank, reference.num_blocks, reference.target_modules = found
    if parts["heads"]:
        reference.heads = heads_of(parts["heads"])
    return reference


def text_config_with_biases(llm_config: PreTrainedConfig, kinds: set[str]) -> PreTrainedConfig:
    """The configuration of a stock LLM that computes what the given one does and has the biases besides.

    Args:
        kinds: which projections have biases: a subset of {"self_attn", "mlp"}.

    Raises:
        ValueError: the family has no place for them, and Llama's cannot stand in for it.
    """
    flags = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
    wanted = {flags[kind]: True for kind in kinds}
    if all(hasattr(llm_config, flag) for flag in wanted):
        return type(llm_config).from_dict({**llm_config.to_dict(), **wanted})
    windows = [kind for kind in getattr(llm_config, "layer_types", None) or [] if kind != "full_attention"]
    if llm_config.model_type == "mistral" and llm_config.sliding_window:
        windows = ["sliding_attention"]
    if llm_config.model_type not in ("qwen2", "mistral") or windows:
        raise ValueError(
            f"The checkpoint has biases in {' and '.join(sorted(kinds))}, for which {llm_config.model_type} "
            f"{'with sliding windows ' if windows else ''}has no place, and Llama's architecture cannot stand in for "
            "it: it cannot be imported."
        )
    known = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    shared = {name: value for name, value in llm_config.to_dict().items() if name in known}
    return LlamaConfig(**{**shared, "attention_bias": "self_attn" in kinds, "mlp_bias": "mlp" in kinds})


def image_token_of(llm: Path | str, checkpoint: Path | str, vocab_size: int) -> int:
    """Id of the image token: that of the LLM's tokenizer, or else the checkpoint's, its own or a spare one; without
    any, the last row of the vocabulary, which padded vocabularies leave unused."""
    tokenizer = tokenizer_of(llm) or tokenizer_of(checkpoint)
    if tokenizer is None:
        return vocab_size - 1
    return min(choose_image_token(tokenizer)[1], vocab_size - 1)


def tokenizer_of(llm: Path | str) -> PreTrainedTokenizerBase | None:
    """The LLM's tokenizer, or None where its folder has no vocabulary (transformers would make up an empty one)."""
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.gguf")
    if Path(llm).is_dir() and not any(any(Path(llm).glob(name)) for name in vocabularies):
        return None
    try:
        return load_tokenizer(llm)
    except Exception:  # transformers raises many kinds where files are missing
        return None


def needed_biases(llm_config: PreTrainedConfig, lora: dict[str, Any]) -> set[str]:
    """Our names of the biases that a whole checkpoint has: the LLM's own, and those of the adapted projections.

    Args:
        lora: the section of the checkpoint's configuration, with `layers` (a number, or "all") and `target_modules`.
    """
    with torch.device("meta"):
        own = AutoModel.from_config(llm_config).state_dict()
    names = {name for name in own if name.endswith("_proj.bias")}
    layers = lora.get("layers") or 0
    depth = layers if isinstance(layers, int) else llm_config.num_hidden_layers
    names |= {f"layers.{i}.{target}.bias" for i in range(depth) for target in lora.get("target_modules") or ()}
    return {f"model.language_model.{name}" for name in names}


def build_model(
    config: VoraConfig, parts: dict[str, Tensors], needed: set[str], folder: Path
) -> VoraForConditionalGeneration:
    """A `VoraForConditionalGeneration` of exactly the checkpoint's tensors; biases that it need not have are zero.

    Raises:
        ValueError: tensors are missing, left over, or of another shape; named.
    """
    with torch.device("meta"):
        wanted = VoraForConditionalGeneration(config).state_dict()
    state = {f"model.language_model.{name.removeprefix('llm.model.')}": t for name, t in parts["biases"].items()}
    for name, tensor in parts["llm"].items():
        ours = name if name.startswith("lm_head.") else f"model.language_model.{name.removeprefix('model.')}"
        state[ours] = tensor
    for name, tensor in parts["patch_embedding"].items():
        if name == "patch.weight":  # a convolution's
            tensor = tensor.flatten(1)
        state[f"model.patch_embedding.{name}"] = tensor[0] if name == "position" else tensor
    embeddings = "model.language_model.embed_tokens.weight"
    if config.tie_word_embeddings:  # files hold one of the two names
        own = state.get(embeddings)
        tied = state.get("lm_head.weight", own)
        if tied is not None and own is not None and not torch.equal(tied, own):
            raise ValueError(
                f"{folder} has an output layer that differs from its embeddings, but the LLM given ties the two: set "
                "tie_word_embeddings to false in its config.json, so that both are kept."
            )
        state |= {} if tied is None else {"lm_head.weight": tied, embeddings: tied}
    dtype = config.dtype
    for name, tensor in wanted.items():
        if name.endswith("_proj.bias") and name not in state and name not in needed:  # of a layer that was not adapted
            state[name] = torch.zeros(tensor.shape, dtype=dtype)
    missing, left = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    bent = [name for name in state if name in wanted and state[name].shape != wanted[name].shape]
    for names, fault in ((missing, "are missing"), (left, "have no place in it"), (bent, "have another shape")):
        if names:
            raise ValueError(
                f"{folder} does not fit the LLM given ({config.text_config.model_type}): {len(names)} of "
                f"{len(wanted)} tensors {fault}, such as {names[0]}. Is --llm the one it was made from?"
            )
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    model = VoraForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.generation_config.suppress_tokens = [config.image_token_id]  # no answer holds an image
    return model.eval()


def import_reference(checkpoint: Path | str, llm: Path | str, out: Path | str, merge: bool = False) -> Reference:
    """Write a checkpoint of the released code as one of ours.

    Args:
        checkpoint, llm: as for `load_reference`.
        out: new folder. It gets the model with its card; its processor, where the LLM (or the checkpoint) has a
            tokenizer; and of a stage-1 checkpoint, unless merged, the adapter and the distill heads.
        merge: fold LoRA into the weights, in fp32.

    Returns:
        The `Reference`.

    Raises:
        ValueError: as `load_reference`, or `out` is not empty.
    """
    with whole_folder(out) as folder:
        reference = load_reference(checkpoint, llm)
        if reference.rank and merge:
            reference.model, reference.rank = merge_vision_lora(reference.with_lora()), 0
        processor = processor_of(reference.model.config, llm, checkpoint)
        if isinstance(processor, VoraProcessor):
            processor.end_turns_of(reference.model)
        info = describe(reference, llm, folder, isinstance(processor, VoraProcessor))
        reference.model.save_pretrained(folder)
        if info.adapter is not None:
            peft_model = reference.with_lora()
            write_adapter_files(peft_model, folder, get_peft_model_state_dict(peft_model, save_embedding_layers=False))
            if reference.heads:
                save_file(reference.heads, folder / HEADS_FILE)
        processor.save_pretrained(folder)
        write_info(info, folder)
        facts = CardFacts(
            made="imported",
            stage=info.stage or "not stated",
            base_llm=str(llm),
            teacher=reference.teacher or None,
            source=str(checkpoint),
            merge_command="vora merge THIS_FOLDER -o my-vora",
        )
        write_card(folder, facts)
    return reference


def describe(reference: Reference, llm: Path | str, folder: Path, has_processor: bool) -> CheckpointInfo:
    """What is known of an imported model."""
    levels = sorted(int(name.split(".")[1]) for name in reference.heads if name.endswith(".1.weight"))
    shift = 1 if "aimv2" in reference.teacher.lower() else 0  # see `block_pairs`: "inputs", or "hidden_states"
    adapter = AdapterInfo(reference.rank, reference.num_blocks, tuple(reference.target_modules))
    return CheckpointInfo(
        kind="unmerged" if reference.rank else "merged",
        path=folder,
        model_type=reference.model.config.model_type,
        dtype=str(reference.model.dtype).removeprefix("torch."),
        stage="pretrain" if reference.lora else None,
        base_llm=loadable(str(llm)),
        adapter=adapter if reference.rank else None,
        teacher=reference.teacher or None,
        block_pairs=tuple((level, level + shift) for level in levels),
        has_heads=bool(reference.rank and reference.heads),
        has_processor=has_processor,
    )


def processor_of(config: VoraConfig, llm: Path | str, checkpoint: Path | str) -> VoraProcessor | VoraImageProcessor:
    """The processor of the released code: black squares, ChatML; where there is no tokenizer, its image part."""
    tokens = (config.image_size // config.patch_size) ** 2
    looks = {
        "patch_size": config.patch_size,
        "min_image_tokens": tokens,
        "max_image_tokens": tokens,
        "pad_to_square": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    tokenizer = tokenizer_of(llm) or tokenizer_of(checkpoint)
    if tokenizer is None:
        return VoraImageProcessor(**looks)
    template = CHAT_TEMPLATE if "<|im_start|>" in tokenizer.get_vocab() else None
    return processor_from_llm(tokenizer, chat_template=template, **looks)
