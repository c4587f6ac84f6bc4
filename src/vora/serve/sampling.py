"""Which token comes next."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

LEAST_TEMPERATURE = 1e-6  # below, the likeliest token is all there is
LIKELIEST = 256  # among so many tokens the nucleus is looked for before all are sorted


@dataclass(frozen=True)
class Sampling:
    """How one answer is made. Temperature 0 is greedy; `top_p` draws from the likeliest tokens of that share."""

    max_new_tokens: int | None = 256  # None: whatever the context holds
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it

    def generator(self) -> torch.Generator:
        """Of this answer alone, so that what is drawn for others changes nothing."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def penalties(config: GenerationConfig) -> LogitsProcessorList:
    """What a model's generation config has against repetition: functions of ids int[1, T] and logits float[1, V]."""
    found = LogitsProcessorList()
    if (config.repetition_penalty or 1.0) != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return found


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by float[V] logits; ValueError where they are no numbers."""
    if not bool(logits.isfinite().any()):
        raise ValueError("The model's logits are no numbers: its weights are damaged, or too large for their dtype.")
    if sampling.temperature < LEAST_TEMPERATURE:
        return int(logits.argmax())
    scores = logits.to("cpu", torch.float32)
    probs = ((scores - scores.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        probs, ids = nucleus(probs, sampling.top_p)
        return int(ids[torch.multinomial(probs, 1, generator=generator)])
    return int(torch.multinomial(probs, 1, generator=generator))


def nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest tokens that have a share of top_p: (float[K] probabilities, int[K] ids)."""
    top, ids = probs.topk(min(LIKELIEST, len(probs)))
    if float(top.sum()) < top_p:
        top, ids = probs.sort(descending=True)
    kept = top.cumsum(0) - top < top_p
    kept[0] = True  # also for a share of 0
    return top[kept], ids[kept]
