"""Checkpoints of the paper's released code (github.com/Hon-Wong/VoRA, commit f138756), made into ours.

Two layouts: stage 1 (`lora_A`, `lora_B` and `aux_vision` beside the LLM) and merged (the released weights). In both,
the adapted projections have biases, also where the LLM has none: they were trained, so they are kept, exactly.

Dims: D LLM width, D_v width of the patch embedding, p patch side, G side of the position grid, r rank.
"""

import json
import re
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, LlamaConfig

from vora.build.base_llm import choose_image_token, load_tokenizer
from vora.build.from_llm import processor_from_llm
from vora.build.lora import DISTILLATION_FILE, PATCH_EMBEDDING, attach_vision_lora, merge_vision_lora
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

EYES = {
    "vision_embedding.patchifier.proj.weight": "patch.weight",
    "vision_embedding.patchifier.proj.bias": "patch.bias",
    "vision_embedding.patchifier.norm.weight": "norm.weight",
    "vision_embedding.pos_embed": "position",
    "vision_embedding.out_proj.weight": "projection.weight",
}
LORA = re.compile(r"llm\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
HEAD = re.compile(r"aux_vision\.aux_layer_(\d+)\.([01])\.weight")
BIAS = re.compile(r"llm\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.bias")


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
        places: {where tensors went: [how many, how many parameters]}.
    """

    model: VoraForConditionalGeneration
    rank: int = 0
    num_blocks: int = 0
    target_modules: list = field(default_factory=list)
    lora: dict = field(default_factory=dict)
    heads: dict = field(default_factory=dict)
    teacher: str = ""
    places: dict = field(default_factory=dict)

    def with_lora(self):
        """The model with its LoRA on, as `attach_vision_lora` returns it; it goes into `model` itself, so only once.

        Raises:
            ValueError: the checkpoint has none, because it is merged, or the model has it already.
        """
        if not self.rank or isinstance(self.model.model.patch_embedding, ModulesToSaveWrapper):
            raise ValueError("This model has no LoRA to put on, or has it on already.")
        peft_model = attach_vision_lora(
            self.model, rank=self.rank, num_blocks=self.num_blocks, target_modules=self.target_modules
        )
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        eyes = self.model.model.patch_embedding.modules_to_save["default"].state_dict()
        eyes = {f"base_model.model.model.{PATCH_EMBEDDING}.{name}": tensor for name, tensor in eyes.items()}
        loaded = set_peft_model_state_dict(peft_model, self.lora | eyes)
        if loaded.unexpected_keys:
            raise ValueError(f"{len(loaded.unexpected_keys)} LoRA tensors fit no layer: {loaded.unexpected_keys[0]}.")
        return peft_model.eval()


def load_reference(checkpoint, llm):
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
    text_config = text_config_with_biases(llm_config, {BIAS.fullmatch(name)[1] for name in parts["biases"]})
    position, patch = (parts["eyes"][name] for name in ("position", "patch.weight"))
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
        take_lora(reference, parts["lora"])
    if parts["heads"]:
        reference.heads = heads_of(parts["heads"])
    return reference


def checkpoint_folder(checkpoint):
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


def read_json(path):
    """A JSON file as a dict; ValueError where there is none."""
    try:
        return json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{path.parent} holds no {path.name}: it is no checkpoint.") from None


def read_tensors(folder):
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
    tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}
        except Exception as error:  # safetensors has an error of its own
            raise ValueError(f"Cannot read {file}: {error}.") from None
    return tensors


def sort_tensors(tensors, folder):
    """{part: {name: tensor}}; the LLM's and the eyes' under our names, the others under the checkpoint's.

    Raises:
        ValueError: the layout is another, or tensors have no place here.
    """
    parts = {part: {} for part in ("llm", "biases", "eyes", "lora", "heads", "teacher")}
    unknown = []
    for name, tensor in tensors.items():
        if name in EYES:
            parts["eyes"][EYES[name]] = tensor
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
    if missing := sorted(set(EYES) - set(tensors)):
        raise ValueError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more of {len(EYES)} tensors of a patch embedding: it "
            "is no checkpoint of the released code with AIMv2Embedding."
        )
    if unknown:
        raise ValueError(
            f"{folder} has {len(unknown)} tensors that no part of the released code has, such as {unknown[0]}: "
            "nothing was imported."
        )
    return parts


def widest_dtype(parts):
    """The precision that holds every weight of the model exactly: trained parts may be wider than frozen ones."""
    dtypes = [tensor.dtype for part in ("llm", "biases", "eyes") for tensor in parts[part].values()]
    return reduce(torch.promote_types, dtypes)


def text_config_with_biases(llm_config, kinds):
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


def image_token_of(llm, checkpoint, vocab_size):
    """Id of the image token: that of the LLM's tokenizer, or else the checkpoint's, its own or a spare one; without
    any, the last row of the vocabulary, which padded vocabularies leave unused."""
    tokenizer = tokenizer_of(llm) or tokenizer_of(checkpoint)
    if tokenizer is None:
        return vocab_size - 1
    return min(choose_image_token(tokenizer)[1], vocab_size - 1)


def tokenizer_of(llm):
    """The LLM's tokenizer, or None where its folder has no vocabulary (transformers would make up an empty one)."""
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.gguf")
    if Path(llm).is_dir() and not any(any(Path(llm).glob(name)) for name in vocabularies):
        return None
    try:
        return load_tokenizer(llm)
    except Exception:  # transformers raises many kinds where files are missing
        return None


def needed_biases(llm_config, lora):
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


def build_model(config, parts, needed, folder):
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
    for name, tensor in parts["eyes"].items():
        if name == "patch.weight":  # a convolution's
            tensor = tensor.flatten(1)
        state[f"model.patch_embedding.{name}"] = tensor[0] if name == "position" else tensor
    words = "model.language_model.embed_tokens.weight"
    if config.tie_word_embeddings:  # files hold one of the two names
        tied = state.get("lm_head.weight", state.get(words))
        if words in state and not torch.equal(tied, state[words]):
            raise ValueError(
                f"{folder} has an output layer that differs from its embeddings, but the LLM given ties the two: set "
                "tie_word_embeddings to false in its config.json, so that both are kept."
            )
        state |= {} if tied is None else {"lm_head.weight": tied, words: tied}
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


def take_lora(reference, tensors):
    """Note rank, depth and targets of a checkpoint's pairs, and bring them under PEFT's names.

    Raises:
        ValueError: the blocks do not have the same pairs, or the ranks differ.
    """
    found = {}
    for name, tensor in tensors.items():
        block, layer, side = LORA.fullmatch(name).groups()
        found.setdefault(layer, {}).setdefault(int(block), {})[side] = tensor
    depths = {len(blocks) for blocks in found.values()}
    ranks = {pair["A"].shape[0] for blocks in found.values() for pair in blocks.values() if len(pair) == 2}
    whole = all(len(pair) == 2 and block < len(blocks) for blocks in found.values() for block, pair in blocks.items())
    if len(depths) != 1 or len(ranks) != 1 or not whole:
        raise ValueError(
            f"The checkpoint's {len(tensors)} LoRA tensors are no pairs of one rank in its first blocks: depths "
            f"{sorted(depths)}, ranks {sorted(ranks)}. Is a shard missing?"
        )
    reference.rank, reference.num_blocks = ranks.pop(), depths.pop()
    reference.target_modules = sorted(layer.rpartition(".")[2] for layer in found)
    prefix = "base_model.model.model.language_model.layers"
    reference.lora = {
        f"{prefix}.{block}.{layer}.lora_{side}.weight": tensor.float()
        for layer, blocks in found.items()
        for block, pair in blocks.items()
        for side, tensor in pair.items()
    }


def heads_of(tensors):
    """The released code's heads under the names of a `BlockwiseDistillation`, whose biases and means are zero then."""
    state = {"num_updates": torch.zeros((), dtype=torch.long)}
    for name, tensor in tensors.items():
        level, part = HEAD.fullmatch(name).groups()
        student = int(level) - 1  # level i looks at what enters block i
        state[f"heads.{student}.{part}.weight"] = tensor.float().contiguous()
        if part == "1":
            state[f"heads.{student}.1.bias"] = torch.zeros(len(tensor))
            state[f"mean_{student}"] = torch.zeros(len(tensor))
    return state


def places_of(parts):
    """{where tensors went: (how many, how many parameters)}, empty parts left out."""
    where = {
        "llm": "LLM",
        "biases": "biases of the adapted projections (and the LLM's own)",
        "eyes": "patch embedding",
        "lora": "vision LoRA",
        "heads": "distill heads",
        "teacher": "left behind: the frozen teacher, which trains nothing and is fetched by its name",
    }
    return {
        place: (len(parts[part]), sum(tensor.numel() for tensor in parts[part].values()))
        for part, place in where.items()
        if parts[part]
    }


def import_reference(checkpoint, llm, out, merge=False):
    """Write a checkpoint of the released code as one of ours.

    Args:
        checkpoint, llm: as for `load_reference`.
        out: new folder. It gets the model; its processor, where the LLM (or the checkpoint) has a tokenizer; and of
            a stage-1 checkpoint, unless merged, the adapter and the distill heads. `from_pretrained` opens either.
        merge: fold LoRA into the weights, in fp32.

    Returns:
        The `Reference`.

    Raises:
        ValueError: as `load_reference`, or `out` is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, so that nothing is overwritten.")
    reference = load_reference(checkpoint, llm)
    if reference.rank and merge:
        reference.model = merge_vision_lora(reference.with_lora())
        reference.rank = 0
    processor = processor_of(reference.model.config, llm, checkpoint)
    if isinstance(processor, VoraProcessor):
        processor.end_turns_of(reference.model)
    reference.model.save_pretrained(out)
    if reference.rank:
        reference.with_lora().save_pretrained(out)
        save_file(reference.heads, out / DISTILLATION_FILE)
    processor.save_pretrained(out)
    return reference


def processor_of(config, llm, checkpoint):
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
