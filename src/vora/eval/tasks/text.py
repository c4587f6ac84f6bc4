"""Text ability: what a model lost of its base LLM's language when it learned to see.

Both read the same tokens: held text, for the perplexity of each token and bits per byte, and questions whose choices
are scored by likelihood. All differences are paired.

Dims: W windows, Q questions, C choices.
"""

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from vora.checkpoint.layout import read_info
from vora.checkpoint.load import load_base_llm
from vora.data.answers import ChoiceQuestion
from vora.eval.evaluation import Data, Evaluation, Job
from vora.eval.metrics.intervals import Estimate, in_words, interval_of, mean, numbers, share
from vora.eval.prediction_cache import Line, fingerprints, model_fingerprint
from vora.eval.report import Report
from vora.eval.rows import SkippedRows
from vora.eval.scoring.candidates import AnswerTree, candidate_scores
from vora.eval.scoring.generate import Prompt, batches, check_context_length
from vora.eval.scoring.teacher_forced import score_samples
from vora.eval.tasks.text_items import WINDOW, Window, open_items, read_items
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

FEW_DOCUMENTS = 10  # with fewer, windows are drawn instead
MOST_LOST = 0.02  # of the perplexity; more than this is called lost


@dataclass
class TextAbility(Evaluation):
    """Measure a model and its base LLM on text. Its report has a `verdict` in words.

    Args:
        base: the LLM (anything `load_llm` takes); None: what the model's card names.
    """

    base: str | None = None
    max_examples: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        return "text"

    def check_data(self, data: Data) -> None:
        open_items(data.paths, **data.options)

    def run(self, job: Job) -> Report:
        model, processor, skipped, seed = job.model, job.processor, job.skipped, self.seed
        base = self.base or base_of(job.model_name)
        length = window_length(model)
        windows, questions, files = read_items(
            job.data.paths, processor, length, skipped, self.max_examples, **job.data.options
        )
        questions = [question for question in questions if _is_held(model, processor.tokenizer, question, skipped)]
        if not windows and not questions:
            raise ValueError(f"{job.data} holds no text and no question.{skipped.first()}")
        conditions = {
            "task": self.name,
            "model": model_fingerprint(job.model_name),
            "base": model_fingerprint(base),
            "data": fingerprints(files),
            "settings": {
                "seed": seed,
                "max_examples": self.max_examples,
                "window": length,
                "dtype": str(model.dtype).removeprefix("torch."),
                **job.data.options,
            },
        }
        count = len(windows) + len(questions)
        cache = job.open_cache(conditions, 2 * count)
        with job.progress("text", 2 * count, len(cache.done)) as advance:
            for number in range(2):
                if all(index in cache.done for index in range(number * count, (number + 1) * count)):
                    continue
                reader = model if number == 0 else load_base_llm(base, model, processor)
                for lines in _read(reader, processor, windows, questions, number * count, cache.done):
                    cache.add(lines)
                    advance(len(lines))
        lines, base_lines = ([cache.done[number * count + index] for index in range(count)] for number in range(2))
        metrics = _language(windows, lines, base_lines, seed) if windows else {}
        if questions:
            metrics |= _knowledge(questions, lines[len(windows) :], base_lines[len(windows) :], seed)
        documents = {window.document for window in windows}
        return job.report(
            len(documents) + len(questions), metrics, conditions, cache, files,
            num_documents=len(documents),
            num_questions=len(questions),
            base=base,
            drawn="documents" if len(documents) >= FEW_DOCUMENTS else "windows",
            verdict=_verdict(metrics, max(len(documents), len(windows)), len(questions)),
        )  # fmt: skip


def base_of(model_name: str) -> str:
    """The base LLM that a model names.

    Raises:
        ValueError: it names none.
    """
    name = read_info(model_name).base_llm
    if name is None:
        raise ValueError(f"{model_name} does not say what its base LLM is: name it with --base.")
    return name


