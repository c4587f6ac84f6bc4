"""The language loss where something is to be predicted, with a bounded number of logits at a time.

Dims: L labels, D = LLM width, V = vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**26  # in memory at once: some 1 GB with gradients, and products that still fill a GPU


def labels_at_once(num_labels: int, vocab_size: int) -> int:
    """How many labels get their logits at a time: all, or as many as make equal parts of at most `MOST_LOGITS`."""
    num_parts = min(num_labels, -(-num_labels * vocab_size // MOST_LOGITS))
    return -(-num_labels // num_parts)


def losses_of_labels(
    logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    """Cross-entropy of each label, in float32: float[L].

    Where all logits would be more than `MOST_LOGITS` they are made part by part, and each part again when gradients
    are, so that memory grows with the labels' states and not with L x V.

    Args:
        logits_of: function of float[l, D] to float[l, V].
        states: float[L, D].
        targets: int[L].
    """
    size = labels_at_once(len(targets), vocab_size)
    if size == len(targets):
        return _losses(logits_of, states, targets)
    parts = zip(states.split(size), targets.split(size))
    # nothing here is random, so no random state is kept for the second time
    found = [checkpoint(_losses, logits_of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(found)


def _losses(logits_of: Callable, states: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_of(states).float(), targets, reduction="none")
