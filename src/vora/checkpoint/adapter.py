"""Eyes without their LLM: a folder with an adapter and the configuration of the whole, to be put over that LLM.

A run's `final/` is such a folder, and `vora merge RUN --adapter-out` writes a small one to share.
"""

import copy
import hashlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file
from transformers.utils.hub import has_file

from vora.baselines.llava import VoraLlavaConfig
from vora.build.base_llm import choose_image_token, grow_for_image_token, load_llm, load_tokenizer
from vora.build.from_llm import wrap_llm
from vora.build.lora import is_unmerged, leave_precision_to_autocast
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.processing_vora import VoraProcessor


def fetch_adapter(name):
    """Where eyes without their LLM lie that are named by a hub id: fetched, or as they were fetched before. Any other
    name is given back."""
    if Path(name).exists() or str(name).count("/") != 1:
        return name
    try:
        if cached_file(name, "adapter_config.json") and not has_file(name, "model.safetensors"):
            return snapshot_download(str(name))
    except (OSError, HfHubHTTPError):
        pass  # none are there, or the hub is out of reach: what loads the name says so
    return name


def is_adapter(folder):
    """Whether a folder holds an adapter and no whole model beside it."""
    return (Path(folder) / "adapter_config.json").exists() and not is_unmerged(folder)


def load_adapter(folder, dtype=None, llm=None):
    """The `peft.PeftModel` of eyes put over their LLM, ready to merge or to train on.

    Args:
        dtype: of the LLM; by default the configuration's.
        llm: hub id or folder of it; by default what the configuration names.

    Raises:
        ValueError: no LLM is named, it cannot be loaded, or it is another one than the eyes grew on; or the eyes are
            LLaVA's, whose encoder is not in the folder.
    """
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, VoraLlavaConfig):
        raise ValueError(
            f"{folder} holds a projector without its encoder and LLM: vora merge RUN -o OUT, and name OUT."
        )
    name = name_of_llm(folder, llm)
    try:
        llm = load_llm(name, dtype=dtype or config.dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds eyes without their LLM, and that, {name}, cannot be loaded "
            f"({' '.join(str(error).split())}): name it with `vora merge {folder} --llm LLM -o OUT`."
        ) from None
    grow_for_image_token(llm)
    text = config.get_text_config()
    for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        has, wanted = getattr(llm.config.get_text_config(), field), getattr(text, field)
        if has != wanted:
            raise ValueError(
                f"{folder} grew on an LLM with {field} {wanted}, but {name} has {has}: it is another LLM."
            )
    digests = {getattr(config, "llm_digest", None), digest_of(llm, config.image_token_id)} - {None}
    if len(digests) > 1:
        raise ValueError(
            f"{folder} grew on an LLM of {name}'s shape, but of other weights, such as a fine-tune of it: put it over "
            f"that one with `vora merge {folder} --llm LLM -o OUT`."
        )
    attention = llm.config._attn_implementation
    model = wrap_llm(llm, config)
    model.set_attn_implementation(attention)
    return leave_precision_to_autocast(PeftModel.from_pretrained(model, folder, is_trainable=True)).eval()


def processor_of_adapter(folder, llm=None):
    """The processor of eyes without their LLM: the folder's own, with the LLM's tokenizer where it has none.

    Args:
        llm: as for `load_adapter`.

    Raises:
        ValueError: the folder and the tokenizer do not agree on the image token.
    """
    if (Path(folder) / "tokenizer_config.json").exists():
        return VoraProcessor.from_pretrained(folder)
    config, name = AutoConfig.from_pretrained(folder), name_of_llm(folder, llm)
    tokenizer = load_tokenizer(name)
    token, token_id = choose_image_token(tokenizer)
    if token_id != config.image_token_id:
        raise ValueError(
            f"{folder} has its images at token {config.image_token_id}, but {name} would have them at {token_id} "
            f"({token}): it is another LLM than the eyes grew on."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = (Path(folder) / "chat_template.jinja").read_text()
    images = VoraImageProcessor.from_pretrained(folder)
    return VoraProcessor(images, tokenizer, chat_template=template, image_token=token)


def name_of_llm(folder, llm=None):
    """The LLM to put eyes over: the given one, else the hub id or alias that their configuration names.

    Raises:
        ValueError: it names none, for theirs was a folder, which is not written down.
    """
    name = llm or named_llm(folder)
    if not name:
        raise ValueError(
            f"{folder} holds eyes without their LLM, which was a folder and so is not named in it: put them over it "
            f"with `vora merge {folder} --llm LLM -o OUT`, and name OUT."
        )
    return name


def named_llm(folder):
    """The hub id or alias of an LLM that a configuration names; empty if that was a folder."""
    return AutoConfig.from_pretrained(folder).get_text_config().name_or_path


@torch.no_grad()
def digest_of(llm, image_token_id=None):
    """Tells LLMs of one shape apart, with LoRA on or without: 16 hexadecimal digits of word embeddings and of the
    first matrix of each block, some rows of them. Whether an LLM is loaded in bf16 or in fp32 makes no difference; in
    fp16 some numbers are others, so that there it is None. The row that an LLM grew by for its image token is none of
    its own, and left out.

    Args:
        llm: a causal LM, or a VoRA model around one.
        image_token_id: of a causal LM that is to get eyes; a VoRA model knows its own.
    """
    if image_token_id is None:
        image_token_id = getattr(llm.config, "image_token_id", None)
    depth = llm.config.get_text_config().num_hidden_layers
    blocks = next(m for m in llm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    matrices = [next(m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))).weight for block in blocks]
    digest = hashlib.sha256()
    words = llm.get_input_embeddings().weight
    if torch.float16 in {weight.dtype for weight in (words, *matrices)}:
        return None
    for weight in (words, *matrices):
        step = max(1, len(weight) // 64)
        rows = weight[::step]
        if weight is words and image_token_id == len(words) - 1 and image_token_id % step == 0:
            rows = rows[:-1]
        digest.update(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model, processor, folder, dtype=None):
    """Write LoRA and patch embedding without the LLM and its tokenizer: what a training has added, in a file small
    enough to send.

    Args:
        model: the `peft.PeftModel` of a run.
        processor: its `VoraProcessor`.
        dtype: to write them in; by default that of the model's configuration.

    Raises:
        ValueError: a number does not fit the precision.
    """
    vora, folder = model.get_base_model(), Path(folder)
    dtype = dtype or vora.config.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    learned = {name: tensor.detach().to(dtype).cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    for name, tensor in learned.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite in {dtype}: the training diverged.")
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in learned.items()}, folder / "adapter_model.safetensors")
    config = copy.deepcopy(vora.config)
    config.dtype = config.text_config.dtype = dtype
    config.llm_digest = digest_of(vora)
    config.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
