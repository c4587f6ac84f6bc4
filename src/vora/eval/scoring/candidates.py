"""Which of given answers a model finds likeliest.

The score of an answer is its log-probability after the prompt, the sum over its tokens, end of turn included: what the
model would say it with, and not divided by its length, which would favour long names. All answers are read behind one
prompt, which is read once. And as a sum only falls along an answer, those whose first token is already less likely
than a whole answer are never read: the best is found for certain, at the cost of a few.

Dims: B prompts, C candidates, Q tokens of candidates behind a prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vora.data.packing import TokenSample, share_prefixes
from vora.eval.scoring.prompt import Prompt, batches, check_log_probs
from vora.eval.scoring.read_prompts import ReadPrompts, can_share, read_prompts
from vora.eval.scoring.teacher_forced import at_targets, score_samples
from vora.model.attention import sliding_window
from vora.model.modeling_vora import CACHE, VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

FIRST, MORE_TIMES = 4, 2  # candidates of a prompt read in the first pass, growth from pass to pass
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 32768}  # of candidates, padding included


def answer_ids(processor: VoraProcessor, prompt: Prompt, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer to a prompt, end of turn included, as training has them."""
    image_inputs = {name: np.asarray(value) for name, value in prompt.image_inputs.items()}
    said = ([*prompt.messages, {"role": "assistant", "content": answer}] for answer in answers)
    labels = [processor.training_samples(messages, image_inputs or None)[-1]["labels"] for messages in said]
    return [one[one != -100].tolist() for one in labels]


@torch.inference_mode()
def candidate_scores(
    model: VoraForConditionalGeneration,
    prompts: Sequence[Prompt],
    always: Sequence[int] = (),
    read: ReadPrompts | None = None,
) -> list[np.ndarray]:
    """Log-probabilities of the `answers` of each of a batch of prompts: B float[C], exact for the best, for the one of
    each prompt that is `always` read, and whatever else was read; -inf for others, less likely ones. `read` are the
    same prompts, where they are read already. ValueError where a prompt has no answers, or the logits are no
    numbers."""
    if without := sum(not prompt.answers for prompt in prompts):
        raise ValueError(
            f"{without} of {len(prompts)} prompts have 0 candidates, so that nothing can be chosen: name some, as "
            "--labels does."
        )
    lengths = [np.array([len(answer) for answer in prompt.answers]) for prompt in prompts]
    if not can_share(model, prompts, max(map(max, lengths))):
        return _scores_alone(model, prompts)
    first, read = _first_log_probs(model, prompts, read or read_prompts(model, prompts))
    begun = [row[[answer[0] for answer in prompt.answers]] for row, prompt in zip(first, prompts)]
    bounds = [row.copy() for row in begun]  # none is likelier; -inf where nothing is left to read
    for bound, number in zip(bounds, always):
        bound[number] = np.inf
    scores, most = [np.full(len(bound), -np.inf) for bound in bounds], FIRST
    room = (sliding_window(model.config) or np.inf) - read.mask.shape[1]
    while True:
        best = [np.argsort(-bound, kind="stable")[:most] for bound in bounds]
        chosen = [numbers[bounds[row][numbers] > scores[row].max()] for row, numbers in enumerate(best)]
        chosen = [numbers[lengths[row][numbers].cumsum() <= room] for row, numbers in enumerate(chosen)]
        if not any(map(len, chosen)):
            return scores
        for row, found in _rest(model, prompts, read, chosen):
            scores[row][chosen[row]], bounds[row][chosen[row]] = begun[row][chosen[row]] + found, -np.inf
        most *= MORE_TIMES


