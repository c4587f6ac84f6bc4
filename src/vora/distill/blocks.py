"""Which of a model's blocks run, and what leaves them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def only_first_blocks(model: nn.Module, blocks: nn.ModuleList, count: int) -> Iterator[None]:
    """Have a model hold only the first of its blocks, at least one, while the context lasts.

    The blocks themselves are untouched, so hooks, checkpointing, compiled blocks and wrappers around them work as
    ever. A forward pass then ends in the model's last norm, applied to what leaves the last block that is held.
    """
    holder, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is blocks)
    holder._modules[name] = blocks[:count]
    try:
        yield
    finally:
        holder._modules[name] = blocks


@contextmanager
def block_outputs(blocks: nn.ModuleList, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect what leaves some blocks while a model runs: {block: its output}; -1 is what enters the first block.

    Nothing is computed on them here: inside a checkpointed block it would be done once and missed later.
    """
    outputs: dict[int, Tensor] = {}
    hooks = [hook_on_output(blocks, block, partial(outputs.__setitem__, block)) for block in wanted]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def hook_on_output(blocks: nn.ModuleList, block: int, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `keep` called with a block's output at every forward; block -1 stands for what enters the first one."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    if block == -1:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[block].register_forward_hook(after)
