"""Eyes without their LLM: a folder with an adapter and the configuration of the whole, to be put over that LLM.

A run's `final/` is such a folder, and `vora merge RUN --eyes-out` writes a small one to share.
"""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig

from vora.adapt.llava import VoraLlavaConfig
from vora.adapt.lora import is_unmerged, leave_precision_to_autocast
from vora.model.from_llm import choose_image_token, grow_for_image_token, load_llm, load_tokenizer
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor


def lacks_llm(folder):
    """Whether a folder holds an adapter and no whole model beside it."""
    return (Path(folder) / "adapter_config.json").exists() and not is_unmerged(folder)


def load_over_llm(folder, dtype=None, llm=None):
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
    attention = llm.config._attn_implementation
    model = VoraForConditionalGeneration.around(llm, config)
    model.set_attn_implementation(attention)
    return leave_precision_to_autocast(PeftModel.from_pretrained(model, folder, is_trainable=True)).eval()


def processor_over_llm(folder, llm=None):
    """The processor of eyes without their LLM: the folder's own, with the LLM's tokenizer where it has none.

    Args:
        llm: as for `load_over_llm`.

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
            f"{folder} has its pictures at token {config.image_token_id}, but {name} would have them at {token_id} "
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
    name = llm or AutoConfig.from_pretrained(folder).get_text_config().name_or_path
    if not name:
        raise ValueError(
            f"{folder} holds eyes without their LLM, which was a folder and so is not named in it: put them over it "
            f"with `vora merge {folder} --llm LLM -o OUT`, and name OUT."
        )
    return name


def save_eyes(model, processor, folder):
    """Write LoRA and patch embedding in the LLM's precision, without the LLM and its tokenizer: what a training has
    added, in a file small enough to send.

    Args:
        model: the `peft.PeftModel` of a run.
        processor: its `VoraProcessor`.

    Raises:
        ValueError: a number does not fit the precision.
    """
    vora = model.get_base_model()
    dtype = vora.config.dtype if isinstance(vora.config.dtype, torch.dtype) else getattr(torch, vora.config.dtype)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name} holds numbers that are not finite in {dtype}: the training diverged.")
    model.save_pretrained(folder)
    vora.config.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (Path(folder) / "chat_template.jinja").write_text(processor.chat_template)
