"""Free answers in batches.

Dims: B prompts, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vora.eval.scoring.prompt import Prompt, check_context_length, padded
from vora.eval.scoring.read_prompts import ReadPrompts, can_share, read_prompts
from vora.model.modeling_vora import CACHE, VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
GREEDY["repetition_penalty"] = 1.0


@torch.inference_mode()
def free_answers(
    model: VoraForConditionalGeneration,
    processor: VoraProcessor,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    read: ReadPrompts | None = None,
    **sampling: Any,
) -> list[str]:
    """What a model says to one batch of prompts up to the end of its turn, without special tokens; each token the
    likeliest, unless `sampling`, of `generate`, says otherwise (`do_sample`, `num_beams`, ...). `read` are the same
    prompts, where they are read already."""
    tokenizer = processor.tokenizer
    check_context_length(model, max(map(len, prompts)) + max_new_tokens)
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = GREEDY | sampling | {"eos_token_id": sorted(ends), "pad_token_id": pad}
    inputs = padded(prompts, pad, model.device)
    if read is None and can_share(model, prompts):
        read = read_prompts(model, prompts)
    if read is None:
        said = model.generate(**inputs, **options, max_new_tokens=max_new_tokens)
        said = list(said[:, inputs["input_ids"].shape[1] :])
    else:
        said = _continued(model, read, inputs["input_ids"], max_new_tokens, options)
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def _continued(
    model: VoraForConditionalGeneration, read: ReadPrompts, ids: Tensor, max_new_tokens: int, options: dict[str, Any]
) -> list[Tensor]:
    """B int[...]: what follows prompts int[B, T] that are read. Whenever half of them have ended, the others go on
    alone: most answers are short, and a few are long."""
    ends, first, beams = torch.tensor(options["eos_token_id"], device=ids.device), ids.shape[1], options["num_beams"]

    def has_ended(sequences: Tensor) -> Tensor:
        return torch.isin(sequences[:, first:], ends).any(1)

    def half_ended(sequences: Tensor, *_: Any, **__: Any) -> Tensor:
        ended = has_ended(sequences)
        return (ended.float().mean() >= 0.5).expand_as(ended)

    stop = [half_ended] if beams == 1 else []
    rows = torch.arange(len(ids), device=ids.device)
    said = list(ids)
    cache = read.cache(rows.repeat_interleave(beams))
    while len(rows):
        new = first + max_new_tokens - ids.shape[1]
        mask = torch.cat([read.mask[rows], read.mask.new_ones(len(rows), ids.shape[1] - read.mask.shape[1])], 1)
        given = {"input_ids": ids, "attention_mask": mask, CACHE: cache, "stopping_criteria": stop}
        ids = model.generate(**given, **options, max_new_tokens=new)
        for row, sequence in zip(rows.tolist(), ids):
            said[row] = sequence[first:]
        going_on = (~has_ended(ids)).nonzero()[:, 0]
        if beams > 1 or ids.shape[1] == first + max_new_tokens:
            break
        rows, ids = rows[going_on], ids[going_on]
        cache.reorder_cache(going_on)
    return said


def without_thinking(answer: str) -> str:
    """An answer without its `<think>...</think>` block, as reasoning LLMs begin with one.

    A block that their chat template opens in the prompt ends here without having begun; one that the limit of tokens
    cuts has not ended, and what follows it would have been the answer.
    """
    return answer.rpartition("</think>")[2].partition("<think>")[0].strip()
