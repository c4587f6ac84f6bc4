"""Saving: the state of a training, an adapter alone, a merged model; each with its description, and whole or not."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from vora.build.from_llm import to_llm
from vora.checkpoint.card import write_run_card
from vora.checkpoint.layout import HEADS_FILE, CheckpointInfo, adapter_info, as_run_names, read_info, write_info
from vora.checkpoint.load import AnyProcessor, Source, Student, digest_of, load_adapter, load_processor, merge_run
from vora.checkpoint.run_directory import read_recipe, run_of
from vora.distill.blockwise import BlockwiseDistillation
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

Tensors = dict[str, torch.Tensor]


def save_training(
    student: Student, processor: VoraProcessor, folder: Path, *, distillation: BlockwiseDistillation | None = None,
    state_dict: Tensors | None = None, llm_digest: str | None = None, max_images: int | None = None,
) -> None:  # fmt: skip
    """Write what was trained into a folder of its run: adapter and distill heads (stage 1), or the whole model. Where
    FSDP has spread tensors over processes, `state_dict` has those of `student.` and `distillation.`, gathered, and
    `llm_digest` is `digest_of` the LLM before. `max_images` is of the samples that it saw."""
    folder.mkdir(parents=True, exist_ok=True)
    state = None if state_dict is None else _part_of(state_dict, "student.")
    if isinstance(student, PeftModel):
        write_adapter_files(student, folder, get_peft_model_state_dict(student, state, save_embedding_layers=False))
        student.get_base_model().config.save_pretrained(folder)
    else:
        student.save_pretrained(folder, **({} if state is None else {"state_dict": state}))
    if distillation is not None:
        heads = distillation.state_dict() if state_dict is None else _part_of(state_dict, "distillation.")
        save_file({name: tensor.contiguous() for name, tensor in heads.items()}, folder / HEADS_FILE)
    processor.save_pretrained(folder)
    if isinstance(student, PeftModel) and state_dict is None:
        llm_digest = digest_of(student.get_base_model())
    info = _info_of_training(student, folder, llm_digest)
    seen = [number for number in (info.max_images, max_images) if number is not None]
    info = replace(info, max_images=max(seen, default=None))
    write_info(info if distillation is None else replace(info, block_pairs=tuple(distillation.pairs)), folder)
    let_read(folder)


def save_adapter(
    model: PeftModel, processor: VoraProcessor, folder: Path | str, *, dtype: torch.dtype | str | None = None,
    info: CheckpointInfo | None = None,
) -> None:  # fmt: skip
    """Write LoRA and patch embedding without the LLM and its tokenizer: what a training has added, in a file small
    enough to send.

    Args:
        dtype: by default that of the model's configuration; ValueError where a number does not fit it.
        info: of the run that they come from, for what a model does not know: its teacher.
    """
    config, folder = copy.deepcopy(model.get_base_model().config), Path(folder)
    dtype = getattr(torch, _name_of(dtype or config.dtype))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: tensor.detach().to(dtype).cpu() for name, tensor in state.items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite in {dtype}: the training diverged.")
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter_files(model, folder, state)
    config.dtype = config.text_config.dtype = dtype
    config.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    info = info or _info_of_training(model, folder, digest_of(model.get_base_model()))
    write_info(replace(info, dtype=_name_of(dtype)), folder)


def save_merged(
    model: VoraForConditionalGeneration, processor: AnyProcessor | None, out: Path | str, source: Source
) -> None:
    """Write what `merge_run` made of a source, with processor and card; a failed save leaves nothing behind."""
    info = source if isinstance(source, CheckpointInfo) else read_info(source)
    with whole_folder(out) as folder:
        _write(model, processor, folder, info, kind="merged")


def merge(
    path: Path | str, out: Path, *, llm_out: Path | None = None, adapter_out: Path | None = None,
    llm: str | None = None,
) -> None:  # fmt: skip
    """`vora merge`: write what `merge_run` makes, all of it or nothing.

    Args:
        llm_out: for the language part alone, as its stock LLM.
        adapter_out: for what a run added to its LLM, without it; ValueError where there is no adapter apart.
    """
    info = read_info(path)
    if adapter_out is not None and (info.run is None or info.kind != "adapter" or info.is_llava):
        what = "no run of vora train" if info.run is None else f"a run of stage {info.stage}"
        what += " with an encoder" if info.is_llava else ""
        raise ValueError(
            f"{info.run or info.path} is {what}: only runs of stage pretrain, without an encoder, have an adapter "
            "apart from their LLM. Leave --adapter-out out."
        )
    given = {"--out": out, "--llm-out": llm_out, "--adapter-out": adapter_out}
    places = {name: Path(place) for name, place in given.items() if place is not None}
    if len({place.resolve() for place in places.values()}) < len(places):
        raise ValueError(f"{', '.join(places)} name one folder twice: each needs its own.")
    for name, place in places.items():
        if within := [other for other in places if places[other].resolve() in place.resolve().parents]:
            raise ValueError(f"{name} {place} lies in {within[0]} {places[within[0]]}: each needs its own folder.")
    with ExitStack() as stack:
        folders = {name: stack.enter_context(whole_folder(place, name)) for name, place in places.items()}
        if adapter := folders.get("--adapter-out"):
            save_adapter(load_adapter(info), load_processor(info), adapter, dtype=info.dtype, info=info)
            if (generation := info.path / GENERATION_CONFIG_NAME).exists():
                shutil.copy(generation, adapter)
            llm_option = "" if read_info(adapter).base_llm else " --llm LLM"
            command = f"vora merge THIS_FOLDER{llm_option} -o my-vora"
            write_run_card(adapter, info.path, merge_command=command)
        model, processor = merge_run(info, llm)
        _write(model, processor, folders["--out"], info, kind="merged")
        if llm_out is not None:
            alone = to_llm(model)
            tokenizer = processor.text_tokenizer() if isinstance(processor, VoraProcessor) else None
            _write(alone, tokenizer, folders["--llm-out"], info, kind="llm", model_type=alone.config.model_type)


@contextmanager
def whole_folder(out: Path | str, option: str = "--out") -> Iterator[Path]:
    """A folder to write into, which takes its name once all of it is there, and is gone if that fails; ValueError,
    which names the option for it, where something is there already."""
    check_is_free(Path(out), option)
    out = Path(out).resolve()
    is_new = not out.exists()
    beside = out.parent if is_new else out  # an empty folder may be a link, a mount, or where one stands
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=beside, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        yield folder
        let_read(folder)
        if is_new:
            folder.rename(out)
        else:
            for file in folder.iterdir():
                file.rename(out / file.name)


def let_read(folder: Path) -> None:
    """Have the files of a folder read by whom the umask says: safetensors leaves weights to their owner alone."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


