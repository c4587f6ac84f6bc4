"""`vora verify`: the same tokens through torch and through another engine, and whether both agree.

Dims: T tokens of prompt and answer, V vocabulary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from vora.checkpoint.layout import CheckpointInfo, read_info
from vora.checkpoint.load import digest_of, load_model
from vora.checkpoint.names import published
from vora.checkpoint.save import save_merged
from vora.export.export_info import read_export_info
from vora.export.gguf_files import GgufExport, conversion_folder, write_export
from vora.export.onnx_files import RUNS, WRITES, OnnxExport, check_onnx, write_onnx
from vora.export.onnx_runtime import Onnx
from vora.export.prompts import (
    Prompt,
    images_to_compare,
    in_whole_tokens,
    make_prompt,
    squared,
    swap_far_patches,
    with_image_markers,
)
from vora.export.runtimes import LlamaCpp, Reading, RemoteCode, Runtime, check_llama_cpp, with_answer
from vora.export.vllm import Vllm, check_vllm
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

RUNTIMES = ("remote-code", "llama.cpp", "vllm", "onnx")
# how far log-probabilities may lie apart, by what the weights are kept in; llama.cpp rounds activations to it too
TOLERANCE = {"remote-code": 1e-3, "onnx": 1e-3, "vllm": 0.02, "f32": 0.3, "f16": 0.3, "bf16": 0.5, "q8_0": 1.0}
LEAST_AGREEMENT = 0.9  # of the likeliest token; below it, it is not only ties that fall otherwise
LEAST_BETWEEN = 1e-4  # less than that between both rules is what rounding makes
Mask = Literal["bidirectional", "causal", "unknown"]


@dataclass
class MaskCheck:
    """What changes when far patches of images are swapped, beside what changes in torch by either rule."""

    place: str  # where it is looked at
    change: float  # largest, in the engine
    between_rules: float  # root of the mean square of what sets the rules apart
    position: float  # of the engine between them: 0 causal, 1 bidirectional

    @property
    def mask(self) -> Mask:
        if self.between_rules < LEAST_BETWEEN or not abs(self.position - 0.5) > 0.25:  # or NaN
            return "unknown"
        return "bidirectional" if self.position > 0.5 else "causal"


@dataclass
class Verification:
    """What a comparison found."""

    runtime: str
    version: str
    model: str
    quant: str | None
    num_images: int
    num_tokens: int  # places compared
    num_prompt_tokens: int  # of all prompts, in torch
    num_prompt_tokens_runtime: int
    max_abs_diff: float  # of log-probabilities
    mean_abs_diff: float
    tolerance: float
    argmax_agreement: float
    image_attention: Mask
    mask_check: MaskCheck | None
    failures: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self) | {"passed": not self.failures}, indent=1) + "\n")

    def summary(self) -> str:
        return (
            f"{self.runtime} {self.version}{f' ({self.quant})' if self.quant else ''} against torch: "
            f"{self.num_images} images, {self.num_tokens} tokens, max_abs_diff {self.max_abs_diff:.2g}, "
            f"argmax_agreement {self.argmax_agreement:.1%}, image attention {self.image_attention}"
        )


def verify(
    path: Path | str, runtime: str, *, images: Sequence[str] = (), max_images: int | None = None,
    question: str = "Describe the image.", max_new_tokens: int = 16, files: Path | None = None, llm: str | None = None,
    device: str | None = "cpu",
) -> Verification:  # fmt: skip
    """Compare a model in torch, in float32, with itself in another engine.

    Args:
        path: folder or hub id of a model, or the directory of a run.
        images: files or folders; by default three drawn ones.
        max_images: of more images so many are compared, evenly spread.
        llm: to put an adapter over, if not the one that it names.
        files: a folder of `vora export`, for llama.cpp or onnx; by default one is written in f32 and thrown away.
        device: of torch; None takes the GPU if there is one.

    Raises:
        ValueError: the engine is unknown or not installed, or the model does not fit it.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"--runtime {runtime} is unknown: give {', '.join(RUNTIMES[:-1])} or {RUNTIMES[-1]}.")
    if files is not None and runtime not in ("llama.cpp", "onnx"):
        raise ValueError(f"--files are of llama.cpp or onnx, and --runtime is {runtime}: leave them out.")
    export: GgufExport | OnnxExport | None = None
    if runtime == "llama.cpp":
        export = None if files is None else read_export_info(files, GgufExport)
        check_llama_cpp()
        if export is None:
            conversion_folder()
    elif runtime == "onnx":
        export = None if files is None else read_export_info(files, OnnxExport)
        check_onnx(WRITES + RUNS if export is None else RUNS)
    elif runtime == "vllm":
        check_vllm()
    info, opened = read_info(path), images_to_compare(images, max_images)
    model, processor = load_model(info, llm=llm, dtype=torch.float32, device=device)
    with TemporaryDirectory() as scratch:
        if runtime == "llama.cpp" and export is None:
            export = write_export(model, processor, Path(scratch), "model", "f32")
        elif runtime == "onnx" and export is None:
            export = write_onnx(model, processor, Path(scratch))
        if isinstance(export, GgufExport):  # what it puts around images is given to torch as well
            processor = with_image_markers(processor, export.carrier.image_markers)
        if export is not None and export.image_size is not None:
            shown = [squared(processor, image, export.image_size) for image in opened]
        else:
            shown = [in_whole_tokens(processor, image) for image in opened]
        prompts = [make_prompt(processor, image, question) for image in shown]
        engine: Runtime
        if isinstance(export, OnnxExport):
            engine = Onnx(export)
        elif export is not None:
            engine = LlamaCpp(export, max(prompt.length for prompt in prompts) + max_new_tokens + 16, max_new_tokens)
        else:
            folder = _with_code(info, model, processor, Path(scratch) / "merged")
            engine = RemoteCode(folder) if runtime == "remote-code" else Vllm(folder, model.config.image_token_id)
        found = compare(model, processor, engine, prompts, max_new_tokens, getattr(export, "quant", None))
    found.model = published(path)
    if found.failures and export and export.llm_digest and export.llm_digest != digest_of(model):
        found.failures = [f"{files} was exported from another model than {path}: name that one, or export this one."]
    return found


