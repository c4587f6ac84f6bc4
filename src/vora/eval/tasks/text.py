"""Text ability: what a model lost of its base LLM's language when it learned to see.

Both read the same tokens of held text, for the perplexity of each token and bits per byte; differences are paired.
Multiple choice (MMLU, HellaSwag, ...) is left to lm-evaluation-harness: `to_llm` of a merged model is an ordinary LLM.
"""

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vora.checkpoint.layout import read_info
from vora.checkpoint.load import load_base_llm
from vora.eval.evaluation import Evaluation, Job, computed_as
from vora.eval.metrics.intervals import Estimate, in_words, interval_of, numbers
from vora.eval.prediction_cache import Line, fingerprints, model_fingerprint
from vora.eval.report import Report
from vora.eval.rows import Data
from vora.eval.scoring.teacher_forced import score_samples
from vora.eval.tasks.text_windows import WINDOW, Window, open_texts, read_windows
from vora.model.attention import longest_sequence
from vora.model.modeling_vora import VoraForConditionalGeneration

FEW_DOCUMENTS = 10  # with fewer, windows are drawn instead
MOST_LOST = 0.02  # of the perplexity; more than this is called lost


@dataclass
class TextAbility(Evaluation):
    """Measure a model and its base LLM on text. Its report has a `verdict` in words."""

    base: str | None = None  # the LLM (anything `load_llm` takes); None: what the model's card names
    max_samples: int | None = None
    seed: int = 0
    name = "text"

    def check_data(self, data: Data) -> None:
        open_texts(data)

    def run(self, job: Job) -> Report:
        model, processor, skipped, seed = job.model, job.processor, job.skipped, self.seed
        base = self.base or read_info(job.model_name).base_llm
        if base is None:
            raise ValueError(f"{job.model_name} does not say what its base LLM is: name it with --base.")
        length = min(WINDOW, longest_sequence(model.config) or WINDOW)
        windows, files = read_windows(job.data, processor, length, skipped, self.max_samples)
        if not windows:
            raise ValueError(f"{job.data} holds no text.{skipped.first()}")
        conditions = {
            "task": self.name,
            "model": model_fingerprint(job.model_name),
            "base": model_fingerprint(base),
            "data": fingerprints(files),
            "settings": {
                "seed": seed,
                "max_samples": self.max_samples,
                "window": length,
                **computed_as(model),
                **job.data.options,
            },
        }
        count = len(windows)
        cache = job.open_cache(conditions, 2 * count)
        with job.progress("text", 2 * count, len(cache.done)) as advance:
            for number in range(2):
                if all(index in cache.done for index in range(number * count, (number + 1) * count)):
                    continue
                reader = model if number == 0 else load_base_llm(base, model, processor)
                for lines in _read(reader, windows, number * count, cache.done):
                    cache.add(lines)
                    advance(len(lines))
        lines, base_lines = ([cache.done[number * count + index] for index in range(count)] for number in range(2))
        metrics = _language(windows, lines, base_lines, seed)
        documents = {window.document for window in windows}
        return job.report(
            len(documents), metrics, conditions, cache, files,
            num_documents=len(documents),
            base=base,
            drawn="documents" if len(documents) >= FEW_DOCUMENTS else "windows",
            verdict=_verdict(metrics["perplexity_ratio"], max(len(documents), len(windows))),
        )  # fmt: skip


def _read(
    model: VoraForConditionalGeneration, windows: Sequence[Window], first: int, done: Container[int]
) -> Iterator[list[Line]]:
    """A model's lines for all windows that are not done, batch by batch; the first one's has the index `first`."""
    samples = ((index, window.sample) for index, window in enumerate(windows) if first + index not in done)
    began = time.monotonic()
    for batch in score_samples(model, samples):
        seconds = round((time.monotonic() - began) / len(batch), 4)
        yield [
            {"index": first + index, "name": windows[index].name, "log_prob": round(float(score.log_probs[0]), 5),
             "num_tokens": int(score.num_tokens[0]), "seconds": seconds}
            for index, score in batch.items()
        ]  # fmt: skip
        began = time.monotonic()


def _language(
    windows: Sequence[Window], lines: Sequence[Line], base_lines: Sequence[Line], seed: int
) -> dict[str, Estimate]:
    """Perplexity and bits per byte of both, and the ratio of the first."""
    sums = np.array(
        [
            [-line["log_prob"], -base["log_prob"], line["num_tokens"], window.num_bytes]
            for window, line, base in zip(windows, lines, base_lines)
        ]
    )
    documents = [window.document for window in windows]
    groups = documents if len(set(documents)) >= FEW_DOCUMENTS else list(range(len(windows)))
    values = {
        "perplexity": lambda s: np.exp(s[..., 0] / s[..., 2]),
        "base_perplexity": lambda s: np.exp(s[..., 1] / s[..., 2]),
        "perplexity_ratio": lambda s: np.exp((s[..., 0] - s[..., 1]) / s[..., 2]),
        "bits_per_byte": lambda s: s[..., 0] / s[..., 3] / np.log(2),
        "base_bits_per_byte": lambda s: s[..., 1] / s[..., 3] / np.log(2),
    }
    return {name: interval_of(value_of, sums, groups, seed) for name, value_of in values.items()}


def _verdict(ratio: Estimate, num_drawn: int) -> str:
    """In words: kept, lost or unclear, by whether the interval lies on one side of the bound; an interval of fewer
    than `FEW_DOCUMENTS` draws says nothing."""
    value, low, high = numbers(ratio)
    most = 1 + MOST_LOST
    found = "Too little text to tell"
    if num_drawn >= FEW_DOCUMENTS:
        found = "Language is kept" if high <= most else "Language is lost" if low > most else found
    return (
        f"{found}: the perplexity of held text is {value:.4f} times the base's "
        f"({in_words(ratio['interval'])}; at most {most} counts as kept)."
    )