def window_length(model: VoraForConditionalGeneration) -> int:
    """Tokens of a window: `WINDOW`, or what the LLM holds or sees at once."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min(WINDOW, *(limit for limit in limits if limit), WINDOW)


def _read(
    model: VoraForConditionalGeneration,
    processor: VoraProcessor,
    windows: Sequence[Window],
    questions: Sequence[ChoiceQuestion],
    first: int,
    done: Container[int],
) -> Iterator[list[Line]]:
    """A model's lines for all items that are not done, batch by batch; the first item's has the index `first`."""
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
    first += len(windows)
    left = [number for number in range(len(questions)) if first + number not in done]
    tokens = [_tokens(processor.tokenizer, questions[number]) for number in left]
    for places in batches([len(context) for context, _ in tokens], model.device):
        prompts = [Prompt({"input_ids": tokens[place][0]}, []) for place in places]
        found = candidate_scores(model, processor, prompts, [AnswerTree(tokens[place][1]) for place in places], None)
        seconds = round((time.monotonic() - began) / len(places), 4)
        yield [
            {"index": first + left[place], "name": questions[left[place]].name,
             "log_probs": scores.round(5).tolist(), "seconds": seconds}
            for place, scores in zip(places, found)
        ]  # fmt: skip
        began = time.monotonic()


def _tokens(tokenizer: PreTrainedTokenizerBase, question: ChoiceQuestion) -> tuple[np.ndarray, list[list[int]]]:
    """(ids of the beginning int[T], lists of ids of each way to go on, a space before it)."""
    context = tokenizer(question.context)["input_ids"]
    found = []
    for choice in question.choices:
        whole = tokenizer(f"{question.context} {choice}")["input_ids"]
        if whole[: len(context)] != context:  # a token reaches across the border
            whole = context + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        found.append(whole[len(context) :])
    return np.array(context), found


def _is_held(
    model: VoraForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    question: ChoiceQuestion,
    skipped: SkippedRows,
) -> bool:
    """Whether the LLM's context holds a question with each of its choices; if not, it is added to `skipped`."""
    context, choices = _tokens(tokenizer, question)
    try:
        check_context_length(model, len(context) + max(map(len, choices), default=0), "leave it out")
    except ValueError as error:
        skipped.add(question.name, error)
        return False
    return True


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


def _knowledge(
    questions: Sequence[ChoiceQuestion], lines: Sequence[Line], base_lines: Sequence[Line], seed: int
) -> dict[str, Estimate]:
    """Accuracy of both and its difference, by the likelihood of a choice, and by that per byte of it."""
    right = np.array([question.right for question in questions])
    lengths = [np.array([len(choice.encode()) for choice in question.choices]) for question in questions]
    groups, found = list(range(len(questions))), {}
    for ending, divisors in {"": [np.array(1)] * len(questions), "_per_byte": lengths}.items():
        of_each = []
        for read in (lines, base_lines):
            chosen = [int(np.argmax(np.array(line["log_probs"]) / by)) for line, by in zip(read, divisors)]
            of_each.append((np.array(chosen) == right).astype(float))
        found["accuracy" + ending] = share(of_each[0], groups, seed)
        found["base_accuracy" + ending] = share(of_each[1], groups, seed)
        found["accuracy_difference" + ending] = mean(of_each[0] - of_each[1], groups, seed)
    return found


def _verdict(metrics: dict[str, Estimate], num_drawn: int, num_questions: int) -> str:
    """In words: kept, lost or unclear, by whether the interval lies on one side of the bound; an interval of fewer
    than `FEW_DOCUMENTS` draws says nothing."""
    sentences = []
    if "perplexity_ratio" in metrics:
        value, low, high = numbers(metrics["perplexity_ratio"])
        most = 1 + MOST_LOST
        found = "Too little text to tell"
        if num_drawn >= FEW_DOCUMENTS:
            found = "Language is kept" if high <= most else "Language is lost" if low > most else found
        sentences.append(
            f"{found}: the perplexity of held text is {value:.4f} times the base's "
            f"({in_words(metrics['perplexity_ratio']['interval'])}; at most {most} counts as kept)."
        )
    if "accuracy_difference" in metrics:
        value, low, high = numbers(metrics["accuracy_difference"])
        found = "not shown to differ from"
        if num_questions >= FEW_DOCUMENTS:
            found = "lower than" if high < 0 else "higher than" if low > 0 else found
        sentences.append(
            f"Accuracy of choices is {found} the base's: {100 * value:+.1f} points "
            f"({in_words(metrics['accuracy_difference']['interval'], '+.1f', 100)})."
        )
    return " ".join(sentences)
