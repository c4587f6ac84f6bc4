"""The rule of attention, in one place.

Dims: B rows, Q new tokens, K all tokens so far, N images.
"""

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate


def image_blocks(is_image, image_grid_thw, patch_merge=1):
    """Number the image tokens by the frame they belong to.

    Numbering follows the grids, not runs of neighbouring image tokens, so two images that touch stay apart.

    Args:
        is_image: bool[B, Q], True at image tokens.
        image_grid_thw: int[N, 3], frames, patch rows and patch columns of each image, in order of appearance.
        patch_merge: m; every m x m patches are one image token.

    Returns:
        int[B, Q]: the number of the image (or frame of a video) at image tokens, -1 at text.

    Raises:
        ValueError: the prompt has another number of image tokens than the images given have.
    """
    frames = image_grid_thw.to(is_image.device)
    frames = (frames[:, 1:].prod(-1) // patch_merge**2).repeat_interleave(frames[:, 0])
    num_placed, num_given = int(is_image.sum()), int(frames.sum())
    if num_placed != num_given:
        raise ValueError(
            f"The prompt has {num_placed} image tokens but the {image_grid_thw.shape[0]} images given have "
            f"{num_given * patch_merge**2} patches, which make {num_given} at patch_merge {patch_merge}. "
            "Was the prompt cut, or an image left out?"
        )
    blocks = torch.full(is_image.shape, -1, device=is_image.device)
    blocks[is_image] = torch.arange(len(frames), device=is_image.device).repeat_interleave(frames)
    return blocks


def attention_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids, blocks, seen_until=None):
    """Who sees whom. Text is causal; an image token sees its whole image and all before it (section 3.3 of the paper).

                  keys:  t  A  A  B  B  t        x = sees
        queries:  t      x  .  .  .  .  .        t text, A and B two images that touch
                  A      x  x  x  .  .  .
                  A      x  x  x  .  .  .
                  B      x  x  x  x  x  .
                  B      x  x  x  x  x  .
                  t      x  x  x  x  x  x

    Documents packed into one row never see each other: with `attention_mask=None`, either `position_ids` restart at
    each, or `seen_until` says how far to the right each token is seen. The latter also lets several questions share
    the picture before them: a token of one is seen until this one ends, the picture until the last one does.

    Args:
        config: the LLM's configuration; its sliding windows and chunks are kept.
        attention_mask: bool or int[B, K], False at padding, or None.
        blocks: int[B, Q] from `image_blocks`.
        seen_until: int[B, Q], the last place of the row that may see each token, or None: all after it.

    Returns:
        What the LLM takes as `attention_mask`: a mask in the form of its attention implementation (for sdpa
        bool[B, 1, Q, K], True = sees), or a dict of them by layer type.

    Raises:
        ValueError: `seen_until` in a row longer than the LLM's sliding window, which counts places, not positions.
    """
    if blocks is not None and past_key_values is not None:  # masks count from the cache's first token
        blocks = nn.functional.pad(blocks, (int(past_key_values.get_seq_length()), 0), value=-1)
    still_seen = None
    if seen_until is not None:
        window = getattr(config, "sliding_window", None)
        if window and seen_until.shape[1] > window:
            raise ValueError(
                f"A row of {seen_until.shape[1]} tokens in which several questions may share a picture exceeds the "
                f"sliding window of {window} tokens: use rows of at most {window}."
            )
        position_ids = None  # borders are given, so restarts of positions must not be read as such

        def still_seen(batch, head, query, key):
            return query <= seen_until[batch, key]

    return create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        and_mask_function=still_seen,
        block_sequence_ids=blocks,
    )
