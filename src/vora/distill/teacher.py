"""What a teacher gives, and the frozen, plain ViT of transformers that gives it.

Dims: P patches of all images, N images, C channels, p the student's patch side, p_t the teacher's, D_t its width.
"""

import inspect
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from vora.build.hub import hub_problem, loading, located, remote_code
from vora.build.vit_init import EXAMPLE, KEY, load_vit, vit_embedding
from vora.distill.blocks import block_outputs, only_first_blocks
from vora.distill.blockwise import SUMMARY
from vora.model.patch_embed import resized
from vora.model.segmented_sdpa import use_segmented_sdpa_on_cpu

Grid = tuple[int, int]  # rows, columns of patches
PROBE_GRID = (3, 4, 12)  # rows, columns, how many of its places are tried


class TeacherProtocol(Protocol):
    """What any teacher gives; `Teacher` is one, and so is an object of your own with these names."""

    name: str | None  # hub id or folder, for the model card
    hidden_size: int  # D_t
    num_blocks: int
    patch_size: int  # p_t, which a fresh student takes
    image_mean: list[float]  # the normalisation that it expects, which a fresh student's image processor takes
    image_std: list[float]

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device) -> Any: ...

    def __call__(self, images: list[Tensor], grids: list[Grid], blocks: list[int | str]) -> dict[int | str, Tensor]:
        """Features of images, without gradients: of each block float[P, D_t], one vector for each patch of the
        student's grids, in raster order, image after image; of `SUMMARY` float[N, D_t].

        Args:
            images: N float[C, rows * p, columns * p] in 0..1.
        """
        ...


