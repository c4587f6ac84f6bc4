"""From a model folder of any kind to a model: to ask it, to train it further, or to merge it."""

import hashlib
import json
import re
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from vora.baselines.llava import VoraLlavaConfig, VoraLlavaForConditionalGeneration
from vora.build.base_llm import grow_for_image_token, load_llm, load_tokenizer
from vora.build.fewer_activations import keep_fewer_activations
from vora.build.from_llm import from_llm, processor_from_llm, wrap_llm
from vora.build.hub import loading, remote_code
from vora.build.lora import keep_trained_in_fp32, merge_vision_lora, peft_model_of
from vora.build.lora_by_image import use_lora_by_image
from vora.build.lora_product import use_lora_product
from vora.checkpoint.adapter import WEIGHTS_FILE, read_adapter_config
from vora.checkpoint.layout import HEADS_FILE, CheckpointInfo, read_info, weight_files
from vora.checkpoint.manifest import check_written
from vora.checkpoint.names import is_hub_id
from vora.distill.blockwise import BlockwiseDistillation
from vora.distill.teacher import Teacher
from vora.model.configuration_vora import VoraConfig
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import SPELT, VoraProcessor
from vora.model.segmented_sdpa import use_segmented_sdpa_on_cpu

Source = CheckpointInfo | Path | str
Student: TypeAlias = PeftModel | VoraForConditionalGeneration
AnyProcessor: TypeAlias = VoraProcessor | VoraImageProcessor  # the image part alone where there is no tokenizer


def load_model(
    path: Source, *, llm: str | None = None, min_image_tokens: int | None = None, max_image_tokens: int | None = None,
    dtype: torch.dtype | str | None = None, device: torch.device | str | None = None, unmerged: bool = False,
) -> tuple[VoraForConditionalGeneration, VoraProcessor]:  # fmt: skip
    """A model in eval mode and its processor, whatever the folder holds: LoRA is merged in memory.

    Args:
        path: folder or hub id of a model, or the directory of a run.
        llm: to put an adapter over, if not the one that it names.
        min_image_tokens, max_image_tokens: budget per image.
        device: by default the GPU if there is one.
        unmerged: LoRA stays beside the weights, off in conversations without images, whose answers are the LLM's own
            to the last bit; see `use_lora_by_image`.

    Raises:
        ValueError: nothing is there, or nothing with vision and a tokenizer; or the LLM given has no use; or there is
            no such device; or what is to stay unmerged is merged already.
    """
    info = _vora_info(path, llm)
    device = _device(device)
    if unmerged:  # and attention is the LLM's own too, whose bits segments would not repeat in bf16
        model = use_lora_by_image(load_adapter(info, llm=llm, dtype=dtype)).to(device)
    else:
        model = _merged(info, llm, dtype).to(device).eval()
        use_segmented_sdpa_on_cpu(model, device)
    processor = load_processor(info, llm)
    processor.image_processor.set_budget(min_image_tokens, max_image_tokens)
    processor.end_turns_of(model)
    return model, processor


