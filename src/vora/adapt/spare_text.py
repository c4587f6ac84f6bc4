"""Turn trained vision LoRA away from text, without training.

A pair changes what its layer makes of every input, B A x, of a picture's tokens as of text. Where text lies among a
layer's inputs is known from its second moments, so the A nearest to the trained one on what it was trained for, that
does least to text, is a linear equation away. Projections of this kind keep what a network knew while it learns
something new (GPM, arXiv 2103.09762) or is edited (AlphaEdit, arXiv 2410.02355).

Dims: D inputs of a layer, r = LoRA's rank.
"""

from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer

RIDGE = 1e-4  # of the mean of the diagonal: directions in which neither pictures nor text lie stay as they were


class InputMoments:
    """Sums of x xT over what enters each layer with LoRA; layers with the same input share them.

    Args:
        model: with LoRA by PEFT.
    """

    def __init__(self, model):
        self.layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        self.sums, self.shared, self.num_tokens, self.total_weight = {}, {}, 0, 0.0
        self._last = (None, None)

    @contextmanager
    def counted(self, weights):
        """What one forward pass inside of it feeds to the layers is added.

        Args:
            weights: bool or float[B, T], how much each token counts; nothing at padding.
        """
        self.num_tokens += int((weights != 0).sum())
        self.total_weight += float(weights.sum())
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._add(name, inputs[0], weights))
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            self._last = (None, None)
            for hook in hooks:
                hook.remove()

    def _add(self, name, inputs, weights):
        same, owner = self._last
        if inputs is same:
            self.shared[name] = owner
            return
        self._last = (inputs, name)
        self.shared[name] = name
        weights = weights.flatten().to(inputs.device)
        some = weights != 0
        entering = inputs.detach().reshape(-1, inputs.shape[-1])[some].float()
        with torch.autocast(inputs.device.type, enabled=False):  # rounded to bf16 they would be moments of nothing
            added = (entering * weights[some, None]).T @ entering
        self.sums[name] = self.sums[name] + added if name in self.sums else added

    def mean(self, name):
        """E[x xT] of a layer's input: float64[D, D]."""
        return self.sums[self.shared[name]].double() / self.total_weight


@torch.no_grad()
def spare_text(seen, read, strength=1.0):
    """Change each A to A' = A S (S + strength R)^-1, for which |B (A' - A) x|^2 over what is seen plus strength times
    |B A' x|^2 over text is least; S and R are their second moments. B stays.

    Args:
        seen: `InputMoments` of rows with pictures, with LoRA on.
        read: of text alone, of the same model, with LoRA off (`vora.distill.keep_text.lora_off`).
        strength: 0 changes nothing; the more, the less remains of what LoRA does to text, and to pictures.

    Returns:
        dict, means over layers: `text_before` and `text_after`, the energy of LoRA's outputs on text, relative to that
        of the layers' own; `seen_lost`, how much of LoRA's outputs on what is seen has changed, relative to them.

    Raises:
        ValueError: negative strength, or nothing was counted on one of the two.
    """
    if strength < 0:
        raise ValueError(f"strength is {strength}, but a negative one would turn LoRA towards text: give 0 or more.")
    if not (seen.num_tokens and read.num_tokens):
        raise ValueError(
            f"{seen.num_tokens} tokens with pictures and {read.num_tokens} of text were counted: without some tens of "
            "thousands of both it is not known where text lies."
        )
    shares, turns = [], {}
    for name, layer in seen.layers.items():
        moments, of_text, owner = seen.mean(name), read.mean(name), seen.shared[name]
        if owner not in turns:
            total = moments + strength * of_text
            ridge = RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype, device=total.device)
            turns = {owner: torch.linalg.solve(total + ridge, moments + ridge).T}  # of those with this input, in a row
        own = energy(own_weight(layer), of_text)
        for adapter in layer.active_adapters:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight.double() * layer.scaling[adapter]
            before = a.double()
            after = before @ turns[owner]
            a.copy_(after)
            lost = energy(b @ (after - before), moments) / energy(b @ before, moments).clamp_min(1e-30)
            shares.append([energy(b @ before, of_text) / own, energy(b @ after, of_text) / own, lost])
    means = torch.tensor(shares).mean(0).tolist()
    return dict(zip(("text_before", "text_after", "seen_lost"), means))


def own_weight(layer):
    """W of a layer with LoRA: float64[outputs, D]."""
    weight = layer.get_base_layer().weight.double()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight  # GPT-2's Conv1D


def energy(weight, moments):
    """E |weight x|^2."""
    return ((weight @ moments) * weight).sum()
