"""Features as colours: the first three principal components of an image's tokens.

Dims: T image tokens, D their width.
"""

from itertools import permutations

import torch
import torch.nn.functional as F

from vora.eval.metrics.cka import of_one_length


def principal_components(states: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """The first three principal components of tokens, float[T, D]: (float[T, 3], centred and without fixed signs, 0
    where there are fewer; [3 shares of the variance]).

    Each token is brought to the same length first, as every block does to what it reads: otherwise the few tokens of
    enormous length that LLMs make would be all that is seen.
    """
    states = of_one_length(states)
    states = states - states.mean(0)
    wide = states.shape[1] >= states.shape[0]
    values, vectors = torch.linalg.eigh(states @ states.T if wide else states.T @ states)
    values, vectors = values.clamp(min=0).flip(0)[:3], vectors.flip(1)[:, :3]
    scores = torch.zeros(len(states), 3)
    scores[:, : len(values)] = (vectors * values.sqrt() if wide else states @ vectors).float()
    total = states.pow(2).sum()
    shares = (values / total).tolist() if total > 1e-12 * len(states) else [0.0] * len(values)
    return scores, [*shares, 0.0, 0.0][:3]


def aligned(scores: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """float[T, 3] in the order and with the signs that agree best with the components of another block."""
    alike = F.normalize(scores, dim=0).T @ F.normalize(others, dim=0)
    order = max(permutations(range(3)), key=lambda order: sum(float(alike[c, i].abs()) for i, c in enumerate(order)))
    signs = torch.tensor([-1.0 if alike[component, i] < 0 else 1.0 for i, component in enumerate(order)])
    return scores[:, list(order)] * signs


def colours(scores: torch.Tensor, outside: float = 0.02) -> torch.Tensor:
    """Components as red, green and blue, float[T, 3] in 0..1, stretched between percentiles of each, with a share of
    the tokens left `outside` at either end; grey where one says nothing."""
    low, high = (scores.quantile(share, dim=0) for share in (outside, 1 - outside))
    flat = high - low < 1e-6 * scores.abs().max().clamp(min=1e-12)
    stretched = ((scores - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)
    return torch.where(flat, 0.5, stretched)