def _first_log_probs(
    model: VoraForConditionalGeneration, prompts: Sequence[Prompt], read: ReadPrompts
) -> tuple[np.ndarray, ReadPrompts]:
    """float[B, V] of what may follow each prompt; and the prompts with their last tokens read, too."""
    cache, position_ids = read.cache(range(len(prompts))), read.mask.sum(1, keepdim=True)
    mask = torch.cat([read.mask, torch.ones_like(position_ids)], 1)
    last = torch.tensor([prompt.inputs["input_ids"][-1:].tolist() for prompt in prompts], device=model.device)
    given = {"attention_mask": mask, "position_ids": position_ids, CACHE: cache, "use_cache": True}
    log_probs = model.logits(model.model(last, **given).last_hidden_state[:, 0]).float().log_softmax(-1)
    check_log_probs(model, log_probs)
    rows = torch.arange(len(prompts), device=model.device)
    places = torch.arange(mask.shape[1], device=model.device).expand_as(mask)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return log_probs.double().cpu().numpy(), ReadPrompts(model, layers, rows, places, mask)


def _rest(
    model: VoraForConditionalGeneration, prompts: Sequence[Prompt], read: ReadPrompts, chosen: Sequence[np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of a prompt, float[...] log-probability of each candidate chosen for it after its first token), for all
    prompts with any. Those of a prompt stand side by side behind it, and see nothing of each other."""
    answers = [[prompt.answers[number] for number in numbers] for prompt, numbers in zip(prompts, chosen)]
    asked = [row for row, some in enumerate(answers) if some]
    widths = [sum(len(answer) - 1 for answer in answers[row]) for row in asked]
    for batch in batches(widths, model.device, most=TOKENS_PER_PASS):
        rows = [asked[place] for place in batch]
        length, width = read.mask.shape[1], widths[batch[0]]
        ids, offsets, seen_until = np.zeros((3, len(rows), width), int)
        targets = np.full((len(rows), width), -100)
        seen_until[:] = length + np.arange(width)
        for line, row in enumerate(rows):
            end = 0
            for answer in answers[row]:
                start, end = end, end + len(answer) - 1
                ids[line, start:end], targets[line, start:end] = answer[:-1], answer[1:]
                offsets[line, start:end], seen_until[line, start:end] = np.arange(end - start), length + end - 1
        log_probs = _behind(model, read, rows, ids, offsets, seen_until, targets) if width else np.zeros(targets.shape)
        for line, row in enumerate(rows):
            borders = np.cumsum([len(answer) - 1 for answer in answers[row]])
            sums = np.append(0.0, log_probs[line].cumsum())[np.append(0, borders)]
            yield row, np.diff(sums)


def _behind(
    model: VoraForConditionalGeneration, read: ReadPrompts, rows: list[int], *arrays: np.ndarray
) -> np.ndarray:
    """float[..., Q], log-probability of each target behind some prompts, 0 where there is none."""
    *given, targets = map(torch.from_numpy, arrays)
    ids, offsets, seen_until = (one.to(model.device) for one in given)
    mask = read.mask[rows]
    states = model.model(
        ids,
        attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
        position_ids=mask.sum(1, keepdim=True) + offsets,
        seen_until=torch.cat([torch.full_like(mask, mask.shape[1] + ids.shape[1] - 1), seen_until], 1),
        **{CACHE: read.cache(rows), "use_cache": True},
    ).last_hidden_state
    return at_targets(model, states, targets)[0].numpy()


def _scores_alone(model: VoraForConditionalGeneration, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """B float[C], all exact: each candidate after its prompt in a pass of its own, where none can be shared."""

    def samples() -> Iterator[tuple[tuple[int, int], TokenSample]]:
        for row, prompt in enumerate(prompts):
            inputs = {name: np.asarray(value) for name, value in prompt.inputs.items()}
            for number, answer in enumerate(prompt.answers):
                labels = np.append(np.full(len(prompt), -100), answer)
                ids = np.append(inputs["input_ids"], answer)
                yield (row, number), share_prefixes([inputs | {"input_ids": ids, "labels": labels}])

    scores = [np.zeros(len(prompt.answers)) for prompt in prompts]
    for batch in score_samples(model, samples()):
        for (row, number), found in batch.items():
            scores[row][number] = found.log_probs[0]
    return scores
