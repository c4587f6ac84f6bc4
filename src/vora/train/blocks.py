"""The transformer blocks, compiled, while they are trained."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from vora.distill.objective import Objective

MOST_KINDS = 64  # of compiled blocks: with and without LoRA, of each sort that the LLM has, for one length or any


def compile_blocks(objective: Objective, arguments: TrainingArguments) -> None:
    """Compile each block by itself, which needs one compilation for all blocks alike, the teacher's too.

    Hooks stay outside of what is compiled, and names of weights stay what they are. Sequences of another length cost
    one more compilation, which then serves all lengths. Sample generations, which grow token by token, are not
    compiled.
    """
    torch._dynamo.config.recompile_limit = max(MOST_KINDS, torch._dynamo.config.recompile_limit)
    how = {"backend": arguments.torch_compile_backend, "mode": arguments.torch_compile_mode}
    # not again by the Trainer, as a whole, hooks and all
    arguments.torch_compile, arguments.torch_compile_backend, arguments.torch_compile_mode = False, None, None
    for block in objective.vora.model.blocks:
        plain = block.forward
        block.forward = partial(_while_training, block, torch.compile(plain, **how), plain)
    for block in [] if objective.teacher is None else objective.teacher.blocks:
        block.forward = torch.compile(block.forward, **how)


def _while_training(block: nn.Module, compiled: Callable, plain: Callable, *args: Any, **kwargs: Any) -> Any:
    return (compiled if block.training else plain)(*args, **kwargs)
