"""A patch embedding in a form that stock llama.cpp reads: an mmproj file of one of its projector types, no blocks.

Without a norm, patch projection, positions, merge and projection are one convolution and one row to add per token.
Type `gemma3` has a table of these rows, for one size of images; type `gemma4v` sums one of the token's row and one of
its column, for any size. llama.cpp normalises (RMSNorm) what comes out of that before a last projection. So a channel
of its own holds a number in every row beside which the tokens are nothing to the norm, and the last projection leaves
it out.

Dims: p patch side, m = patch_merge, k = m p side of a token, R x S tokens of a grid, L most rows and columns, D LLM
width, E channels here, D_v width of the patch embedding, C colours.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.patch_embed import PatchEmbedding
from vora.model.processing_vora import VoraProcessor

NORM_CONSTANT = 1e4  # fits half precision; the norm changes tokens e by |e|^2 / 2e8 of themselves
EPS = 1e-6  # of the norm
BATCH = 512  # tokens that llama-server takes at once by default; an image has to fit


@dataclass(frozen=True)
class Carrier:
    """A projector type of llama.cpp, and the texts that it puts before and after each image."""

    projector_type: str
    image_markers: tuple[str, str]


SQUARE = Carrier("gemma3", ("<start_of_image>", "<end_of_image>"))
ANY_SIZE = Carrier("gemma4v", ("<|image>", "<image|>"))
CAUSAL_WIDTHS = (1536, 2560)  # newer llama.cpp takes LLMs of these for small Gemma 4, whose images it reads causally


def fitting_carrier(model: VoraForConditionalGeneration, processor: VoraProcessor) -> Carrier:
    """What carries a model: it takes images of any size if positions, texts around images and width let it."""
    is_axial = model.config.axial_positions and model.config.get_text_config().hidden_size not in CAUSAL_WIDTHS
    return ANY_SIZE if is_axial and tuple(processor.image_markers) == ANY_SIZE.image_markers else SQUARE


def check_fits(model: VoraForConditionalGeneration) -> None:
    """ValueError, with the cure, for a model whose way with images no projector of llama.cpp can express."""
    config, embedding = model.config, model.model.patch_embedding
    if type(embedding) is not PatchEmbedding:
        raise ValueError(
            f"The model is a {config.model_type} with an encoder of its own: only models that read images by a patch "
            "embedding are exported."
        )
    if config.patch_norm:
        raise ValueError(
            "The model has patch_norm: true, an RMSNorm between patches and positions, which no projector of "
            "llama.cpp computes. Train it from a teacher without that norm (ViT, DeiT, CLIP, SigLIP, DINO), "
            "so that it is false."
        )
    if config.image_attention != "bidirectional":
        raise ValueError(
            "The model has image_attention: causal, but llama.cpp lets the tokens of such an image attend in both "
            "directions: train with image_attention: bidirectional."
        )
    if config.num_channels != 3:
        raise ValueError(f"The model has num_channels {config.num_channels}, but llama.cpp reads images of 3.")


def square_size(model: VoraForConditionalGeneration, images: VoraImageProcessor, image_size: int | None = None) -> int:
    """Side in pixels of the one size of images: as given, or the largest square within the model's budget of tokens.
    ValueError where it is no whole number of tokens a side, or outside that budget."""
    side = model.config.patch_size * model.config.patch_merge
    least, most = images.min_image_tokens, images.max_image_tokens
    sizes = [n * side for n in range(1, int(most**0.5) + 1) if n * n >= least]
    if image_size is None and sizes:
        return sizes[-1]
    if image_size is None or image_size not in sizes:
        given = "No square" if image_size is None else f"--image-size {image_size}"
        known = f"give one of {', '.join(map(str, sizes[-8:]))}" if sizes else "export a model with another budget"
        raise ValueError(
            f"{given} fits tokens of {side} x {side} pixels and the model's budget of {least} to {most} of them: "
            f"{known}."
        )
    return image_size


@torch.no_grad()
def token_kernel(embedding: PatchEmbedding, patch_size: int) -> Tensor:
    """float[D, C, k, k]: the convolution by which a patch embedding without norm makes tokens of pixels."""
    m = embedding.patch_merge
    projection = embedding.projection.weight.double().unflatten(1, (m, m, -1))  # D, m, m, D_v
    kernel = torch.einsum("dijw,wx->dijx", projection, embedding.patch.weight.double())
    kernel = kernel.unflatten(-1, (-1, patch_size, patch_size)).permute(0, 3, 1, 4, 2, 5)  # D, C, m, p, m, p
    return kernel.flatten(4, 5).flatten(2, 3).float()


@torch.no_grad()
def token_positions(embedding: PatchEmbedding, num_rows: int, num_columns: int) -> Tensor:
    """float[R, S, D]: what it adds to the tokens of a grid."""
    m = embedding.patch_merge
    projection = embedding.projection.weight.double().unflatten(1, (m, m, -1))
    positions = embedding.positions_of_grid(num_rows * m, num_columns * m).double() + embedding.patch.bias.double()
    return torch.einsum("dijw,aibjw->abd", projection, positions.view(num_rows, m, num_columns, m, -1)).float()


def token_tables(embedding: PatchEmbedding, most: int) -> Tensor:
    """float[2, L, D]: tables of columns and of rows, whose sums are `token_positions` of axial ones."""
    columns, rows = token_positions(embedding, 1, most)[0], token_positions(embedding, most, 1)[:, 0]
    return torch.stack([columns, rows - rows[0]])


def with_constant(rows: Tensor, constant: float = NORM_CONSTANT) -> Tensor:
    """float[..., D] rows to float[..., E], with a constant in the channel after them."""
    width = rows.shape[-1]
    found = rows.new_zeros(*rows.shape[:-1], (width // 64 + 1) * 64)
    found[..., :width], found[..., width] = rows, constant
    return found


def square_tensors(embedding: PatchEmbedding, patch_size: int, tokens_a_side: int) -> dict[str, Tensor]:
    """The tensors of an mmproj file of type `gemma3`."""
    rows = with_constant(token_positions(embedding, tokens_a_side, tokens_a_side).flatten(0, 1))
    width, channels = embedding.projection.out_features, rows.shape[-1]
    return {
        "v.patch_embd.weight": with_constant(token_kernel(embedding, patch_size).movedim(0, -1), 0).movedim(-1, 0),
        "v.patch_embd.bias": torch.zeros(channels),
        "v.position_embd.weight": rows,
        "mm.input_projection.weight": torch.eye(channels, width),
        "mm.soft_emb_norm.weight": torch.full((channels,), NORM_CONSTANT / channels**0.5),
    }


def any_size_tensors(embedding: PatchEmbedding, patch_size: int, most: int) -> dict[str, Tensor]:
    """The tensors of an mmproj file of type `gemma4v`, for at most so many rows and columns of tokens."""
    tables = with_constant(token_tables(embedding, most), NORM_CONSTANT / 2)
    width, channels = embedding.projection.out_features, tables.shape[-1]
    return {
        "v.patch_embd.weight": with_constant(token_kernel(embedding, patch_size).movedim(0, -1), 0).movedim(-1, 0),
        "v.position_embd.weight": tables,
        "mm.input_projection.weight": torch.eye(width, channels) * (NORM_CONSTANT / channels**0.5),
    }


def write_mmproj(
    path: Path,
    model: VoraForConditionalGeneration,
    images: VoraImageProcessor,
    name: str,
    image_size: int | None = None,
) -> None:
    """Write the mmproj file for square images of a side of so many pixels, or for images of any size."""
    embedding, patch_size = model.model.patch_embedding, model.config.patch_size
    side = patch_size * model.config.patch_merge
    mean, deviation = np.array(images.image_mean), np.array(images.image_std)
    if image_size is None:
        carrier = ANY_SIZE
        most = max(BATCH, images.max_image_tokens)  # an image of more tokens does not fit into a batch anyway
        tensors = any_size_tensors(embedding, patch_size, most)
        mean, deviation = mean - deviation, deviation * 2  # this type makes 2 x - 1 of normalised pixels x
    else:
        carrier = SQUARE
        tensors = square_tensors(embedding, patch_size, image_size // side)
    numbers = {
        "image_size": image_size or side, "patch_size": side, "feed_forward_length": 0, "block_count": 0,
        "embedding_length": len(tensors["v.patch_embd.weight"]), "projection_dim": embedding.projection.out_features,
        "attention.head_count": 1, "projector.scale_factor": 1,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, arch="clip")
    writer.add_string("general.name", name)
    writer.add_string("general.type", "mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", carrier.projector_type)
    writer.add_bool("clip.use_gelu", True)
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", EPS)
    writer.add_array("clip.vision.image_mean", mean.tolist())
    writer.add_array("clip.vision.image_std", deviation.tolist())
    for key, tensor in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
