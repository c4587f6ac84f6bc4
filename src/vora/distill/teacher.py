"""A frozen, plain ViT of transformers as the teacher.

Dims: P patches of all images, C channels, p the student's patch side, D_t = the teacher's width.
"""

import inspect
import json
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import AutoModel

from vora.build.vit_init import vit_embedding
from vora.distill.blockwise import SUMMARY
from vora.model.patch_embed import resized


class Teacher(nn.Module):
    """Features of every block at every patch, on whatever grid the student uses.

    The images are taken from the student's own patches, brought to the teacher's normalisation and patch size, so
    that both see the same pixels and their grids agree patch by patch. CLS and register tokens are dropped,
    but for the summary: the CLS token's last state, or the mean of all patches where there is none.
    """

    name = None  # hub id or folder, where it came from one

    def __init__(self, vit, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)):
        super().__init__()
        self.vit = getattr(vit, "vision_model", vit).requires_grad_(False).eval()
        config = getattr(self.vit.config, "vision_config", self.vit.config)
        self.embedding = vit_embedding(self.vit)  # first, for it refuses what is no plain ViT
        self.hidden_size, self.num_blocks = config.hidden_size, config.num_hidden_layers
        self.patch_size = self.embedding.patch_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.accepts = set(inspect.signature(self.vit.forward).parameters)

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, **kwargs):
        """A ViT by hub id or folder (ViT, DeiT, CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3, AIMv2), with the
        normalisation of its preprocessor_config.json (0.5, 0.5 where there is none). Half-precision files are read
        as float32 by default: processors without half-precision arithmetic are many times slower on them; a run in
        bf16 asks for bf16.

        Raises:
            ValueError: the model has no plain patch projection.
        """
        if not Path(name).exists() and (str(name).count("/") > 1 or str(name).startswith((".", "~"))):
            raise ValueError(
                f"There is no ViT at {name}: name a folder or a hub id, such as google/vit-base-patch16-224."
            )
        vit = AutoModel.from_pretrained(name, dtype=dtype, **kwargs)
        teacher = cls(vit, **_normalisation(name))
        teacher.name = str(name)
        return teacher

    def train(self, mode=True):
        """A teacher never trains: it stays in eval mode whatever its surroundings do."""
        return super().train(False)

    @property
    def device(self):
        return next(self.vit.parameters()).device

    @property
    def takes_any_grid(self):
        """Whether its positions fit any grid; AIMv2's table does not."""
        if self.embedding.position is None or {"spatial_shapes", "interpolate_pos_encoding"} & self.accepts:
            return True
        return hasattr(self.vit.embeddings, "interpolate_pos_encoding")

    @property
    def blocks(self):
        lists = [m for m in self.vit.modules() if isinstance(m, nn.ModuleList) and len(m) == self.num_blocks]
        return lists[0]

    @torch.inference_mode()
    def forward(self, images, grids, blocks):
        """Outputs of some blocks at every patch of the student's grids.

        Args:
            images: list of N float[C, H, W] in 0..1.
            grids: list of N (rows, columns): the student's patches of each image.
            blocks: indices of the teacher's blocks; `SUMMARY` among them stands for the last block's CLS token.

        Returns:
            {block: float[P, D_t]}, patches of all images in raster order; of `SUMMARY` float[N, D_t].
        """
        features = {block: [None] * len(images) for block in blocks}
        for grid in sorted(set(grids)):
            members = [i for i, other in enumerate(grids) if other == grid]
            alike = self.features_on_grid(self.resize([images[i] for i in members], grid), grid, blocks)
            for block, tokens in alike.items():
                for i, image_tokens in zip(members, tokens):
                    features[block][i] = image_tokens
        return {block: torch.cat(tokens) for block, tokens in features.items()}

    def resize(self, images, grid):
        """Images of one grid to float[n, C, rows * p_t, columns * p_t], normalised as the teacher expects."""
        size = tuple(side * self.patch_size for side in grid)
        resized = [
            image
            if image.shape[1:] == size  # bicubic values overshoot
            else F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
            for image in images
        ]
        pixels = torch.stack(resized)
        mean, std = (channels(tuple(v), pixels.device) for v in (self.image_mean, self.image_std))
        return (pixels - mean) / std

    def features_on_grid(self, pixels, grid, blocks):
        """{block: float[n, rows * columns, D_t]} of normalised images of one grid; of `SUMMARY` float[n, 1, D_t].

        Positions are resampled to the grid where the ViT can; where it cannot (AIMv2's table), it runs at its own
        size and its features are resampled.
        """
        parameter = next(self.vit.parameters())
        pixels = pixels.to(parameter.device, parameter.dtype)
        own_grid = grid
        if "spatial_shapes" in self.accepts:  # SigLIP 2 takes patches, channel last
            # sizes on the host, where they are read; without padding there is nothing to mask, or to look for
            shapes = torch.tensor([grid] * len(pixels))
            inputs = {"pixel_values": pixel_patches(pixels, self.patch_size), "spatial_shapes": shapes}
            inputs["pixel_attention_mask" if "pixel_attention_mask" in self.accepts else "attention_mask"] = None
        elif "interpolate_pos_encoding" in self.accepts:
            inputs = {"pixel_values": pixels, "interpolate_pos_encoding": True}
        else:
            if not self.takes_any_grid:
                side = round(len(self.embedding.position) ** 0.5)
                own_grid = (side, side)
                pixels = F.interpolate(pixels, (side * self.patch_size,) * 2, mode="bicubic", antialias=True)
            inputs = {"pixel_values": pixels}
        outputs = {}
        wanted = {self.num_blocks - 1 if block == SUMMARY else block for block in blocks}
        hooks = [hook_on_output(self.blocks, block, partial(outputs.__setitem__, block)) for block in wanted]
        try:
            self.vit(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        num_patches = own_grid[0] * own_grid[1]  # CLS and register tokens come first
        features = {
            block: resample_features(outputs[block][:, -num_patches:], own_grid, grid)
            for block in blocks
            if block != SUMMARY
        }
        if SUMMARY in blocks:
            last = outputs[self.num_blocks - 1]
            features[SUMMARY] = last[:, :1] if last.shape[1] > num_patches else last.mean(1, keepdim=True)
        return features


def hook_on_output(blocks, block, keep):
    """Have `keep` called with a block's output at every forward; block -1 stands for what enters the first one.

    Returns:
        The handle that removes the hook.
    """

    def before(module, args, kwargs):
        keep(args[0] if args else kwargs["hidden_states"])

    def after(module, args, output):
        keep(output[0] if isinstance(output, tuple) else output)

    if block == -1:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[block].register_forward_hook(after)


def resample_features(features, own_grid, grid):
    """float[n, rows * columns, D] from one grid to another, bilinear."""
    if own_grid == grid:
        return features
    table = features.transpose(1, 2).unflatten(2, own_grid).float()
    table = resized(table, grid, "bilinear")
    return table.flatten(2).transpose(1, 2).to(features.dtype)


def pixel_patches(pixels, patch_size):
    """float[n, C, H, W] to float[n, patches, p*p*C], raster order, channel last."""
    patches = pixels.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # n C rows columns p p
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def images_of_patches(pixel_values, grids, patch_size, image_mean, image_std):
    """The student's input turned back into images.

    Args:
        pixel_values: float[P, C*p*p], normalised, raster order, each flattened (C, p, p).
        grids: list of N (rows, columns).

    Returns:
        list of N float[C, rows * p, columns * p] in 0..1.
    """
    images = []
    for (rows, columns), patches in zip(grids, pixel_values.split([r * c for r, c in grids])):
        patches = patches.float().view(rows, columns, -1, patch_size, patch_size)
        image = patches.permute(2, 0, 3, 1, 4).reshape(-1, rows * patch_size, columns * patch_size)
        mean, std = (channels(tuple(v), image.device) for v in (image_mean, image_std))
        images.append(image * std + mean)
    return images


@lru_cache
def channels(values, device):
    """float[C, 1, 1], made once per device: to copy numbers to a GPU is to wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)[:, None, None]


def _normalisation(name):
    """Mean and standard deviation from preprocessor_config.json, by folder or hub id."""
    path = Path(name) / "preprocessor_config.json"
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(str(name), "preprocessor_config.json"))
        except OSError:
            return {}
    if not path.exists():
        return {}
    config = json.loads(path.read_text())
    return {key: config[key] for key in ("image_mean", "image_std") if key in config}
