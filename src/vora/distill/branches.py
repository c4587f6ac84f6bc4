"""Images one after the other in one row of tokens, behind what all their samples begin with.

A step that only distills needs nothing after an image, so images need not be packed between texts: the row is a tree
of one trunk, `Branches` attends along it without masks, and nothing is padded.

Dims: T tokens, H heads, W width of a head.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vora.model.segmented_sdpa import SEGMENTED_SDPA, complete_attention

if TYPE_CHECKING:
    from vora.distill.objective import Objective
    from vora.model.modeling_vora import VoraForConditionalGeneration


@dataclass
class Branches:
    """A row of a beginning and many images behind it, each of which sees the beginning and all of itself."""

    beginning: int  # tokens, causal among themselves
    groups: list[tuple[int, int]]  # (how many images, tokens of each), in order

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
        """float[1, T, H, W]; images of one size are attended to together, without masks."""
        first = self.beginning
        begun = [states[:, :, :first] for states in (query, key, value)]
        outputs = []
        if first:
            causal = {"is_causal": True, "scale": scale, "enable_gqa": True, "dropout_p": dropout}
            outputs.append(scaled_dot_product_attention(*begun, **causal))  # type: ignore[arg-type]
        for count, length in self.groups:
            last = first + count * length
            own = [
                states[0, :, first:last].unflatten(1, (count, -1)).transpose(0, 1) for states in (query, key, value)
            ]
            keys, values = (torch.cat([a.expand(count, -1, -1, -1), b], 2) for a, b in zip(begun[1:], own[1:]))
            found = complete_attention(own[0], keys, values, scale, dropout)
            outputs.append(found.transpose(0, 1).flatten(1, 2)[None].to(query.dtype))
            first = last
        return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def mask_of_branches(branches: Branches, device: torch.device) -> Tensor:
    """What an LLM takes as `attention_mask` under `segmented_sdpa`, of no size, for one row of tokens."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    mask.attend = branches.attend  # type: ignore[attr-defined]
    return mask


def inputs_of_branches(
    vora: "VoraForConditionalGeneration", ids: Tensor, position_ids: Tensor, images: dict[str, Tensor], sizes: Tensor
) -> dict[str, Tensor]:
    """What `VoraModel` takes for a row int[1, T]; `sizes` int[G, 2] is on the host: how many images of how many tokens
    follow each other at its end."""
    groups = [(count, length) for count, length in sizes.tolist()]
    begun = vora.get_input_embeddings()(ids[:, : ids.shape[1] - sum(count * length for count, length in groups)])
    row = torch.cat([begun, vora.model.patch_embedding(**images).to(begun)[None]], 1)
    mask = mask_of_branches(Branches(begun.shape[1], groups), ids.device)
    return {"inputs_embeds": row, "position_ids": position_ids, "attention_mask": mask}


@torch.no_grad()
def takes_branches(objective: "Objective", longest: int) -> bool:
    """Whether a student computes the same of images in one row as of each by itself: tried on two small ones.

    Not so of an LLM with its own rule of attention, or layers that are no attention. `longest`: tokens of a sample.
    """
    vora, config = objective.vora, objective.config
    text_config = config.get_text_config()
    window, side = getattr(text_config, "sliding_window", None), 2 * config.patch_merge
    is_plain = text_config._attn_implementation == SEGMENTED_SDPA and config.image_attention == "bidirectional"
    if objective.distillation is None or not is_plain or longest > (window or longest):
        return False
    image_id, device = config.image_token_id, vora.device
    beginning = torch.tensor([[i for i in range(4) if i != image_id][:2]], device=device)
    alone = torch.cat([beginning, torch.full((1, 4), image_id, device=device)], 1)
    width = config.num_channels * config.patch_size**2
    pixels = torch.rand(2, side * side, width, generator=torch.Generator().manual_seed(0)).to(device)
    grids, places = torch.tensor([[1, side, side]] * 2), torch.arange(6, device=device)[None]
    was_training = objective.training
    objective.eval()
    each = []
    for image, grid in zip(pixels, grids):
        inputs = {"input_ids": alone, "pixel_values": image, "image_grid_thw": grid[None]}
        each.append(objective.run_student(inputs, True, True)[1])
    ids, positions = torch.cat([alone, alone[:, 2:]], 1), torch.cat([places, places[:, 2:]], 1)
    images = {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": grids}
    row = inputs_of_branches(vora, ids, positions, images, torch.tensor([[2, 4]]))
    try:
        together = objective.run_student(row, True, True)[1]
    except (RuntimeError, ValueError, IndexError):  # it makes something else of a row
        return False
    finally:
        objective.train(was_training)
    last = max(together)
    wanted, found = torch.cat([states[last][0, 2:] for states in each]), together[last][0, 2:]
    added = wanted.float() - row["inputs_embeds"][0, 2:].float()  # by the blocks
    return bool((found.float() - wanted.float()).norm() < 0.02 * added.norm())
