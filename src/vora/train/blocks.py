"""How the transformer blocks run while they are trained: computed again in the backward pass, compiled."""

from functools import partial

import torch

MOST_KINDS = 64  # of compiled blocks: with and without LoRA, of each sort that the LLM has, for one length or any


def recompute_blocks(learner, wanted, arguments):
    """Have blocks keep only what enters them, here and not by the Trainer, which knows nothing of the first n.

    Args:
        wanted: True, or the number of the LLM's first blocks.
        arguments: TrainingArguments, for what they say of how.

    Raises:
        ValueError: see `Objective.gradient_checkpointing_enable`.
    """
    options = dict(arguments.gradient_checkpointing_kwargs or {})
    how = {"offload": options.pop("offload")} if "offload" in options else {}
    learner.gradient_checkpointing_enable(options, None if wanted is True else wanted, **how)


def compile_blocks(learner, arguments):
    """Compile each block by itself, which needs one compilation for all blocks alike, the teacher's too.

    Hooks stay outside of what is compiled, and names of weights stay what they are. Rows of another length cost one
    more compilation, which then serves all lengths. Answers to watched images, which grow word by word, are not
    compiled.
    """
    torch._dynamo.config.recompile_limit = max(MOST_KINDS, torch._dynamo.config.recompile_limit)
    how = {"backend": arguments.torch_compile_backend, "mode": arguments.torch_compile_mode}
    # not again by the Trainer, as a whole, hooks and all
    arguments.torch_compile, arguments.torch_compile_backend, arguments.torch_compile_mode = False, None, None
    for block in learner.vora.model.blocks:
        plain = block.forward
        block.forward = partial(_while_training, block, torch.compile(plain, **how), plain)
    for block in [] if learner.teacher is None else learner.teacher.blocks:
        block.forward = torch.compile(block.forward, **how)


def _while_training(block, compiled, plain, *args, **kwargs):
    return (compiled if block.training else plain)(*args, **kwargs)
