"""Patches to image tokens: linear, norm, two-dimensional positions of any grid, merge, projection.

Dims: P patches of all images of the batch, C channels, p patch side, m = patch_merge, D_v = vision_hidden_size,
D = LLM width, G = side of the learned grid, N images, B sequences, T tokens of each.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vora import VoraConfig

Grid = tuple[int, int, int] | list[int]  # frames, patch rows, patch columns


class PatchEmbedding(nn.Module):
    """Everything that VoRA adds to an LLM for good (arXiv 2503.20680, section 3.1).

    The `nn.Linear` over flattened patches equals the strided convolution of a ViT. With `patch_merge` m, the m x m
    neighbours of a square go through the projection together and become one token.
    """

    def __init__(self, config: VoraConfig):
        super().__init__()
        self.grid_size, self.axial_positions = config.grid_size, config.axial_positions
        width = config.vision_hidden_size
        self.patch = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.norm = nn.RMSNorm(width, eps=config.patch_norm_eps) if config.patch_norm else nn.Identity()
        num_positions = self.grid_size * (2 if self.axial_positions else self.grid_size)
        self.position = nn.Parameter(torch.zeros(num_positions, width))
        self.patch_merge = config.patch_merge
        self.projection = nn.Linear(config.patch_merge**2 * width, config.get_text_config().hidden_size, bias=False)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """float[P, C*p*p] patches and int[N, 3] grids to float[P / m^2, D] image tokens.

        Raises:
            ValueError: the grids do not account for exactly the patches given, or a side is no multiple of m.
        """
        grids = image_grid_thw.tolist()
        num_patches = sum(t * h * w for t, h, w in grids)
        if num_patches != pixel_values.shape[0]:
            raise ValueError(
                f"pixel_values holds {pixel_values.shape[0]} patches but image_grid_thw describes {num_patches} "
                f"in {len(grids)} images: pass both from one call of the image processor."
            )
        # in the weights' precision also under autocast, whose half precision the norm has no fused kernel for; told by
        # the positions, for weights of 4 bits are stored as integers
        dtype = self.position.dtype
        tokens = self.norm(self.patch(pixel_values.to(dtype)).to(dtype))
        return self.projection(merge_neighbours(tokens + self.positions(grids), grids, self.patch_merge).flatten(1))

    def positions(self, grids: Sequence[Grid]) -> Tensor:
        """float[P, D_v] of every patch."""
        resampled = {(h, w): self.positions_of_grid(h, w) for _, h, w in grids}
        return torch.cat([resampled[h, w].repeat(t, 1) for t, h, w in grids])

    def positions_of_grid(self, num_rows: int, num_columns: int) -> Tensor:
        """float[num_rows * num_columns, D_v]: the table resampled; if axial, sums of its halves, clamped."""
        if self.axial_positions:
            tables = zip(self.position.chunk(2), (num_rows, num_columns))
            rows, columns = (t[torch.arange(n, device=t.device).clamp(max=len(t) - 1)] for t, n in tables)
            return (rows[:, None] + columns).flatten(0, 1)
        if (num_rows, num_columns) == (self.grid_size, self.grid_size):
            return self.position
        table = self.position.unflatten(0, (self.grid_size, self.grid_size)).permute(2, 0, 1)[None]
        table = resized(table.float(), (num_rows, num_columns), "bicubic")
        return table[0].flatten(1).T.to(self.position.dtype)


def put_tokens(inputs_embeds: Tensor, is_image: Tensor, image_tokens: Tensor) -> Tensor:
    """Image tokens float[P / m^2, D], in order, where bool[B, T] is True: float[B, T, D].

    What `masked_scatter` does, whose gradient makes the host wait for a GPU to count the places.
    """
    order = is_image.flatten().cumsum(0).sub(1).clamp(min=0)  # at text any token, which is not taken
    tokens = image_tokens.to(inputs_embeds).index_select(0, order).view_as(inputs_embeds)
    return torch.where(is_image[..., None], tokens, inputs_embeds)


def resized(table: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """float[n, D, rows, columns] on another grid, antialiased.

    One column is made as one row: torch 2.13 gives all rows of a single column the value of the first.
    """
    is_column = grid[1] == 1
    turned = table.transpose(2, 3) if is_column else table
    found = F.interpolate(turned, grid[::-1] if is_column else grid, mode=mode, align_corners=False, antialias=True)
    return found.transpose(2, 3) if is_column else found


def merge_neighbours(features: Tensor, grids: Sequence[Grid], patch_merge: int) -> Tensor:
    """float[P, D] of patches by the image token that they become, float[P / m^2, m^2, D]; both in raster order.

    Raises:
        ValueError: a side of a grid is no multiple of m.
    """
    m = patch_merge
    if m == 1:
        return features[:, None]
    if odd := [(h, w) for _, h, w in grids if h % m or w % m]:
        raise ValueError(
            f"{len(odd)} of {len(grids)} images have grids, such as {odd[0][0]} x {odd[0][1]} patches, that do not "
            f"split into {m} x {m} neighbours: make the patches with an image processor of patch_merge={m}."
        )
    alike = [(h, w, sum(t for t, *_ in same)) for (h, w), same in groupby(grids, key=lambda grid: tuple(grid[1:]))]
    squares = [
        part.view(t, h // m, m, w // m, m, -1).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        for part, (h, w, t) in zip(features.split([t * h * w for h, w, t in alike]), alike)
    ]
    return torch.cat(squares) if len(squares) > 1 else squares[0]
