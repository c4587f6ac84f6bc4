"""A patch embedding in a form that stock llama.cpp reads: an mmproj file of its projector type `gemma3`, no blocks.

Without a norm, patch projection, positions, merge and projection are one convolution and one row to add per token.
llama.cpp normalises (RMSNorm) what comes out of that before a last projection. So a channel of its own holds a number
in every row beside which the tokens are nothing to the norm, and the last projection leaves it out.

Dims: p patch side, m = patch_merge, k = m p side of a token, N tokens, D LLM width, E channels here, D_v width of the
patch embedding, C colours.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.patch_embed import PatchEmbedding

BEGIN, END = "<start_of_image>", "<end_of_image>"  # texts that llama.cpp puts around an image of this projector type
NORM_CONSTANT = 1e4  # fits half precision; the norm changes tokens e by |e|^2 / 2e8 of themselves
EPS = 1e-6  # of the norm


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
def as_convolution(embedding: PatchEmbedding, patch_size: int, tokens_a_side: int) -> tuple[Tensor, Tensor]:
    """What a patch embedding without norm does to a square image: kernel float[D, C, k, k], rows float[N, D]."""
    m, g = embedding.patch_merge, tokens_a_side
    patch, bias = embedding.patch.weight.double(), embedding.patch.bias.double()
    projection = embedding.projection.weight.double().unflatten(1, (m, m, -1))  # D, m, m, D_v
    kernel = torch.einsum("dijw,wx->dijx", projection, patch).unflatten(-1, (-1, patch_size, patch_size))
    kernel = kernel.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # D, C, m p, m p
    positions = embedding.positions_of_grid(g * m, g * m).double() + bias
    rows = torch.einsum("dijw,aibjw->abd", projection, positions.view(g, m, g, m, -1)).flatten(0, 1)
    return kernel.float(), rows.float()


def write_mmproj(
    path: Path, model: VoraForConditionalGeneration, images: VoraImageProcessor, image_size: int, name: str
) -> None:
    """Write the mmproj file for square images of a side of so many pixels."""
    p, m = model.config.patch_size, model.config.patch_merge
    kernel, rows = as_convolution(model.model.patch_embedding, p, image_size // (p * m))
    width = len(kernel)
    channels = (width // 64 + 1) * 64
    constant = rows.new_zeros(len(rows), channels)
    constant[:, width] = NORM_CONSTANT
    constant[:, :width] = rows
    tensors = {
        "v.patch_embd.weight": torch.cat([kernel, kernel.new_zeros(channels - width, *kernel.shape[1:])]),
        "v.patch_embd.bias": torch.zeros(channels),
        "v.position_embd.weight": constant,
        "mm.input_projection.weight": torch.eye(channels, width),
        "mm.soft_emb_norm.weight": torch.full((channels,), NORM_CONSTANT / channels**0.5),
    }
    numbers = {
        "image_size": image_size, "patch_size": p * m, "embedding_length": channels, "feed_forward_length": 0,
        "block_count": 0, "projection_dim": width, "attention.head_count": 1, "projector.scale_factor": 1,
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, arch="clip")
    writer.add_string("general.name", name)
    writer.add_string("general.type", "mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "gemma3")
    writer.add_bool("clip.use_gelu", True)
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", EPS)
    writer.add_array("clip.vision.image_mean", images.image_mean)
    writer.add_array("clip.vision.image_std", images.image_std)
    for key, tensor in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
