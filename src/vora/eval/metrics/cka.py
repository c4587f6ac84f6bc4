"""How alike two models' features of the same patches are, without fitting anything: linear CKA.

Dims: T tokens, S and U numbers of blocks.
"""

from collections.abc import Sequence

import torch

MOST_TOKENS = 1024  # of which a square is made per block
FEWEST_TOKENS = 4  # of an estimate without bias


def linear_cka(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> torch.Tensor:
    """Centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414) of every block of one model with every block
    of another, in the unbiased estimate of Song et al. 2012 (JMLR 13). Of S and U float[T, any number of channels]
    float[S, U], NaN where a block is the same at all tokens, or where T < 4.

    1 where the two know the same patches alike, whatever rotation and scale lies between them; 0 on average, and so
    at times a little below, where they have nothing to do with each other. The usual biased estimate nears 1 for
    anything that has more channels than tokens.

    Tokens are brought to one length first, as by the norm of a distill head and of each block that reads them.
    """
    if len(these[0]) < FEWEST_TOKENS:
        return torch.full((len(these), len(those)), float("nan"))
    one, other = (torch.stack([_kernel(states) for states in side]) for side in (these, those))
    return one @ other.T


def _kernel(states: torch.Tensor) -> torch.Tensor:
    """float[T, C] to its U-centred kernel as float[T * T] of length 1: inner products of such are the estimate."""
    if len(states) > MOST_TOKENS:
        states = states[torch.linspace(0, len(states) - 1, MOST_TOKENS).round().long()]
    states, count = of_one_length(states), len(states)
    states = states - states.mean(0)
    kernel = (states @ states.T).fill_diagonal_(0)
    sums = kernel.sum(0)
    kernel = kernel - (sums[:, None] + sums) / (count - 2) + sums.sum() / ((count - 1) * (count - 2))
    kernel = kernel.fill_diagonal_(0).flatten()
    length = kernel.norm()
    return (kernel / (length if length > 1e-9 * count * states.shape[1] else float("nan"))).float()


def of_one_length(states: torch.Tensor) -> torch.Tensor:
    """float64[T, C]: tokens whose channels have a mean square of 1; those that are 0 stay so."""
    states = states.double()
    return states / states.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
