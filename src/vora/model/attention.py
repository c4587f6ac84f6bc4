"""The rule of attention, in one place.

Dims: B sequences, Q new tokens, K all tokens so far, N images.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate

from .segmented_sdpa import SEGMENTED_SDPA, cut


def image_blocks(is_image: Tensor, image_grid_thw: Tensor, patch_merge: int = 1) -> Tensor:
    """int[B, Q]: the number of its image (or frame of a video) at each image token, -1 at text.

    Numbering follows the grids, int[N, 3], not runs of True in bool[B, Q], so two images that touch stay apart.

    Raises:
        ValueError: the prompt has another number of image tokens than the images given have.
    """
    sizes = [h * w // patch_merge**2 for t, h, w in image_grid_thw.tolist() for _ in range(t)]
    num_placed, num_given = int(is_image.sum()), sum(sizes)
    if num_placed != num_given:
        raise ValueError(
            f"The prompt has {num_placed} image tokens but the {image_grid_thw.shape[0]} images given have "
            f"{num_given * patch_merge**2} patches, which make {num_given} at patch_merge {patch_merge}. "
            "Was the prompt cut, an image left out, or the processor made with another tokenizer than the model? With "
            "past_key_values give only the images that are not in them."
        )
    numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long)).to(is_image.device)
    return torch.full(is_image.shape, -1, device=is_image.device).masked_scatter_(is_image, numbers)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Places that an LLM's sliding blocks see at once; None if it has none."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = not kinds or any("sliding" in kind for kind in kinds)
    return getattr(text, "sliding_window", None) if slides else None


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """The most tokens of a sequence whose samples share what is before them: an LLM's context, or its sliding window
    where that is shorter, for it counts places. None where neither is known."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(filter(None, (context, sliding_window(config))), default=None)


def attention_masks(
    config: PreTrainedConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None,
    position_ids: Tensor | None, blocks: Tensor | None, seen_until: Tensor | None = None,
) -> Any:  # fmt: skip
    """Who sees whom. Text is causal; an image token sees its whole image and all before it (section 3.3 of the paper).

                  keys:  t  A  A  B  B  t        x = sees
        queries:  t      x  .  .  .  .  .        t text, A and B two images that touch
                  A      x  x  x  .  .  .
                  A      x  x  x  .  .  .
                  B      x  x  x  x  x  .
                  B      x  x  x  x  x  .
                  t      x  x  x  x  x  x

    Documents packed into one sequence never see each other: with `attention_mask=None`, either `position_ids` restart
    at each, or `seen_until` says how far to the right each token is seen. The latter also lets several questions share
    the image before them: a token of one is seen until this one ends, the image until the last one does.

    Args:
        attention_mask: bool or int[B, K], False at padding.
        blocks: int[B, Q] from `image_blocks`.
        seen_until: int[B, K], the last place that may see each token. All of an image may see it; there is no cache.

    Returns:
        What the LLM takes as `attention_mask`: a mask in the form of its attention implementation (for sdpa
        bool[B, 1, Q, K], True = sees; for `segmented_sdpa` with its segments), or a dict of them by layer type.

    Raises:
        ValueError: `seen_until` in a sequence longer than the LLM's sliding window, which counts places.
    """
    is_flex = config._attn_implementation == "flex_attention"
    still_seen, all_blocks = None, blocks
    if seen_until is not None:
        window = sliding_window(config)
        if window and seen_until.shape[1] > window:
            raise ValueError(
                f"A packed sequence of {seen_until.shape[1]} tokens in which several questions may share an image "
                f"exceeds the sliding window of {window} tokens: use sequences of at most {window}."
            )
        position_ids = None  # borders are given, so restarts of positions must not be read as such
        if is_flex:  # dense masks would be evaluated under vmap, which costs 5 ms and more: see `_only_while_seen`
            still_seen = lambda batch, head, query, key: query <= seen_until[batch, key]  # noqa: E731
        elif blocks is None:
            all_blocks = torch.full_like(seen_until, -1)  # without any, sdpa is told "causal" and given no mask
    elif past_key_values is not None and blocks is not None:  # masks count from the cache's first token
        all_blocks = nn.functional.pad(blocks, (past_key_values.get_seq_length(), 0), value=-1)
    given = config, inputs_embeds, attention_mask, past_key_values, position_ids
    masks = create_masks_for_generate(*given, and_mask_function=still_seen, block_sequence_ids=all_blocks)
    if is_flex:
        return masks
    by_type = masks if isinstance(masks, dict) else {None: masks}
    for layer_type, mask in by_type.items():
        if mask is None or mask.dim() < 4:
            continue  # of recurrent layers, which know padding alone
        if seen_until is not None:
            mask = by_type[layer_type] = _only_while_seen(mask, seen_until)
        if config._attn_implementation == SEGMENTED_SDPA:
            cut(mask, blocks, seen_until, inputs_embeds)
    return masks if isinstance(masks, dict) else by_type[None]


def _only_while_seen(mask: Tensor, seen_until: Tensor) -> Tensor:
    """A dense mask, of truth values or to be added to scores, less what `seen_until` forbids."""
    places = torch.arange(seen_until.shape[1], device=seen_until.device)[-mask.shape[2] :]  # after what is cached
    still = places[:, None] <= seen_until[:, None, None, :]
    if mask.dtype == torch.bool:
        return still.logical_and_(mask)
    return mask.masked_fill(~still, torch.finfo(mask.dtype).min)
