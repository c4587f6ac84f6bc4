"""Attention on a processor, segment by segment: the same numbers as `sdpa`, sooner.

A processor computes what a mask forbids, too. So each sequence is cut into segments of neighbouring queries, and each
of these attends to the keys that it sees, with a mask only where not all of it sees all of them.

Dims: B sequences, Q new tokens, K all tokens so far, L queries and S keys of a segment, H heads, G heads of keys and
values, W width of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTED_SDPA = "segmented_sdpa"  # an attention implementation: see `segmented_sdpa`
CHANGES_SCORES = ("softcap", "position_bias")  # what some LLMs ask of attention, and the segments do not do
# Measured (dev/LOG.md). Longer segments compute more that nobody sees, shorter ones read their keys more often.
LONGEST, LONGEST_IN_PRODUCTS = 256, 320
WHOLE = 128  # what is not longer is not cut at the borders of images
MOST_KEPT = 1024  # keys: of longer segments the softmax of the products would fill the memory until the backward pass
SHORT = 64  # sequences that are not longer are soonest all together, by `sdpa`


def use_segmented_sdpa_on_cpu(model: PreTrainedModel, device: torch.device) -> None:
    """Have a model that is to run on a processor, and attends by `sdpa`, attend segment by segment."""
    if device.type == "cpu" and model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(SEGMENTED_SDPA)


@dataclass
class Segment:
    """Neighbouring queries of a sequence, whose segments cover all of them in order."""

    queries: slice
    keys: slice  # from the first to the last that any of them sees
    added: Tensor | None  # float[1, L, S] to add to scores; None where all see all


def cut(mask: Tensor, blocks: Tensor | None, seen_until: Tensor | None, states: Tensor) -> None:
    """Leave its segments with a mask, in an attribute `segments`: B lists of `Segment`. Short sequences get none.

    Args:
        mask: bool[B, 1, Q, K], True = sees.
        blocks: int[B, Q] from `image_blocks`.
        seen_until: int[B, K], see `attention_masks`.
        states: of the dtype that attention will be computed in, but for autocast.
    """
    if mask.shape[2] <= SHORT:
        return
    parts, dtype = [[(0, mask.shape[2])]] * len(mask), computing_dtype(states)
    if seen_until is not None and seen_until.shape[1] == mask.shape[2]:  # trees that hang on a cache are not cut
        parts = trees(seen_until)
    borders: list[list[int]] = [[]] * len(mask)  # where images begin or end
    if blocks is not None:
        borders = [(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist() for numbers in blocks.cpu().numpy()]
    segments = []
    for trees_of_one, borders_of_one, sees in zip(parts, borders, mask[:, 0].cpu().numpy()):
        cuts = [cut for tree in trees_of_one for cut in _cut_long(*tree, borders_of_one, dtype)]
        segments.append([_segment(sees, start, end, dtype, mask.device) for start, end in cuts])
    mask.segments = segments  # type: ignore[attr-defined]


def trees(seen_until: Tensor) -> list[list[tuple[int, int]]]:
    """The parts of packed sequences that see nothing of each other: B lists of (start, end).

    Places that only see themselves (padding) are gathered into one part.
    """
    found = []
    for last in seen_until.cpu().numpy():
        ends = np.flatnonzero(np.maximum.accumulate(last)[:-1] <= np.arange(len(last) - 1)) + 1
        parts: list[tuple[int, int, bool]] = []
        for start, end in pairwise([0, *ends.tolist(), len(last)]):
            if end - start == 1 and parts and parts[-1][2]:
                parts[-1] = (parts[-1][0], end, True)
            else:
                parts.append((start, end, end - start == 1))
        found.append([(start, end) for start, end, _ in parts])
    return found


def _cut_long(start: int, end: int, borders: list[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Pairs (start, end) that cover a part of a sequence."""
    longest = LONGEST_IN_PRODUCTS if _by_products(dtype) else LONGEST
    if _by_products(dtype) or end - start <= WHOLE:  # to products, a segment without mask is worth little
        borders = []
    for first, last in pairwise([start, *(border for border in borders if start < border < end), end]):
        count = -(-(last - first) // longest)
        yield from pairwise([first + i * (last - first) // count for i in range(count + 1)])


def _segment(sees: np.ndarray, start: int, end: int, dtype: torch.dtype, device: torch.device) -> Segment:
    """The segment of the queries from start to end of a sequence, of which `sees` is bool[Q, K]."""
    columns = np.asarray(sees[start:end].any(0))
    first, last = int(columns.argmax()), len(columns) - int(columns[::-1].argmax())  # all, of padding that sees none
    sees, added = sees[start:end, first:last], None
    if not sees.all():
        added = torch.full((1, *sees.shape), torch.finfo(dtype).min, dtype=dtype, device=device)
        added.masked_fill_(torch.from_numpy(sees).to(device), 0.0)
    return Segment(slice(start, end), slice(first, last), added)


def segmented_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`sdpa` on each segment (`cut`) of each sequence by itself; without segments it is `sdpa`.

    Queries float[B, H, Q, W], keys and values float[B, G, K, W] make (float[B, Q, H, W], None).
    """
    dropout, scale = kwargs.get("dropout") or 0.0, kwargs.get("scaling") or query.shape[-1] ** -0.5
    if (attend := getattr(attention_mask, "attend", None)) is not None:  # a mask that knows a sooner way
        return attend(query, key, value, scale, dropout), None
    if attention_mask is None and not getattr(module, "is_causal", True) and not dropout:  # of a ViT
        return complete_attention(query, key, value, scale).transpose(1, 2).contiguous().to(query.dtype), None
    segments_of_batch = getattr(attention_mask, "segments", None)
    if segments_of_batch is None or any(kwargs.get(name) is not None for name in CHANGES_SCORES):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    most_keys = 0  # of products
    if _by_products(computing_dtype(query)) and not dropout:
        most_keys = MOST_KEPT if torch.is_grad_enabled() and query.requires_grad else key.shape[2]
        query, key, value = (states.to(torch.bfloat16) for states in (query, key, value))
    outputs = []
    for segments, queries, keys, values in zip(segments_of_batch, query, key, value):
        parts = queries.split([segment.queries.stop - segment.queries.start for segment in segments], dim=1)
        for segment, part in zip(segments, parts):
            given = part, keys[:, segment.keys], values[:, segment.keys], segment.added, scale
            in_products = given[1].shape[1] <= most_keys
            outputs.append(_products(*given) if in_products else _sdpa(*given, dropout))
    return torch.cat([output.transpose(0, 1) for output in outputs]).unflatten(0, (len(query), -1)), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float, dropout: float) -> Tensor:
    """float[H, L, W]"""
    added = None if added is None else added[None].to(query.dtype)
    return nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], added, dropout, scale=scale, enable_gqa=True
    )[0]


def _products(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """float[H, L, W] by plain products, which take a third to a half of the time of torch's bf16 kernel."""
    heads, length, groups = len(query), query.shape[1], len(key)
    query, key = query.reshape(groups, -1, query.shape[-1]), key.transpose(1, 2)
    if added is None:
        scores = torch.baddbmm(query.new_zeros(1, 1, 1), query, key, beta=0, alpha=scale)
    else:
        scores = added.repeat(groups, heads // groups, 1).baddbmm_(query, key, alpha=scale)
    return torch.bmm(scores.softmax(-1), value).view(heads, length, -1)


def complete_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """float[B, H, Q, width of the values], where every query sees every key."""
    is_soonest = query.device.type == "cpu" and _by_products(computing_dtype(query)) and key.shape[2] <= MOST_KEPT
    if is_soonest and not dropout:
        query, key, value = (states.to(torch.bfloat16) for states in (query, key, value))
        queries = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3).flatten(0, 1)  # [B G, H / G Q, W]
        scores = torch.baddbmm(queries.new_zeros(()), queries, key.flatten(0, 1).mT, beta=0, alpha=scale)
        return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(*query.shape[:-1], -1)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scale, enable_gqa=True
    )


def _by_products(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16


def computing_dtype(states: Tensor) -> torch.dtype:
    """What products of such tensors are computed in: autocast's choice, or their own dtype."""
    device = states.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return states.dtype
    return torch.get_autocast_dtype(device)


AttentionInterface.register(SEGMENTED_SDPA, segmented_sdpa)
AttentionMaskInterface.register(SEGMENTED_SDPA, sdpa_mask)
