"""Samples to pack, objectives that train on them, and a count of what makes the host wait."""

import numpy as np
import torch
from tiny import prompt, text, tiny_llm, tiny_vora
from torch.utils._python_dispatch import TorchDispatchMode

from vora.distill.objective import Objective


def sample(*parts, answer=3):
    """A sample as of `VoraProcessor.training_sample`, whose last `answer` tokens are the assistant's."""
    inputs = {name: tensor.numpy() for name, tensor in prompt(parts).items()}
    ids = inputs.pop("input_ids")[0]
    inputs.pop("attention_mask")
    labels = np.where(np.arange(len(ids)) < len(ids) - answer, -100, ids)
    return {"input_ids": ids, "labels": labels, **inputs}


def questions(seed=0, count=3):
    """Conversations about one image that begin alike."""
    beginning = [*text(2), (2, 3, seed), *text(2, 1)]
    return [sample(*beginning, *text(4 + i, 10 * seed + i), answer=2 + i) for i in range(count)]


def objective_of(family: str) -> Objective:
    """An objective without LoRA around a tiny model, whose window every sequence fits."""
    llm = tiny_llm(family)
    if family == "gemma3_text":  # every row fits its window, as it must where questions share an image
        llm.config.sliding_window = 64
        for layer in llm.model.layers:
            layer.self_attn.sliding_window = 64 if layer.self_attn.sliding_window else None
    return Objective(tiny_vora(llm))


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU: reading a number, or finding where a mask is true."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = ".".join(str(function).split(".")[:2])  # without its overload
        masked = name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in self.NAMES or masked:
            self.found.append(name)
        return function(*args, **(kwargs or {}))