def _device(name: torch.device | str | None) -> torch.device:
    """The device of that name, by default the GPU if there is one; a ValueError where it is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name} is not here ({str(error).splitlines()[0]}): leave it out, or say cpu."
        ) from None


def merge_run(path: Source, llm: str | None = None) -> tuple[VoraForConditionalGeneration, AnyProcessor | None]:
    """The model that a run has trained, ready to be saved: LoRA merged (stage 1), or as it is (stage 2), in the
    precision that the run's recipe has for the LLM. An adapter, or an unmerged model, is merged alike; ValueError
    where there is nothing to merge. Of a model without a tokenizer the processor is its image part, or None."""
    info = _vora_info(path, llm)
    if info.adapter is None and info.run is None:
        raise ValueError(f"{info.path} is merged already: use it as it is, such as vora chat IMAGE -m {info.path}.")
    model = _merged(info, llm, None).eval()
    if info.kind != "adapter" and not info.has_processor:
        has_images = (info.path / "preprocessor_config.json").exists()
        return model, VoraImageProcessor.from_pretrained(info.path) if has_images else None
    processor = load_processor(info, llm)
    processor.end_turns_of(model)  # of whatever it is made
    return model, processor


def load_adapter(path: Source, *, llm: str | None = None, dtype: torch.dtype | str | None = None) -> PeftModel:
    """An adapter put over its LLM, by default in the precision that it was trained in, ready to train on or to merge;
    what trains is in float32. ValueError where there is no adapter; no LLM is named, it cannot be loaded, or it is not
    the one that the adapter was trained on; or tensors do not fit."""
    info = _vora_info(path, llm)
    if info.adapter is None:
        raise ValueError(f"{info.path} has no vision LoRA: it is merged already.")
    check_written(info.path)
    config = read_adapter_config(info.path)
    model = _base_model(info, llm, dtype or info.dtype)
    digests = {info.llm_digest, digest_of(model)} - {None}
    if info.kind == "adapter" and len(digests) > 1:
        raise ValueError(
            f"{info.path} grew on an LLM of {llm or info.base_llm}'s shape, but of other weights, such as a fine-tune "
            f"of it: put it over that one with `vora merge {info.path} --llm LLM -o OUT`."
        )
    if info.kind == "adapter" and (info.path / GENERATION_CONFIG_NAME).exists():  # how its answers are made
        model.generation_config = GenerationConfig.from_pretrained(info.path)
        suppressed = {*(model.generation_config.suppress_tokens or []), model.config.image_token_id}
        model.generation_config.suppress_tokens = sorted(suppressed)
    peft_model = peft_model_of(model, config)
    keep_trained_in_fp32(peft_model)
    restore(peft_model, info.path)
    use_lora_product(peft_model)
    keep_fewer_activations(peft_model)
    return peft_model.eval()


def load_trainable(path: Source, dtype: torch.dtype | str) -> Student:
    """What training goes on from: the model of a folder or a run, with its LoRA on where it has one."""
    info = _vora_info(path)
    return _whole_model(info, dtype) if info.adapter is None else load_adapter(info, dtype=dtype)


def load_processor(path: Source, llm: str | None = None) -> VoraProcessor:
    """The processor of a folder or a run; an adapter's gets its LLM's tokenizer where it has none of its own.
    ValueError where there is none, or it does not agree with the adapter on the image token."""
    info = _vora_info(path)
    if info.has_processor:
        with loading(info.path, "The model"):
            return VoraProcessor.from_pretrained(info.path, **remote_code())
    if info.kind != "adapter":
        raise ValueError(
            f"{info.path} has no tokenizer, so it cannot be asked anything: import it again with an --llm folder that "
            "has its LLM's tokenizer files."
        )
    config, name = _config_of(info), _name_of_llm(info, llm)
    processor = processor_from_llm(name)
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{info.path} has its images at token {config.image_token_id}, but {name} would have them at "
            f"{processor.image_token_id} ({processor.image_token}): it is another LLM than the adapter grew on."
        )
    processor.chat_template = (info.path / "chat_template.jinja").read_text()
    processor.image_markers = _image_markers(processor)
    processor.image_processor = VoraImageProcessor.from_pretrained(info.path)
    return processor


def _image_markers(processor: VoraProcessor) -> list[str]:
    """What a whole template puts around each image: an adapter has no other file that says it."""
    text = f"(?:{SPELT}([^{SPELT}]*){SPELT})?"
    image = re.search(text + re.escape(processor.image_token) + text, processor.chat_template)
    return [one or "" for one in image.groups()] if image else ["", ""]


def load_base_llm(name: str, model: VoraForConditionalGeneration, processor: VoraProcessor) -> PreTrainedModel:
    """The LLM that a model came from in the form of that model, to be compared with it; its logits are its own.
    ValueError where it splits text otherwise, so that it is another LLM."""
    if load_tokenizer(name).get_vocab().items() - processor.tokenizer.get_vocab().items():
        raise ValueError(f"--base {name} splits text into other tokens than the model: it is not what that came from.")
    base = from_llm(name, image_token_id=model.config.image_token_id, dtype=model.dtype)
    return base.to(model.device).eval()


def restore(student: Student, folder: Path, distillation: BlockwiseDistillation | None = None) -> None:
    """Read back what `vora.checkpoint.save.save_training` wrote, into a model of the same shape. ValueError where the
    folder holds another kind of checkpoint, or tensors are missing from it."""
    if isinstance(student, PeftModel):
        if not (folder / WEIGHTS_FILE).exists():
            raise ValueError(f"{folder} holds no {WEIGHTS_FILE}: it is no checkpoint of stage pretrain.")
        with loading(folder, "The adapter"):
            loaded = set_peft_model_state_dict(student, load_peft_weights(str(folder), device="cpu"))
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        if misfits := loaded.unexpected_keys + sorted(trained & set(loaded.missing_keys)):
            raise ValueError(
                f"{len(misfits)} tensors of {folder} do not fit this model or are missing there, such as "
                f"{misfits[0]}: was the recipe's LLM or rank changed?"
            )
    else:
        student.load_state_dict(type(student).from_pretrained(folder, dtype=student.dtype).state_dict())
    if distillation is not None:
        distillation.load_state_dict(load_file(folder / HEADS_FILE))


def load_heads(distillation: BlockwiseDistillation, path: Source) -> None:
    """Go on with the distill heads that lie beside a model, if there are some; ValueError where they are of other
    blocks or of another teacher's width."""
    info = _vora_info(path)
    if not info.has_heads:
        return
    state = load_file(info.path / HEADS_FILE)
    there, here = ({name: tuple(t.shape) for name, t in one.items()} for one in (state, distillation.state_dict()))
    if misfits := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        raise ValueError(
            f"{len(misfits)} tensors of the distill heads of {info.path} are not those of the recipe's teacher, such "
            f"as {misfits[0]} ({there.get(misfits[0])} there, {here.get(misfits[0])} here): set teacher.standardize, "
            "summary and pairs as they were trained, teacher.pairing to hidden_states (of the released code; inputs "
            "with AIMv2), or delete the file to begin with fresh ones."
        )
    distillation.load_state_dict(state)


