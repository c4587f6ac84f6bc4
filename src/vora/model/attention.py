"""The rule of attention, in one place.

Dims: B rows, Q new tokens, K all tokens so far, N images.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_masks_for_generate, sdpa_mask

BY_STRETCH = "sdpa_by_stretch"  # an attention implementation: see `sdpa_by_stretch`


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

    masks = create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        and_mask_function=still_seen,
        block_sequence_ids=blocks,
    )
    if seen_until is not None and config._attn_implementation == BY_STRETCH:
        rows = stretches(seen_until)
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            mask.stretches = [
                [Stretch(mask[row, 0, start : start + length, start : start + length]) for start, length in one]
                for row, one in enumerate(rows)
            ]
    return masks


def stretches(seen_until):
    """The stretches of packed rows that see nothing of each other: list of B lists of (start, length).

    Places that only see themselves (padding) are gathered into one stretch.
    """
    found = []
    for row in seen_until.cummax(-1).values.tolist():
        starts = [0, *(place for place in range(1, len(row)) if row[place - 1] < place)]
        lengths = [end - start for start, end in zip(starts, [*starts[1:], len(row)])]
        one = []
        for start, length in zip(starts, lengths):
            if length == 1 and one and one[-1][2]:
                one[-1] = (one[-1][0], one[-1][1] + 1, True)
            else:
                one.append((start, length, length == 1))
        found.append([(start, length) for start, length, _ in one])
    return found


class Stretch:
    """A part of a packed row that sees nothing of the rest.

    Args:
        mask: bool[L, L], its part of the row's mask.
        is_causal: whether that is causal, if it is known.
    """

    def __init__(self, mask, is_causal=None):
        self.length = len(mask)
        self.is_causal = torch.equal(mask, torch.ones_like(mask).tril()) if is_causal is None else is_causal
        self.mask = mask[None, None].contiguous()
        self._added = {}

    def added(self, dtype):
        """float[1, L, L] to add to scores, made once per step."""
        if dtype not in self._added:
            zeros = torch.zeros(self.mask.shape[1:], dtype=dtype)
            self._added[dtype] = zeros.masked_fill(~self.mask[0], torch.finfo(dtype).min)
        return self._added[dtype]


def sdpa_by_stretch(module, query, key, value, attention_mask, **kwargs):
    """`sdpa` on each stretch of a packed row by itself: on a processor, which computes what a mask forbids too, the
    cost is that of the samples and not of the row's square. Without stretches it is `sdpa`.

    Args:
        query, key, value: float[B, heads, T, width of a head].
        attention_mask: from `attention_masks`, with an attribute `stretches`: per row a list of `Stretch`, which cover
            it in order.

    Returns:
        (float[B, T, heads, width of a head], None).
    """
    rows = getattr(attention_mask, "stretches", None)
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for row, *states in zip(rows, query.split(1), key.split(1), value.split(1)):
        parts = zip(row, *(state.split([stretch.length for stretch in row], dim=2) for state in states))
        outputs.append(torch.cat([_seen_in(module, *part, **kwargs) for part in parts], dim=1))
    return torch.cat(outputs), None


def _seen_in(module, stretch, query, key, value, **kwargs):
    """One stretch's attention, float[1, L, heads, width]."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if dtype != torch.bfloat16 or kwargs.get("dropout"):
        mask = None if stretch.is_causal else stretch.mask
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    # In bf16 torch's kernel for processors takes two to three times as long as three plain products (docs/LOG.md)
    groups = query.shape[1] // key.shape[1]
    query, key, value = (states[0].to(dtype) for states in (query, key, value))
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    mask = stretch.added(dtype).expand(len(query), -1, -1)
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), value).transpose(0, 1)[None]


AttentionInterface.register(BY_STRETCH, sdpa_by_stretch)
AttentionMaskInterface.register(BY_STRETCH, sdpa_mask)