class Teacher(nn.Module):
    """Features of every block of a ViT at every patch, on whatever grid the student uses (`TeacherProtocol`).

    The images are taken from the student's own patches, brought to the teacher's normalisation and patch size, so
    that both see the same pixels and their grids agree patch by patch. CLS and register tokens are dropped,
    but for the summary: the CLS token's last state, or the mean of all patches where there is none.

    Raises:
        ValueError: it has no plain patch projection, or does not give one feature for each patch, in their order.
    """

    name: str | None = None
    vit: Any

    def __init__(
        self, vit: nn.Module, image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:  # fmt: skip
        super().__init__()
        self.vit = getattr(vit, "vision_model", vit).requires_grad_(False).eval()
        config = getattr(self.vit.config, "vision_config", self.vit.config)
        self.embedding = vit_embedding(self.vit)  # first, for it refuses what is no plain ViT
        self.hidden_size, self.num_blocks = config.hidden_size, config.num_hidden_layers
        self.patch_size = self.embedding.patch_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        use_segmented_sdpa_on_cpu(self.vit, torch.device("cpu"))  # elsewhere, and without bf16, it is sdpa
        self.accepts = set(inspect.signature(self.vit.forward).parameters)
        check_features(self)

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> "Teacher":
        """A ViT by hub id or folder, with the normalisation of its preprocessor_config.json (0.5, 0.5 without one).

        Half-precision files are read as float32 by default, since processors without half-precision arithmetic are
        many times slower on them. ValueError: there is none, or it cannot teach.
        """
        place = located(name, KEY, EXAMPLE)
        with loading(place, KEY):
            vit = load_vit(place, dtype=dtype, **remote_code() | kwargs)
            normalisation = normalisation_of(place)
        try:
            teacher = cls(vit, **normalisation)
        except ValueError as error:
            raise ValueError(f"{KEY} {name}: {error}") from None
        teacher.name = str(name)
        return teacher

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)  # a teacher never trains, whatever its surroundings do

    @property
    def device(self) -> torch.device:
        return next(self.vit.parameters()).device

    @property
    def takes_any_grid(self) -> bool:
        """Whether its positions fit any grid; AIMv2's table does not."""
        if self.embedding.position is None or {"spatial_shapes", "interpolate_pos_encoding"} & self.accepts:
            return True
        return hasattr(self.vit.embeddings, "interpolate_pos_encoding")

    @property
    def own_grid(self) -> Grid:
        """The square grid that its table of positions is made for; (0, 0) without a table."""
        table = self.embedding.position
        return (0 if table is None else round(len(table) ** 0.5),) * 2

    @property
    def blocks(self) -> nn.ModuleList:
        return next(m for m in self.vit.modules() if isinstance(m, nn.ModuleList) and len(m) == self.num_blocks)

    @torch.inference_mode()
    def forward(self, images: list[Tensor], grids: list[Grid], blocks: Iterable[int | str]) -> dict[int | str, Tensor]:
        """Features of images at every patch of the student's grids, see `TeacherProtocol`."""
        features: dict[int | str, dict[int, Tensor]] = {block: {} for block in blocks}
        if len(set(grids)) == 1:
            alike = self.features_on_grid(self.resize(images, grids[0]), grids[0], list(features))
            return {block: tokens.flatten(0, 1) for block, tokens in alike.items()}
        for grid in sorted(set(grids)):
            members = [i for i, other in enumerate(grids) if other == grid]
            alike = self.features_on_grid(self.resize([images[i] for i in members], grid), grid, list(features))
            for block, tokens in alike.items():
                features[block].update(zip(members, tokens))
        return {block: torch.cat([of[i] for i in range(len(images))]) for block, of in features.items()}

    def resize(self, images: list[Tensor], grid: Grid) -> Tensor:
        """Images of one grid to float[n, C, rows * p_t, columns * p_t], normalised as the teacher expects."""
        size = tuple(side * self.patch_size for side in grid)

        def fitted(image: Tensor) -> Tensor:
            if image.shape[1:] == size:
                return image
            return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)  # it overshoots

        pixels = torch.stack([fitted(image) for image in images])
        mean, std = (channels(tuple(v), pixels.device) for v in (self.image_mean, self.image_std))
        return pixels.sub_(mean).div_(std)

    def features_on_grid(self, pixels: Tensor, grid: Grid, blocks: Sequence[int | str]) -> dict[int | str, Tensor]:
        """{block: float[n, rows * columns, D_t]} of normalised images of one grid; of `SUMMARY` float[n, 1, D_t].

        Positions are resampled to the grid where the ViT can; where it cannot (AIMv2's table), it runs at its own
        size and its features are resampled.
        """
        inputs, own_grid = self.inputs_on_grid(pixels, grid)
        wanted = {self.num_blocks - 1 if block == SUMMARY else int(block) for block in blocks}
        with block_outputs(self.blocks, sorted(wanted)) as outputs:
            self.vit(**inputs)
        num_patches = own_grid[0] * own_grid[1]  # CLS and register tokens come first
        features: dict[int | str, Tensor] = {
            block: resample_features(outputs[int(block)][:, -num_patches:], own_grid, grid)
            for block in blocks
            if block != SUMMARY
        }
        if SUMMARY in blocks:
            last = outputs[self.num_blocks - 1]
            features[SUMMARY] = last[:, :1] if last.shape[1] > num_patches else last.mean(1, keepdim=True)
        return features

    def inputs_on_grid(self, pixels: Tensor, grid: Grid) -> tuple[dict[str, Any], Grid]:
        """(what the ViT takes for normalised images of one grid, the grid on which it sees them)."""
        parameter, side = next(self.vit.parameters()), self.patch_size
        if not self.takes_any_grid:
            grid = self.own_grid  # in float32: a processor antialiases nothing less
            pixels = F.interpolate(pixels.float(), (grid[0] * side, grid[1] * side), mode="bicubic", antialias=True)
        pixels = pixels.to(parameter.device, parameter.dtype)
        if "spatial_shapes" in self.accepts:  # SigLIP 2 takes patches float[n, rows * columns, p*p*C]
            # sizes on the host, where they are read; without padding there is nothing to mask, or to look for
            shapes = torch.tensor([grid] * len(pixels))
            mask = "pixel_attention_mask" if "pixel_attention_mask" in self.accepts else "attention_mask"
            patches = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
            return {"pixel_values": patches.flatten(3).flatten(1, 2), "spatial_shapes": shapes, mask: None}, grid
        if "interpolate_pos_encoding" in self.accepts:
            return {"pixel_values": pixels, "interpolate_pos_encoding": True}, grid
        return {"pixel_values": pixels}, grid


