"""Which of given answers a model finds likeliest.

The score of an answer is its log-probability after the prompt, the sum over its tokens, end of turn included: what the
model would say it with, and not divided by its length, which would favour long names. Several answers are read behind
one prompt. And as a sum only falls along an answer, those whose first token is already less likely than a whole answer
are never read: the best is found for certain, at the cost of a few.

Dims: B prompts, C candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vora.data.schema import Sample
from vora.eval.scoring.generate import Prompt, check_log_probs, padded
from vora.eval.scoring.teacher_forced import score_answers
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

FIRST, MORE_TIMES = 16, 2  # candidates read in the first pass, growth from pass to pass


def answer_ids(processor: VoraProcessor, prompt: Prompt, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer to a prompt, end of turn included, as training has them."""
    image_inputs = {name: np.asarray(value) for name, value in prompt.image_inputs.items()}
    labels = [
        processor.training_sample(_answered(prompt, answer), image_inputs or None)["labels"] for answer in answers
    ]
    return [one[one != -100].tolist() for one in labels]


def candidate_scores(
    model: VoraForConditionalGeneration,
    processor: VoraProcessor,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[str]],
    always: Sequence[int] = (),
) -> list[np.ndarray]:
    """Log-probabilities of candidates after one batch of prompts, which have the candidates' `answers` unless there
    are few: B float[C], exact for the best, for the one of each prompt that is `always` read, and whatever else was
    read; -inf for others, less likely ones. ValueError where prompt and candidates exceed the LLM's context, or its
    logits are no numbers."""
    scores = [np.full(len(names), -np.inf) for names in candidates]
    bounds = [np.zeros(len(names)) for names in candidates]  # none is likelier; -inf where nothing is left to read
    most = FIRST
    if max(map(len, candidates)) > most:
        bounds = _first_tokens(model, processor, prompts)
        for bound, number in zip(bounds, always):
            bound[number] = np.inf
    while True:
        best = [np.argsort(-bound, kind="stable")[:most] for bound in bounds]
        chosen = [numbers[bounds[row][numbers] > scores[row].max()] for row, numbers in enumerate(best)]
        rows = [row for row, numbers in enumerate(chosen) if len(numbers)]
        if not rows:
            return scores
        records = ((row, _record(prompts[row], [candidates[row][number] for number in chosen[row]])) for row in rows)
        for batch in score_answers(model, processor, records):
            for row, found in batch.items():
                scores[row][chosen[row]], bounds[row][chosen[row]] = found.log_probs, -np.inf
        most *= MORE_TIMES


@torch.inference_mode()
def _first_tokens(
    model: VoraForConditionalGeneration, processor: VoraProcessor, prompts: Sequence[Prompt]
) -> list[np.ndarray]:
    """B float[C]: how likely the first token of each candidate is."""
    inputs = padded(prompts, processor.tokenizer.eos_token_id, model.device)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    states = model.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    log_probs = model.logits(states[:, -1]).float().log_softmax(-1)
    check_log_probs(model, log_probs)
    rows = log_probs.double().cpu().numpy()
    return [row[[answer[0] for answer in prompt.answers]] for row, prompt in zip(rows, prompts)]


def _record(prompt: Prompt, answers: Sequence[str]) -> Sample:
    contents = [message["content"] for message in prompt.messages if not isinstance(message["content"], str)]
    images = [part["image"] for content in contents for part in content if part["type"] == "image"]
    return Sample("it", images, [_answered(prompt, answer) for answer in answers])


def _answered(prompt: Prompt, answer: str) -> list[dict[str, Any]]:
    return [*prompt.messages, {"role": "assistant", "content": answer}]
