"""`vora export --to onnx`: a merged model as three graphs, named and cut as Transformers.js and optimum do it.

| file | from | to |
|---|---|---|
| `embed_tokens.onnx` | `input_ids` int[1, T] | `inputs_embeds` float[1, T, D] |
| `vision_encoder.onnx` | `pixel_values` float[1, C, S, S], normalised | `image_features` float[1, I, D] |
| `decoder_model_merged.onnx` | `inputs_embeds`, `image_numbers`, `past_key_values.*` | `logits`, `present.*` |

`logits` are float[1, T, V], caches float[1, G, P, W]. `image_numbers` int[1, T] says which image each new token is of,
from 0, and -1 at text: image tokens see their whole image. A prompt begins with caches of no tokens.

Dims: T new tokens, P tokens before them, images of S x S pixels and I tokens, D LLM width, V vocabulary, L layers,
G heads of keys and values, W their width.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vora.checkpoint.layout import read_info
from vora.checkpoint.load import digest_of, load_model
from vora.checkpoint.save import check_is_free, whole_folder
from vora.export.carrier import square_size
from vora.export.export_info import Export, write_export_info
from vora.model.attention import attention_masks
from vora.model.modeling_vora import CACHE, VoraForConditionalGeneration
from vora.model.processing_vora import SPELT, VoraProcessor

EMBED, VISION, DECODER = "embed_tokens.onnx", "vision_encoder.onnx", "decoder_model_merged.onnx"
WRITES, RUNS = ("onnx", "onnxscript"), ("onnxruntime",)  # packages
LONGEST = 2**20  # tokens of a prompt or cache
TRACED = (5, 7)  # new tokens and those before them while a graph is made: neither 0 nor 1, which would be kept as such


@dataclass(frozen=True)
class OnnxExport(Export):
    """A folder that `export_onnx` wrote."""

    to: ClassVar[str] = "onnx"
    image_size: int  # side of the square images, in pixels
    num_image_tokens: int
    image_token_id: int
    end_ids: list[int]  # tokens that end an answer
    prompt: str  # a question about an image, with the image token for the image and QUESTION for the question
    image_token: str
    llm_digest: str | None  # `digest_of` the model that it was made from

    def summary(self) -> str:
        return (
            f"Saved {self.folder}: {EMBED}, {VISION} and {DECODER} in float32, for images of {self.image_size} x "
            f"{self.image_size} pixels ({self.num_image_tokens} tokens). examples/onnx_chat.py asks without torch."
        )


class Vision(nn.Module):
    """A square image to its image tokens."""

    def __init__(self, model: VoraForConditionalGeneration, num_patches: int) -> None:
        super().__init__()
        self.embedding, self.side = model.model.patch_embedding, num_patches
        self.patch_size = model.config.patch_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[1, C, S, S] to float[1, I, D]"""
        p, n = self.patch_size, self.side
        patches = pixel_values[0].unflatten(1, (n, p)).unflatten(3, (n, p)).permute(1, 3, 0, 2, 4)  # n, n, C, p, p
        # of the grid's tensor the list alone is asked for, which a graph cannot make
        return self.embedding(patches.flatten(0, 1).flatten(1), SimpleNamespace(tolist=lambda: [(1, n, n)]))[None]