def compare(
    model: VoraForConditionalGeneration, processor: VoraProcessor, engine: Runtime, prompts: Sequence[Prompt],
    max_new_tokens: int, quant: str | None = None,
) -> Verification:  # fmt: skip
    """What an engine makes of prompts beside what torch does."""
    answers = [[]] * len(prompts) if engine.writes else [_greedy(model, one, max_new_tokens) for one in prompts]
    readings = engine.read(prompts, answers)
    apart, agree = [], []
    for prompt, reading in zip(prompts, readings):
        ours = log_probs_of(model, prompt, reading.answer)[reading.places]
        apart.append((ours.gather(1, reading.ids) - reading.log_probs).abs().flatten())
        likeliest = reading.ids.gather(1, reading.log_probs.argmax(1, keepdim=True))[:, 0]
        agree.append(ours.argmax(1) == likeliest)
    difference, agreement = torch.cat(apart), torch.cat(agree)
    check = check_mask(model, processor, engine, prompts, readings)
    found = Verification(
        runtime=engine.name,
        version=engine.version,
        model="",
        quant=quant,
        num_images=len(prompts),
        num_tokens=len(agreement),
        num_prompt_tokens=sum(prompt.length for prompt in prompts),
        num_prompt_tokens_runtime=sum(reading.num_prompt_tokens for reading in readings),
        max_abs_diff=float(difference.max()),
        mean_abs_diff=float(difference.mean()),
        tolerance=TOLERANCE[quant or engine.name],
        argmax_agreement=float(agreement.float().mean()),
        image_attention=check.mask if check else "unknown",
        mask_check=check,
    )
    found.failures = _failures(found, model.config.image_attention)
    return found


