"""Patches to image tokens: linear, norm, two-dimensional positions resampled to any grid, projection.

Dims: P patches of all images of the batch, C channels, p patch side, D_v = vision_hidden_size, D = LLM width,
G = side of the learned grid, N images.
"""

import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbedding(nn.Module):
    """Everything that VoRA adds to an LLM for good (arXiv 2503.20680, section 3.1).

    The `nn.Linear` over flattened patches equals the strided convolution of a ViT. Positions are learned on a G x G
    grid and resampled in two dimensions to the grid of each image.
    """

    def __init__(self, config):
        super().__init__()
        self.grid_size = config.grid_size
        width = config.vision_hidden_size
        self.patch = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.norm = nn.RMSNorm(width, eps=1e-5) if config.patch_norm else nn.Identity()
        self.position = nn.Parameter(torch.zeros(self.grid_size**2, width))
        self.projection = nn.Linear(width, config.text_config.hidden_size, bias=False)

    def forward(self, pixel_values, image_grid_thw):
        """float[P, C*p*p] patches and int[N, 3] grids to float[P, D] image tokens.

        Raises:
            ValueError: the grids do not account for exactly the patches given.
        """
        grids = image_grid_thw.tolist()
        num_patches = sum(t * h * w for t, h, w in grids)
        if num_patches != pixel_values.shape[0]:
            raise ValueError(
                f"pixel_values holds {pixel_values.shape[0]} patches but image_grid_thw describes {num_patches} "
                f"in {len(grids)} images: pass both from one call of the image processor."
            )
        tokens = self.norm(self.patch(pixel_values.to(self.patch.weight.dtype)))
        return self.projection(tokens + self.positions(grids))

    def positions(self, grids):
        """Learned positions of every patch: list of (frames, rows, columns) to float[P, D_v]."""
        resampled = {(h, w): self.positions_of_grid(h, w) for _, h, w in grids}
        return torch.cat([resampled[h, w].repeat(t, 1) for t, h, w in grids])

    def positions_of_grid(self, num_rows, num_columns):
        """The learned table resampled (bicubic, antialiased) to float[num_rows * num_columns, D_v]."""
        if (num_rows, num_columns) == (self.grid_size, self.grid_size):
            return self.position
        table = self.position.unflatten(0, (self.grid_size, self.grid_size)).permute(2, 0, 1)[None]
        table = F.interpolate(
            table.float(), (num_rows, num_columns), mode="bicubic", align_corners=False, antialias=True
        )
        return table[0].flatten(1).T.to(self.position.dtype)
