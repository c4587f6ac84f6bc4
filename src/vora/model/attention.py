"""The rule of attention, in one place.

Dims: B rows, Q new tokens, K all tokens so far, N images.
"""

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate


def image_blocks(is_image, image_grid_thw):
    """Number the image tokens by the frame they belong to.

    Numbering follows the grids, not runs of neighbouring image tokens, so two images that touch stay apart.

    Args:
        is_image: bool[B, Q], True at image tokens.
        image_grid_thw: int[N, 3], frames, patch rows and patch columns of each image, in order of appearance.

    Returns:
        int[B, Q]: the number of the image (or frame of a video) at image tokens, -1 at text.

    Raises:
        ValueError: the prompt has another number of image tokens than the images have patches.
    """
    frames = image_grid_thw.to(is_image.device)
    frames = frames[:, 1:].prod(-1).repeat_interleave(frames[:, 0])
    num_image_tokens, num_patches = int(is_image.sum()), int(frames.sum())
    if num_image_tokens != num_patches:
        raise ValueError(
            f"The prompt has {num_image_tokens} image tokens but the {image_grid_thw.shape[0]} images given have "
            f"{num_patches} patches: every patch needs one image token. Was the prompt cut, or an image left out?"
        )
    blocks = torch.full(is_image.shape, -1, device=is_image.device)
    blocks[is_image] = torch.arange(len(frames), device=is_image.device).repeat_interleave(frames)
    return blocks


def attention_masks(
    config, inputs_embeds, attention_mask, past_key_values, position_ids, blocks, document_ids=None, branch_ids=None
):
    """Who sees whom. Text is causal; an image token sees its whole image and all before it (section 3.3 of the paper).

                  keys:  t  A  A  B  B  t        x = sees
        queries:  t      x  .  .  .  .  .        t text, A and B two images that touch
                  A      x  x  x  .  .  .
                  A      x  x  x  .  .  .
                  B      x  x  x  x  x  .
                  B      x  x  x  x  x  .
                  t      x  x  x  x  x  x

    Documents packed into one row never see each other: with `attention_mask=None`, either `position_ids` restart at
    each, or `document_ids` names them. Several questions to one picture may share its tokens: with `branch_ids`, a
    token of branch k > 0 sees the trunk (branch 0) and its own branch only, as if the question stood alone.

    Args:
        config: the LLM's configuration; its sliding windows and chunks are kept.
        attention_mask: bool or int[B, K], False at padding, or None.
        blocks: int[B, Q] from `image_blocks`.
        document_ids, branch_ids: int[B, Q], both or neither.

    Returns:
        What the LLM takes as `attention_mask`: a mask in the form of its attention implementation (for sdpa
        bool[B, 1, Q, K], True = sees), or a dict of them by layer type.

    Raises:
        ValueError: branches in a row longer than the LLM's sliding window, which counts places, not positions.
    """
    if blocks is not None and past_key_values is not None:  # masks count from the cache's first token
        blocks = nn.functional.pad(blocks, (int(past_key_values.get_seq_length()), 0), value=-1)
    see_documents = None
    if branch_ids is not None:
        window = getattr(config, "sliding_window", None)
        if window and branch_ids.shape[1] > window:
            raise ValueError(
                f"A row of {branch_ids.shape[1]} tokens with several questions to one picture exceeds the sliding "
                f"window of {window} tokens: use rows of at most {window}."
            )
        position_ids = None  # documents are named, so restarts of positions must not be read as borders

        def see_documents(batch, head, query, key):
            same_document = document_ids[batch, query] == document_ids[batch, key]
            trunk_or_own = (branch_ids[batch, key] == 0) | (branch_ids[batch, key] == branch_ids[batch, query])
            return same_document & trunk_or_own

    return create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        and_mask_function=see_documents,
        block_sequence_ids=blocks,
    )