def check_mask(
    model: VoraForConditionalGeneration, processor: VoraProcessor, engine: Runtime, prompts: Sequence[Prompt],
    readings: Sequence[Reading],
) -> MaskCheck | None:  # fmt: skip
    """Swap the far patches of each image and compare what changes at the first place that the engine shows, its first
    image token if it can, with what changes in torch. None where images have fewer than three tokens."""
    side = model.config.patch_size * model.config.patch_merge
    images = [swap_far_patches(prompt.image, side) for prompt in prompts]
    pairs = [
        (prompt, reading, make_prompt(processor, image, prompt.question))
        for prompt, reading, image in zip(prompts, readings, images)
        if image is not None
    ]
    if not pairs:
        return None
    again = engine.read([swapped for *_, swapped in pairs], [reading.answer for _, reading, _ in pairs])
    changes, by_rule = [], {"bidirectional": [], "causal": []}  # type: ignore[var-annotated]
    for (prompt, before, other), after in zip(pairs, again):
        row = next(i for i, place in enumerate(before.places) if place >= prompt.first_image_token)
        place = before.places[row]
        ids, change = _change(before, after, row)
        changes.append(change)
        for rule, found in by_rule.items():
            with image_attention(model, rule):
                ours = log_probs_of(model, other, [])[place] - log_probs_of(model, prompt, [])[place]
            found.append(ours[ids])
    change, (bidirectional, causal) = torch.cat(changes), map(torch.cat, by_rule.values())
    apart = bidirectional - causal
    position = float((change - causal) @ apart / (apart @ apart).clamp_min(1e-30))
    shown = "first image token" if place == prompt.first_image_token else "last token of the prompt"
    return MaskCheck(shown, float(change.abs().max()), float(apart.square().mean().sqrt()), position)


@contextmanager
def image_attention(model: VoraForConditionalGeneration, rule: str) -> Iterator[None]:
    """Let the tokens of an image attend by a rule, for a while."""
    own, model.config.image_attention = model.config.image_attention, rule
    try:
        yield
    finally:
        model.config.image_attention = own


@torch.inference_mode()
def log_probs_of(model: VoraForConditionalGeneration, prompt: Prompt, answer: list[int]) -> Tensor:
    """float[T, V] in torch."""
    inputs = _on_device(model, {**prompt.inputs, "input_ids": with_answer(prompt, answer)})
    return model(**inputs, use_cache=False).logits[0].log_softmax(-1).cpu()


def _on_device(model: VoraForConditionalGeneration, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _greedy(model: VoraForConditionalGeneration, prompt: Prompt, max_new_tokens: int) -> list[int]:
    output = model.generate(**_on_device(model, prompt.inputs), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, prompt.length :].tolist()


def _change(before: Reading, after: Reading, row: int) -> tuple[Tensor, Tensor]:
    """Tokens whose log-probability both readings know at a place, and by how much it changed."""
    one, other = (dict(zip(reading.ids[row].tolist(), reading.log_probs[row].tolist())) for reading in (before, after))
    ids = sorted(one.keys() & other.keys())
    if not ids:
        raise ValueError("No likely token of an image is likely with its far patches swapped: give other --images.")
    return torch.tensor(ids), torch.tensor([other[id] - one[id] for id in ids])


def _failures(found: Verification, rule: str) -> list[str]:
    """Why the engine is not the model, in a sentence each; nothing where it is."""
    if found.num_prompt_tokens != found.num_prompt_tokens_runtime:  # from which all else follows
        return [
            f"The engine reads {found.num_prompt_tokens_runtime} prompt tokens, torch {found.num_prompt_tokens}: "
            "tokenizer or chat template differ."
        ]
    failures = []
    if found.image_attention == "unknown":
        if found.mask_check:
            failures.append("Which image attention it has cannot be told: give --images whose patches matter more.")
    elif found.image_attention != rule:
        failures.append(
            f"The image attention of the engine is {found.image_attention}, the model's is {rule}: an early image "
            f"token {'does not notice' if rule == 'bidirectional' else 'notices'} patches after it."
        )
    if not found.max_abs_diff <= found.tolerance:  # or NaN
        failures.append(f"Log-probabilities differ by {found.max_abs_diff:.3g}, more than {found.tolerance:g}.")
    if found.argmax_agreement < LEAST_AGREEMENT:
        failures.append(f"The likeliest token is another one at {1 - found.argmax_agreement:.1%} of places.")
    return failures


def _with_code(
    info: CheckpointInfo, model: VoraForConditionalGeneration, processor: VoraProcessor, folder: Path
) -> Path:
    """The folder that a user would load with trust_remote_code: the merged one, of an adapter a fresh one."""
    if info.kind == "merged":
        return info.path
    save_merged(model, processor, folder, info)
    return folder