class Decoder(nn.Module):
    """The LLM behind a cache of keys and values, which are float[1, G, P, W] of each layer in turn."""

    def __init__(self, model: VoraForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, image_numbers: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        lm, cache = self.model.model.language_model, DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        places = (torch.arange(inputs_embeds.shape[1]) + past[0].shape[2])[None]
        mask = attention_masks(lm.config, inputs_embeds, None, cache, None, image_numbers)
        given = {"attention_mask": mask, "position_ids": places, CACHE: cache, "use_cache": True}
        states = lm(inputs_embeds=inputs_embeds, **given).last_hidden_state
        return self.model.logits(states), *(part for layer in cache.layers for part in (layer.keys, layer.values))


def check_onnx(packages: Sequence[str]) -> None:
    """Raise ValueError where some of the packages that write ONNX (`WRITES`) or run it (`RUNS`) are not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f"ONNX is not installed ({', '.join(missing)}): pip install 'vora-vlm[onnx]'.")


def export_onnx(path: Path | str, out: Path, *, image_size: int | None = None, llm: str | None = None) -> OnnxExport:
    """Export a model of any kind of folder, all of it or nothing; see `write_onnx` and, of `llm`, `load_model`."""
    check_onnx(WRITES)
    check_is_free(out)
    model, processor = load_model(read_info(path), llm=llm, dtype=torch.float32, device="cpu")
    with whole_folder(out) as folder:
        found = write_onnx(model, processor, folder, image_size)
    return replace(found, folder=out)


def write_onnx(
    model: VoraForConditionalGeneration, processor: VoraProcessor, folder: Path, image_size: int | None = None
) -> OnnxExport:
    """Write the three graphs, the processor's files and `export.json`.

    Args:
        image_size: side of the one square size that images are brought to, by default the model's largest.

    Raises:
        ValueError: the size does not fit, or the LLM keeps something else than keys and values of each layer.
    """
    size, config = square_size(model, processor.image_processor, image_size), model.config
    side = size // config.patch_size
    shapes = _shapes_of_cache(model)
    names = [f"{number}.{kind}" for number in range(len(shapes)) for kind in ("key", "value")]
    num_new, num_before = TRACED
    new, before = (torch.export.Dim(name, min=0, max=LONGEST) for name in ("new_tokens", "tokens_before"))
    embeds = torch.zeros(1, num_new, config.get_text_config().hidden_size)
    numbers = torch.tensor([[-1, 0, 0, 0, -1]])
    past = [torch.zeros(1, heads, num_before, width) for heads, width in shapes for _ in range(2)]
    image = torch.zeros(1, config.num_channels, size, size)
    attention = config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")  # every family's, in plain products
    try:
        _write(model.get_input_embeddings(), (torch.zeros(1, num_new, dtype=torch.long),), folder / EMBED,
               ["input_ids"], ["inputs_embeds"], ({1: new},))  # fmt: skip
        _write(Vision(model, side), (image,), folder / VISION, ["pixel_values"], ["image_features"], (None,))
        _write(
            Decoder(model), (embeds, numbers, past), folder / DECODER,
            ["inputs_embeds", "image_numbers", *(f"past_key_values.{name}" for name in names)],
            ["logits", *(f"present.{name}" for name in names)], ({1: new}, {1: new}, [{2: before}] * len(past)),
        )  # fmt: skip
    finally:
        model.set_attn_implementation(attention)
    processor.save_pretrained(folder)
    asked = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    count = (side // config.patch_merge) ** 2
    found = OnnxExport(
        folder, size, count, config.image_token_id, processor.end_ids, prompt.replace(SPELT, ""),
        processor.image_token, digest_of(model),
    )  # fmt: skip
    write_export_info(found, folder)
    return found


@torch.no_grad()
def _shapes_of_cache(model: VoraForConditionalGeneration) -> list[tuple[int, int]]:
    """(heads, width) of the keys and values of each layer."""
    lm, cache = model.model.language_model, DynamicCache()
    lm(inputs_embeds=torch.zeros(1, 1, lm.config.hidden_size), use_cache=True, **{CACHE: cache})
    kept: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if len(kept) != lm.config.num_hidden_layers or any(k is None or k.shape != v.shape for k, v in kept):
        raise ValueError(
            f"An LLM of type {lm.config.model_type} keeps more between tokens than keys and values of each layer: "
            "export it --to gguf, or serve its folder."
        )
    return [(keys.shape[1], keys.shape[3]) for keys, _ in kept]


def _write(
    module: nn.Module, inputs: tuple, path: Path, input_names: list[str], output_names: list[str], shapes: tuple
) -> None:
    """A module as a graph, its weights beside it where they are more than a file of ONNX may hold."""
    with _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                module.eval(), inputs, dynamo=True, input_names=input_names, output_names=output_names,
                dynamic_shapes=shapes, verbose=False,
            )  # fmt: skip
        except Exception as error:  # torch prints whole graphs
            cause = next(filter(None, str(error.__cause__ or error).splitlines()), type(error).__name__)[:200]
            raise ValueError(f"torch.onnx makes no {path.name} of this LLM: {cause}. Export it --to gguf.") from None
        is_large = sum(p.numel() * p.element_size() for p in module.parameters()) > 2**30
        program.save(str(path), external_data=is_large)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's remarks on what it skips off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
