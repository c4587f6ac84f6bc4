"""The patch embedding of a plain ViT of transformers, read without per-family code.

Dims: C channels, p patch side, G = side of the position grid, D_v = width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from vora.build.hub import loading, located, remote_code
from vora.model.patch_embed import PatchEmbedding, resized

EXAMPLE = "google/vit-base-patch16-224"
KEY = "The teacher"  # in messages
PLAIN_VITS = "ViT, DeiT, CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3, AIMv2"


@dataclass
class VitEmbedding:
    """What a fresh `PatchEmbedding` starts from."""

    weight: Tensor  # float[D_v, C*p*p], flattened channel first
    bias: Tensor | None  # float[D_v]
    norm: Tensor | None  # float[D_v]
    position: Tensor | None  # float[G*G, D_v]; rotary teachers have no table
    patch_size: int
    num_channels: int
    image_size: int

    def config_fields(self, patch_size: int | None = None, image_size: int | None = None) -> dict[str, Any]:
        """The fields of `VoraConfig` that make a patch embedding of this one's shape; ValueError where another patch
        size is asked for than the teacher has."""
        if patch_size not in (None, self.patch_size):
            raise ValueError(
                f"patch_size {patch_size} was asked for, but the teacher's patches are {self.patch_size} pixels wide: "
                "leave patch_size out, or leave the teacher out of from_llm."
            )
        return {
            "patch_size": self.patch_size,
            "num_channels": self.num_channels,
            "image_size": image_size or self.image_size,
            "vision_hidden_size": self.weight.shape[0],
            "patch_norm": self.norm is not None,
        }

    @torch.no_grad()
    def copy_to(self, embedding: PatchEmbedding) -> None:
        """Copy into a patch embedding; positions are resampled where its grid differs; axial ones are the rows'
        and columns' means, whose sums are nearest to the table."""
        embedding.patch.weight.copy_(self.weight)
        bias = embedding.patch.bias
        bias.zero_() if self.bias is None else bias.copy_(self.bias)
        if isinstance(embedding.norm, nn.RMSNorm) and self.norm is not None:
            embedding.norm.weight.copy_(self.norm)
        if self.position is None:
            return
        side = round(len(self.position) ** 0.5)
        table = self.position.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
        if side != embedding.grid_size:
            table = resized(table, (embedding.grid_size, embedding.grid_size), "bicubic")
        if embedding.axial_positions:
            table = table - table.mean((2, 3), keepdim=True) / 2
            embedding.position.copy_(torch.cat([table.mean(3), table.mean(2)], 2)[0].T)
        else:
            embedding.position.copy_(table[0].flatten(1).T)


def load_vit(place: str, **kwargs: Any) -> PreTrainedModel:
    """A ViT of a folder or hub id. ValueError where it lacks weights, which transformers would draw at random; a
    pooler's, of which nothing is read, may be missing, and without a report."""
    log = logging.get_logger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        vit, info = AutoModel.from_pretrained(place, output_loading_info=True, **kwargs)
    finally:
        log.setLevel(level)
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name and "head" not in name):
        raise ValueError(
            f"{KEY} {place} lacks {len(missing)} of its weights, such as {missing[0]}: copy or fetch its files again."
        )
    return vit


def vit_embedding(vit: Any) -> VitEmbedding:
    """The patch embedding of a ViT (model, folder or hub id; of a `Teacher`, that of its ViT); ValueError where it is
    no plain ViT: no patch projection is found, or the model hides patches from itself."""
    given = getattr(vit, "vit", vit)
    if isinstance(given, nn.Module):
        model = given
    else:
        place = located(given, KEY, EXAMPLE)
        with loading(place, KEY):
            model = load_vit(place, **remote_code())
    vit = getattr(model, "vision_model", model)
    config = getattr(vit.config, "vision_config", vit.config)
    if hasattr(config, "mask_ratio"):  # ViT-MAE: its outputs are of a shuffled part of the patches
        raise ValueError(
            f"{type(vit).__name__} hides {config.mask_ratio:.0%} of the patches and shuffles the others, so its "
            f"outputs do not stand at the image's patches: only plain ViTs ({PLAIN_VITS}) can teach."
        )
    embeddings = getattr(vit, "embeddings", vit)
    channels, patch_size = getattr(config, "num_channels", 3), getattr(config, "patch_size", None) or 0
    weight, bias = _patch_projection(embeddings, channels, patch_size)
    if weight is None or len(weight) != getattr(config, "hidden_size", None):
        raise ValueError(
            f"{type(vit).__name__} has no plain projection of patches to its width: only plain ViTs ({PLAIN_VITS}) "
            "can teach."
        )
    norms = (m for name, m in embeddings.named_modules() if name.endswith("norm"))
    norm = next((m.weight for m in norms if hasattr(m, "weight")), None)
    position, image_size = None, getattr(config, "image_size", None)
    tables = [table for name, table in embeddings.named_parameters() if "position_embedding" in name]
    if tables := [table.reshape(-1, len(weight)) for table in tables if table.shape[-1] == len(weight)]:
        side = int(len(tables[0]) ** 0.5)
        position, image_size = tables[0][-(side**2) :], side * patch_size  # rows before belong to CLS and registers
    return VitEmbedding(weight, bias, norm, position, patch_size, channels, image_size or 16 * patch_size)


def _patch_projection(embeddings: nn.Module, channels: int, patch_size: Any) -> tuple[Tensor | None, Tensor | None]:
    """(weight float[D_v, C*p*p], bias), or (None, None) where there is none."""
    for module in embeddings.modules() if isinstance(patch_size, int) else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (patch_size, patch_size):
            return module.weight.flatten(1), module.bias
        if isinstance(module, nn.Linear) and module.in_features == channels * patch_size**2:
            channel_last = module.weight.unflatten(1, (patch_size, patch_size, channels))  # SigLIP 2
            return channel_last.permute(0, 3, 1, 2).flatten(1), module.bias
    return None, None
