"""Text stays what it was: the LLM without LoRA teaches the LLM with LoRA on rows of text.

LoRA that learns to see changes what the same blocks make of text, and no other loss holds it (dev/LOG.md).

Dims: L tokens of text, D = LLM width, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vora.distill.label_loss import by_parts, labels_at_once


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """The LLM as it was, without dropout, while the context lasts; gradients and what trains are not touched."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    training = model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)


def unexplained(states: Tensor, own: Tensor) -> Tensor:
    """How far hidden states float[L, D] are from the LLM's own: float[].

    Per channel the squared difference is taken relative to the channel's variance, so that the few channels that hold
    nearly all of an LLM's activations do not stand for the others; the mean e over a token's channels counts as
    log(1 + e), so that tokens that are far off do not drown the others. 0: nothing has changed.
    """
    own = own.float()
    variance = own.var(0, correction=0).clamp_min(1e-6)
    return ((states.float() - own).square() / variance).mean(-1).log1p().mean()


def divergence(logits_of: Callable[[Tensor], Tensor], states: Tensor, own: Tensor, vocab_size: int) -> Tensor:
    """KL divergence of the next token's distribution from the LLM's own, mean over tokens, in float32: float[].

    Of last hidden states float[L, D] with LoRA on and off. Logits are made part by part, as in `label_losses`.
    """
    size = labels_at_once(len(states), 2 * vocab_size)  # both models'
    return torch.stack(by_parts(partial(_summed, logits_of), size, states, own)).sum() / len(states)


def _summed(logits_of: Callable[[Tensor], Tensor], states: Tensor, own: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = logits_of(own).float().log_softmax(-1)
    found = logits_of(states).float().log_softmax(-1)
    return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
