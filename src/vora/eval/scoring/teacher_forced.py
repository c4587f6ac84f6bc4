"""How likely given answers are and whether a greedy model would give them, in one forward pass per image.

A greedy answer is right exactly when, fed the right answer, the model's first choice at every place is the next token
of that answer, end of turn included. So no token is generated, and all questions about an image share its tokens.

Dims: A answers about one image.
"""

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from vora.data.packing import TokenSample, collate_sequences, tokenize_sample
from vora.data.schema import Sample
from vora.eval.scoring.prompt import batches, check_context_length, check_log_probs, in_parts
from vora.model.attention import sliding_window
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

Index = TypeVar("Index", bound=Hashable)

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
ROWS_OF_LOGITS = 512  # made at once
MOST_AT_ONCE, BYTES_AT_ONCE = 1024, 512 << 20  # records, and their pixels, that are sorted by length together


@dataclass
class AnswerScore:
    """How likely a model finds the answers about one image."""

    log_probs: np.ndarray  # float[A], sums over the tokens of each answer, end of turn included
    num_tokens: np.ndarray  # int[A], of each answer
    right: list[bool]  # of each answer; True = a greedy model says exactly this


def score_answers(
    model: VoraForConditionalGeneration, processor: VoraProcessor, records: Iterable[tuple[int, Sample]]
) -> Iterator[dict[int, AnswerScore]]:
    """{index of the record: score} of all answers, batch by batch. Records come with an index each; each of their
    conversations is a question and an answer. ValueError names an image that with an answer exceeds the context."""
    window = sliding_window(model.config)
    waiting: dict[int, list[AnswerScore | None]] = {}  # what is known of each part of a record

    def samples() -> Iterator[tuple[tuple[int, int], TokenSample]]:
        for index, record in records:
            parts = _samples_within(window, record, processor, record.conversations)
            longest = max(int(sample["position_ids"].max()) for sample in parts) + 2
            check_context_length(model, longest, f"lower --max-image-tokens, or leave out {record.name}")
            waiting[index] = [None] * len(parts)
            yield from (((index, number), sample) for number, sample in enumerate(parts))

    for batch in score_samples(model, samples()):
        for (index, number), score in batch.items():
            waiting[index][number] = score
        whole = dict.fromkeys(index for index, _ in batch if None not in waiting[index])
        if whole:
            yield {index: _joined(waiting.pop(index)) for index in whole}


def _samples_within(
    window: int | None, record: Sample, processor: VoraProcessor, conversations: list[Any]
) -> list[TokenSample]:
    """A record's conversations as samples of at most `window` tokens each; one that exceeds it alone stands alone."""
    sample = tokenize_sample(record, processor, conversations)
    if window is None or len(sample["input_ids"]) <= window or len(conversations) == 1:
        return [sample]
    half = len(conversations) // 2
    halves = conversations[:half], conversations[half:]
    return [one for part in halves for one in _samples_within(window, record, processor, part)]


def _joined(parts: Iterable[AnswerScore | None]) -> AnswerScore:
    """The score of all parts of a record."""
    whole = [part for part in parts if part is not None]
    return AnswerScore(
        np.concatenate([part.log_probs for part in whole]),
        np.concatenate([part.num_tokens for part in whole]),
        [one for part in whole for one in part.right],
    )


@torch.inference_mode()
def score_samples(
    model: VoraForConditionalGeneration, samples: Iterable[tuple[Index, TokenSample]]
) -> Iterator[dict[Index, AnswerScore]]:
    """{index: score} of all that is to be predicted in samples of `share_prefixes`, batch by batch; those that exceed
    the LLM's sliding window are of one conversation. ValueError where the model's logits are no numbers."""
    model.eval()
    window = sliding_window(model.config)
    for batch in _batches(samples, model.device, window):
        rows: dict[str, Any] = {
            **collate_sequences([[sample] for _, sample in batch], len(batch[0][1]["input_ids"]), 0)
        }
        rows.pop("num_samples")
        if window and rows["input_ids"].shape[1] > window:
            rows.pop("seen_until")  # nothing is shared, and such borders may not exceed the window
        targets = rows.pop("targets")
        inputs = {name: tensor.to(model.device) for name, tensor in rows.items()}
        states = model.model(**inputs, use_cache=False).last_hidden_state
        log_probs, chosen = at_targets(model, states, targets).numpy()
        wanted = (targets != -100).numpy()
        scores: dict[Index, AnswerScore] = {}
        for row, (index, sample) in enumerate(batch):
            places = np.arange(len(sample["input_ids"]))
            paths = [
                wanted[row, : len(places)] & (places <= end) & (end <= sample["seen_until"]) for end in sample["ends"]
            ]
            scores[index] = AnswerScore(
                np.array([log_probs[row, : len(places)][path].sum() for path in paths]),
                np.array([path.sum() for path in paths]),
                [bool(chosen[row, : len(places)][path].all()) for path in paths],
            )
        yield scores


def at_targets(model: VoraForConditionalGeneration, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float[2, B, T] on the host: log-probability of each target of int[B, T], also there, and 1 where it is the
    model's first choice; 0 where it is -100. Of states float[B, T, D]."""
    is_target = targets != -100  # found on the host, so that a GPU is waited for once
    places, wanted = is_target.flatten().nonzero()[:, 0].to(states.device), targets[is_target].to(states.device)
    states, found = states.flatten(0, 1), torch.zeros(2, *targets.shape, dtype=torch.float64)
    log_probs, chosen = [], []
    for part, of_part in zip(places.split(ROWS_OF_LOGITS), wanted.split(ROWS_OF_LOGITS)):
        logits = model.logits(states[part]).float()
        log_probs.append((logits.gather(1, of_part[:, None])[:, 0] - logits.logsumexp(-1)).double())
        chosen.append((logits.argmax(-1) == of_part).double())
    if log_probs:
        found[:, is_target] = torch.stack([torch.cat(log_probs), torch.cat(chosen)]).cpu()
    check_log_probs(model, found[0])
    return found


def _batches(
    samples: Iterable[tuple[Index, TokenSample]], device: torch.device, window: int | None
) -> Iterator[list[tuple[Index, TokenSample]]]:
    """Samples, of many at a time, in batches of about equal cost; those that exceed a window are apart."""
    for part in in_parts(samples, _num_bytes, MOST_AT_ONCE, BYTES_AT_ONCE):
        for exceeds in (False, True):
            some = [pair for pair in part if (len(pair[1]["input_ids"]) > (window or math.inf)) is exceeds]
            for batch in batches([len(sample["input_ids"]) for _, sample in some], device, most=TOKENS_PER_BATCH):
                yield [some[place] for place in batch]


def _num_bytes(pair: tuple[Any, TokenSample]) -> int:
    return pair[1]["pixel_values"].nbytes if "pixel_values" in pair[1] else 0