def check_features(teacher: Teacher) -> None:
    """Raise ValueError unless a ViT gives one feature for each patch, in raster order and always the same: then each
    patch that brightens moves most what enters the first block at its own place. ViT-MAE, for one, shuffles patches.
    """
    parameter = next(teacher.vit.parameters())
    if parameter.device.type == "meta":  # only shapes are wanted of it
        return
    rows, columns, count = PROBE_GRID
    if not teacher.takes_any_grid:  # its own, which nothing resamples; large, so fewer of its places
        (rows, columns), count = teacher.own_grid, 2
    places = torch.arange(rows * columns)[:: max(1, rows * columns // count)]
    side = teacher.patch_size
    pixels = torch.zeros(1 + len(places), teacher.embedding.num_channels, rows * side, columns * side)
    for number, place in enumerate(places.tolist()):
        top, left = side * (place // columns), side * (place % columns)
        pixels[1 + number, :, top : top + side, left : left + side] = 1
    found = ""
    try:
        inputs, _ = teacher.inputs_on_grid(pixels, (rows, columns))
        blocks = teacher.blocks
        with torch.inference_mode(), block_outputs(blocks, [-1]) as outputs, only_first_blocks(teacher.vit, blocks, 1):
            teacher.vit(**inputs)
        features = outputs[-1][:, -rows * columns :].float()
        moved = (features[1:] - features[0]).norm(dim=-1).cpu()
        if features.shape[1] != rows * columns:
            found = f"for {rows * columns} patches it gives {features.shape[1]} features"
        elif wrong := int((moved.argmax(-1) != places).sum()):
            found = f"{wrong} of {len(places)} patches that change move the feature of another one"
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        found = " ".join(f"it takes no plain images ({error})".split())[:300]
    if found:
        raise ValueError(
            f"{type(teacher.vit).__name__} cannot teach: {found}. A teacher must give one feature for each patch, in "
            "raster order and at each run the same, as ViT, DeiT, CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3 and AIMv2 do."
        )


def resample_features(features: Tensor, own_grid: Grid, grid: Grid) -> Tensor:
    """float[n, rows * columns, D] from one grid to another, bilinear."""
    if own_grid == grid:
        return features
    table = resized(features.transpose(1, 2).unflatten(2, own_grid).float(), grid, "bilinear")
    return table.flatten(2).transpose(1, 2).to(features.dtype)


def images_of_patches(
    pixel_values: Tensor, grids: Sequence[Grid], patch_size: int, image_mean: Sequence[float],
    image_std: Sequence[float],
) -> list[Tensor]:  # fmt: skip
    """The student's patches float[P, C*p*p] turned back into N images float[C, rows * p, columns * p] in 0..1."""
    images: list[Tensor] = []
    mean, std = (channels(tuple(v), pixel_values.device) for v in (image_mean, image_std))
    alike = [(rows, columns, len(list(same))) for (rows, columns), same in groupby(grids)]
    for (rows, columns, count), patches in zip(alike, pixel_values.split([r * c * n for r, c, n in alike])):
        patches = patches.float().view(count, rows, columns, -1, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
        images += patches.reshape(count, -1, rows * patch_size, columns * patch_size).mul(std).add_(mean)
    return images


@lru_cache
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float[C, 1, 1], made once per device: to copy numbers to a GPU is to wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)[:, None, None]


def normalisation_of(name: str | Path) -> dict[str, list[float]]:
    """Mean and standard deviation from preprocessor_config.json, by folder or hub id; nothing where there is none."""
    path = Path(name) / "preprocessor_config.json"
    if not Path(name).is_dir():
        if hub_problem(str(name)):
            return {}
        try:
            path = Path(hf_hub_download(str(name), "preprocessor_config.json"))
        except OSError:
            return {}
    if not path.exists():
        return {}
    config = json.loads(path.read_text())
    return {key: config[key] for key in ("image_mean", "image_std") if key in config}