def check_is_free(out: Path, option: str = "--out") -> None:
    """Raise ValueError, which names the option for a folder, where something is in it already."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another {option}, so that nothing is overwritten.")


def write_adapter_files(model: PeftModel, folder: Path, state: Tensors) -> None:
    """PEFT's two files of an adapter, in which no folder of this machine is named."""
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = None  # perhaps a folder of this machine; vora.json names the LLM
    config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write(model: PreTrainedModel, processor: Any, folder: Path, source: CheckpointInfo, **changes: Any) -> None:
    """A whole model, with what is to lie beside it: processor or tokenizer, description and card."""
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    write_info(replace(source, adapter=None, llm_digest=None, dtype=_name_of(model.dtype), **changes), folder)
    write_run_card(folder, source.path)


def _info_of_training(student: Student, folder: Path, llm_digest: str | None) -> CheckpointInfo:
    """What a model in training is: by itself, by its run's recipe, and by what that went on from."""
    is_peft, run = isinstance(student, PeftModel), run_of(folder)
    config = student.get_base_model().config if is_peft else student.config
    info = CheckpointInfo(
        kind="adapter" if is_peft else "merged",
        path=folder,
        model_type=config.model_type,
        dtype=_name_of(config.dtype),
        stage="pretrain" if is_peft else "finetune",
        base_llm=config.get_text_config().name_or_path or None,
    )
    if is_peft:
        lora = student.peft_config["default"]
        adapter = adapter_info(lora.r, lora.layers_to_transform, lora.target_modules)
        info = replace(info, adapter=adapter, llm_digest=llm_digest)
    if run is None:
        return info
    if source := read_recipe(run)["model"].get("vora"):
        with suppress(ValueError, OSError):  # it may have been moved since, and the weights matter more
            before = read_info(source)
            names = ("base_llm", "encoder", "teacher", "block_pairs", "max_images")
            info = replace(info, **{name: getattr(before, name) for name in names})
    return as_run_names(info, run)


def _part_of(state_dict: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _name_of(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
