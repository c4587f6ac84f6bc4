"""The language loss where something is to be predicted, with a bounded number of logits at a time.

Dims: L labels, D = LLM width, V = vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from vora.model.modeling_vora import VoraForConditionalGeneration

MOST_LOGITS = 2**26  # in memory at once: some 1 GB with gradients, and products that still fill a GPU


def labels_at_once(num_labels: int, vocab_size: int) -> int:
    """How many labels get their logits at a time: all, or as many as make equal parts of at most `MOST_LOGITS`."""
    num_parts = min(num_labels, -(-num_labels * vocab_size // MOST_LOGITS))
    return -(-num_labels // num_parts)


def by_parts(function: Callable[..., Tensor], size: int, *tensors: Tensor) -> list[Tensor]:
    """What a function makes of each so many rows; where these are several parts, again when gradients are made."""
    if size == len(tensors[0]):
        return [function(*tensors)]
    parts = zip(*(tensor.split(size) for tensor in tensors))
    # nothing here is random, so no random state is kept for the second time
    return [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def label_losses(
    vora: "VoraForConditionalGeneration", hidden_states: Tensor, targets: Tensor, places: Tensor
) -> Tensor:
    """Cross-entropy in float32 at each of int[L] places of the flattened targets int[B, T]: float[L].

    Where all logits would be more than `MOST_LOGITS` they are made part by part, so that memory grows with the
    labels' states and not with L x V.
    """
    states, labels = hidden_states.flatten(0, 1)[places], targets.flatten()[places]
    size = labels_at_once(len(labels), vora.lm_head.out_features)
    return torch.cat(by_parts(partial(_losses, vora.logits), size, states, labels))


def _losses(logits_of: Callable, states: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_of(states).float(), targets, reduction="none")
