"""Who looked where: the attention weights of chosen places, and tokens put together into words.

Dims: T tokens of the sequence, R chosen places.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vora.model.modeling_vora import VoraForConditionalGeneration

# Letters and digits, also around an apostrophe or a hyphen; characters of scripts without spaces one by one; marks.
ALONE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{ALONE}]|[^\W{ALONE}]+(?:['’-][^\W{ALONE}]+)*|[^\w\s]+")
CUT = "\ufffd"  # what a tokenizer writes for a character whose last bytes are still to come


@contextmanager
def attention_at(model: VoraForConditionalGeneration, places: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the attention weights of some places while a model, merged or with LoRA, runs on one sequence: {block:
    float[R, T]}, how each place shares its attention out over it all, mean over heads. Blocks without attention
    weights (linear attention) are left out.

    Within, the model attends eagerly, with its family's own scaling, soft caps and sinks. Each block's weights are cut
    down to the chosen places as soon as they are there, so that no more than one block's square is held.
    """
    weights: dict[int, torch.Tensor] = {}
    hooks = []
    before = model.model.language_model.config._attn_implementation
    model.set_attn_implementation("eager")
    for number, block in enumerate(model.model.blocks):
        keep = partial(_keep_weights, weights, number, list(places))
        hooks += [module.register_forward_hook(keep) for module in block.modules()]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def _keep_weights(
    weights: dict[int, torch.Tensor], block: int, places: list[int], module: torch.nn.Module, args: Any, output: Any
) -> None:
    """A hook: of all that a block is made of, its attention alone returns (output, float[1, heads, T, T])."""
    if isinstance(output, tuple) and len(output) > 1 and getattr(output[1], "ndim", 0) == 4:
        weights[block] = output[1][0, :, places].float().mean(0).cpu()


def words_of_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """An answer's words, each with the indices of its tokens. A token that reaches into two words belongs to both;
    special tokens and blanks belong to none."""
    spans, start, text = [], 0, ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        end = len(text.rstrip(CUT))
        spans.append((start, end + 1 if text.endswith(CUT) else end))
        start = end
    words = []
    for found in WORD.finditer(text):
        tokens = [index for index, (first, end) in enumerate(spans) if first < found.end() and end > found.start()]
        words.append((found.group(), tokens))
    return words