def distillation_of(path: Source) -> BlockwiseDistillation | None:
    """The distill heads that lie beside a model with the pairs of their blocks, in eval mode; None where it has none,
    or nothing says which blocks they belong to."""
    info = _vora_info(path)
    if not (info.has_heads and info.block_pairs):
        return None
    state = load_file(info.path / HEADS_FILE)
    teacher_size, student_size = next(tensor.shape for name, tensor in state.items() if name.endswith(".1.weight"))
    standardize = any(name.startswith("variance_") for name in state)
    distillation = BlockwiseDistillation(info.block_pairs, student_size, teacher_size, standardize=standardize)
    distillation.load_state_dict(state)
    return distillation.eval()


@torch.no_grad()
def digest_of(llm: PreTrainedModel) -> str | None:
    """Tells causal LMs of one shape apart, with LoRA on or without, also inside a VoRA model: 16 hexadecimal digits of
    word embeddings and of the first matrix of each block, some rows of them. It is the same in bf16 and in fp32; in
    fp16 some numbers are others, so that there it is None. The row grown for an image token is left out."""
    image_token_id = getattr(llm.config, "image_token_id", None)
    depth = llm.config.get_text_config().num_hidden_layers
    language = getattr(getattr(llm, "model", llm), "language_model", llm)
    blocks = next(m for m in language.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    matrices = [next(m for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))).weight for block in blocks]
    digest = hashlib.sha256()
    embeddings = llm.get_input_embeddings().weight
    if torch.float16 in {weight.dtype for weight in (embeddings, *matrices)}:
        return None
    for weight in (embeddings, *matrices):
        step = max(1, len(weight) // 64)
        rows = weight[::step]
        if weight is embeddings and image_token_id == len(weight) - 1 and image_token_id % step == 0:
            rows = rows[:-1]
        digest.update(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _vora_info(path: Source, llm: str | None = None) -> CheckpointInfo:
    """The description of a folder that holds a model with vision, which can go over the LLM if one is given."""
    info = path if isinstance(path, CheckpointInfo) else read_info(path)
    if info.kind == "llm":
        config = json.loads((info.path / "config.json").read_text())
        seen = "with a vision encoder, and no VoRA model" if "vision_config" in config else "without vision"
        raise ValueError(
            f"{info.path} is a {info.model_type} model {seen}: train an LLM with `vora train RECIPE model.llm=LLM`, "
            "or name a run or a VoRA model."
        )
    if llm is not None and (info.kind != "adapter" or info.run is not None):
        raise ValueError(f"{info.path} has its own LLM: leave --llm out.")
    return info


def _merged(info: CheckpointInfo, llm: str | None, dtype: torch.dtype | str | None) -> VoraForConditionalGeneration:
    if info.adapter is not None:
        return merge_vision_lora(load_adapter(info, llm=llm, dtype=dtype))
    return _whole_model(info, dtype or info.dtype)


def _config_of(info: CheckpointInfo) -> VoraConfig:
    return (VoraLlavaConfig if info.is_llava else VoraConfig).from_pretrained(info.path)


def _whole_model(info: CheckpointInfo, dtype: torch.dtype | str) -> VoraForConditionalGeneration:
    """A folder's own weights, without an adapter beside them: that is for PEFT alone, not for transformers."""
    kind = VoraLlavaForConditionalGeneration if info.is_llava else VoraForConditionalGeneration
    if info.adapter is None:  # else it has been looked at with the adapter
        check_written(info.path)
    with loading(info.path, "The model"):
        if info.adapter is None:
            return kind.from_pretrained(info.path, dtype=dtype, **remote_code())
        state = {name: tensor for file in weight_files(info.path) for name, tensor in load_file(file).items()}
        model = kind.from_pretrained(None, config=_config_of(info), state_dict=state, dtype=dtype)
        model.generation_config = GenerationConfig.from_pretrained(info.path)
        return model


def _base_model(info: CheckpointInfo, llm: str | None, dtype: torch.dtype | str) -> VoraForConditionalGeneration:
    """What an adapter goes over, with a patch embedding that the adapter's takes the place of."""
    if info.kind == "unmerged":
        return _whole_model(info, dtype)
    if info.source is not None:  # a run that went on from another model
        before = _vora_info(info.source)
        return _base_model(before, llm, dtype) if before.adapter else _whole_model(before, dtype)
    config, name = _config_of(info), _name_of_llm(info, llm)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        loaded = load_llm(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{info.path} holds an adapter without its LLM, and that, {name}, cannot be loaded "
            f"({' '.join(str(error).split())}): name it with `vora merge {info.path} --llm LLM -o OUT`."
        ) from None
    grow_for_image_token(loaded)
    for field in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        has, wanted = getattr(loaded.config.get_text_config(), field), getattr(config.get_text_config(), field)
        if has != wanted:
            raise ValueError(f"{info.path} grew on an LLM with {field} {wanted}, but {name} has {has}: it is another.")
    attention, config.dtype = loaded.config._attn_implementation, dtype
    model = wrap_llm(loaded, config)
    model.set_attn_implementation(attention)
    if not info.is_llava:
        return model
    if info.encoder is None or not (Path(info.encoder).exists() or is_hub_id(info.encoder)):
        raise ValueError(
            f"{info.path} holds a projector without its encoder, which was a folder and so is not named in it: "
            f"vora merge RUN -o OUT, and name OUT."
        )
    return VoraLlavaForConditionalGeneration.wrap(model, config, Teacher.from_pretrained(info.encoder, dtype))


def _name_of_llm(info: CheckpointInfo, llm: str | None) -> str:
    if not (name := llm or info.base_llm):
        raise ValueError(
            f"{info.path} holds an adapter without its LLM, which was a folder and so is not named in it: give --llm "
            f"LLM, or merge it once with `vora merge {info.path} --llm LLM -o OUT`, and name OUT."
        )
    return name
