"""What a model answers to examples: freely, by choosing, or both; as it comes, into a `PredictionCache`."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vora.eval.prediction_cache import Line, PredictionCache
from vora.eval.rows import Example
from vora.eval.scoring.candidates import answer_ids, candidate_scores
from vora.eval.scoring.generate import free_answers
from vora.eval.scoring.prompt import Prompt, batches, check_context_length, in_parts, prompt_of
from vora.eval.scoring.read_prompts import can_share, read_prompts
from vora.eval.tasks.task import Task
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

MOST_AT_ONCE, BYTES_AT_ONCE = 512, 256 << 20  # examples, and their pixels, that are sorted by length together


def predict(
    model: VoraForConditionalGeneration,
    processor: VoraProcessor,
    task: Task,
    examples: Sequence[Example],
    cache: PredictionCache,
    progress: Callable[[int], None],
) -> None:
    """Answer all examples that a cache has no line of, in the way of their task; `progress` is called with the number
    of examples after each batch."""
    model.eval()
    found = _prompts(model, processor, task, examples, cache)
    for part in in_parts(found, _num_bytes, MOST_AT_ONCE, BYTES_AT_ONCE):
        prompts = dict(part)
        indices, lengths = _by_image(prompts)
        beams, extra = (task.num_beams, task.max_new_tokens) if task.generates else (1, 0)
        for batch in batches([beams * length for length in lengths], model.device, beams * extra):
            began = time.monotonic()
            chosen = [indices[place] for place in batch]
            requests = [prompts[index] for index in chosen]
            lines = [_line(index, examples[index], prompts[index]) for index in chosen]
            read = read_prompts(model, requests) if can_share(model, requests) else None
            if task.generates:
                said = free_answers(model, processor, requests, task.max_new_tokens, read, num_beams=beams)
                for line, text in zip(lines, said):
                    line["generated"] = text
            if task.chooses:
                asked = [examples[index] for index in chosen]
                right = [example.candidates.index(example.references[0]) for example in asked]
                choices = map(_choice, asked, requests, candidate_scores(model, requests, right, read))
                lines = [line | choice for line, choice in zip(lines, choices)]
            seconds = (time.monotonic() - began) / len(batch)
            cache.add([line | {"seconds": round(seconds, 4)} for line in lines])
            progress(len(batch))


def _prompts(
    model: VoraForConditionalGeneration,
    processor: VoraProcessor,
    task: Task,
    examples: Sequence[Example],
    cache: PredictionCache,
) -> Iterator[tuple[int, Prompt]]:
    """(index, prompt) of each example; those that cannot be asked are noted in the cache."""
    known: dict[tuple[str, bool, tuple[str, ...]], list[list[int]]] = {}  # tokens of candidates
    for index, example in enumerate(examples):
        if index in cache.done:
            continue
        try:
            prompt = prompt_of(processor, example)
            longest = task.max_new_tokens if task.generates else 0
            if task.chooses:
                key = (example.prompt, bool(prompt.image_inputs), example.candidates)
                if key not in known:
                    known[key] = answer_ids(processor, prompt, example.candidates)
                prompt.answers = known[key]
                longest = max(longest, *map(len, prompt.answers))
            check_context_length(model, len(prompt) + longest)
        except ValueError as error:
            cache.add([{"index": index, "name": example.name, "bad": " ".join(str(error).split())}])
            continue
        yield index, prompt


def _by_image(prompts: dict[int, Prompt]) -> tuple[list[int], list[int]]:
    """Indices, those of one image side by side, and of each the length of its image's longest prompt: sorted by these
    they stay so, and share their image."""
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for index, prompt in prompts.items():
        groups[prompt.image_hash or index].append(index)
    longest = [max(len(prompts[index]) for index in group) for group in groups.values()]
    pairs = [(index, length) for group, length in zip(groups.values(), longest) for index in group]
    return [index for index, _ in pairs], [length for _, length in pairs]


def _num_bytes(pair: tuple[int, Prompt]) -> int:
    return sum(value.nbytes for value in pair[1].inputs.values())


def _line(index: int, example: Example, prompt: Prompt) -> Line:
    line = {"index": index, "name": example.name, "prompt": example.prompt, "references": example.references}
    if prompt.image_hash:
        line["image"] = prompt.image_hash
    return line | ({"kind": example.kind} if example.kind else {})


def _choice(example: Example, prompt: Prompt, scores: np.ndarray) -> Line:
    """Which candidate is the likeliest, and how likely the right one is."""
    right = example.candidates.index(example.references[0])
    order = [number for number in scores.argsort()[::-1][:5] if scores[number] > float("-inf")]
    return {
        "chosen": example.candidates[int(scores.argmax())],
        "reference_log_prob": float(scores[right]),
        "reference_tokens": len(prompt.answers[right]),
        "log_probs": {example.candidates[number]: round(float(scores[number]), 4) for number in order},
    }
