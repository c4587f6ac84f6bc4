"""Text ability: what a model lost of its base LLM's language when it learned to see.

Both read the same tokens: held text, for the perplexity of each token and bits per byte, and questions whose choices
are scored by likelihood. All differences are paired.

Dims: W windows, Q questions, C choices.
"""

import time
from pathlib import Path

import numpy as np

from vora.checkpoint.layout import read_info
from vora.checkpoint.load import load_base_llm
from vora.eval.metrics.intervals import in_words, interval_of, mean, share
from vora.eval.prediction_cache import fingerprints, model_fingerprint
from vora.eval.rows import SkippedRows
from vora.eval.run import open_cache, progress, write_report
from vora.eval.scoring.candidates import AnswerTree, candidate_scores
from vora.eval.scoring.generate import Prompt, batches, check_context_length
from vora.eval.scoring.teacher_forced import score_samples
from vora.eval.tasks.text_items import WINDOW, read_items

FEW_DOCUMENTS = 10  # with fewer, windows are drawn instead
MOST_LOST = 0.02  # of the perplexity; more than this is called lost


def text_ability(
    model, processor, paths, out, console, *, model_name, base=None, rows_options=None, max_examples=None, seed=0
):
    """Measure a model and its base LLM on text, write a report.

    Args:
        base: the LLM (anything `load_llm` takes); by default what the model's card names.
        paths, out, model_name, rows_options: as for `evaluate`.

    Returns:
        What the report holds.

    Raises:
        ValueError: there is no text, the base is not known, or splits text otherwise.
    """
    start, out, bad = time.monotonic(), Path(out), SkippedRows()
    base = base or base_of(model_name)
    windows, questions, files = read_items(
        paths, processor, window_length(model), bad, max_examples, **(rows_options or {})
    )
    questions = [question for question in questions if _is_held(model, processor.tokenizer, question, bad)]
    if not windows and not questions:
        raise ValueError(f"{', '.join(map(str, paths))} holds no text and no question.{bad.first()}")
    conditions = {
        "task": "text",
        "model": model_fingerprint(model_name),
        "base": model_fingerprint(base),
        "data": fingerprints(files),
        "settings": {
            "seed": seed,
            "max_examples": max_examples,
            "window": window_length(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            **(rows_options or {}),
        },
    }
    count = len(windows) + len(questions)
    cache = open_cache(out.with_suffix(".predictions.jsonl"), conditions, 2 * count, model, console)
    with progress(console, "text", 2 * count, len(cache.done)) as advance:
        for number in range(2):
            if all(index in cache.done for index in range(number * count, (number + 1) * count)):
                continue
            reader = model if number == 0 else load_base_llm(base, model, processor)
            for lines in _read(reader, processor, windows, questions, number * count, cache.done):
                cache.add(lines)
                advance(len(lines))
    mine, its = ([cache.done[number * count + index] for index in range(count)] for number in range(2))
    metrics = _language(windows, mine, its, seed) if windows else {}
    metrics |= _knowledge(questions, mine[len(windows) :], its[len(windows) :], seed) if questions else {}
    documents = {window.document for window in windows}
    found = {
        "num_examples": len(documents) + len(questions),
        "num_documents": len(documents),
        "num_questions": len(questions),
        "base": str(base),
        "drawn": "documents" if len(documents) >= FEW_DOCUMENTS else "windows",
        "verdict": _verdict(metrics, max(len(documents), len(windows)), len(questions)),
        "metrics": metrics,
    }
    return write_report(out, found, conditions, model, model_name, files, bad, cache, start)


def base_of(model_name):
    """The base LLM that a model names.

    Raises:
        ValueError: it names none.
    """
    name = read_info(model_name).base_llm
    if name is None:
        raise ValueError(f"{model_name} does not say what its base LLM is: name it with --base.")
    return name


def window_length(model):
    """Tokens of a window: `WINDOW`, or what the LLM holds or sees at once."""
    config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min(WINDOW, *(limit for limit in limits if limit), WINDOW)


def _read(model, processor, windows, questions, first, done):
    """Lines of what a model makes of each item, batch by batch."""
    samples = ((index, window.sample) for index, window in enumerate(windows) if first + index not in done)
    began = time.monotonic()
    for batch in score_samples(model, samples):
        seconds = round((time.monotonic() - began) / len(batch), 4)
        yield [
            {"index": first + index, "name": windows[index].name, "log_prob": round(float(told.log_probs[0]), 5),
             "num_tokens": int(told.num_tokens[0]), "seconds": seconds}
            for index, told in batch.items()
        ]  # fmt: skip
        began = time.monotonic()
    first += len(windows)
    asked = [number for number in range(len(questions)) if first + number not in done]
    told = [_tokens(processor.tokenizer, questions[number]) for number in asked]
    for batch in batches([len(context) for context, _ in told], model.device):
        prompts = [Prompt({"input_ids": told[place][0]}, []) for place in batch]
        found = candidate_scores(model, processor, prompts, [AnswerTree(told[place][1]) for place in batch], None)
        seconds = round((time.monotonic() - began) / len(batch), 4)
        yield [
            {"index": first + asked[place], "name": questions[asked[place]].name,
             "log_probs": scores.round(5).tolist(), "seconds": seconds}
            for place, scores in zip(batch, found)
        ]  # fmt: skip
        began = time.monotonic()


def _tokens(tokenizer, question):
    """(ids of the beginning int[T], lists of ids of each way to go on, a space before it)."""
    context = tokenizer(question.context)["input_ids"]
    found = []
    for choice in question.choices:
        whole = tokenizer(f"{question.context} {choice}")["input_ids"]
        if whole[: len(context)] != context:  # a token reaches across the border
            whole = context + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        found.append(whole[len(context) :])
    return np.array(context), found


def _is_held(model, tokenizer, question, bad):
    """Whether the LLM's context holds a question with each of its choices; if not, it is added to `bad`."""
    context, choices = _tokens(tokenizer, question)
    try:
        check_context_length(model, len(context) + max(map(len, choices), default=0), "leave it out")
    except ValueError as error:
        bad.add(question.name, error)
        return False
    return True


def _language(windows, mine, its, seed):
    """Perplexity and bits per byte of both, and the ratio of the first."""
    sums = np.array(
        [
            [-line["log_prob"], -base["log_prob"], line["num_tokens"], window.num_bytes]
            for window, line, base in zip(windows, mine, its)
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


def _knowledge(questions, mine, its, seed):
    """Accuracy of both and its difference, by the likelihood of a choice, and by that per byte of it."""
    right = np.array([question.right for question in questions])
    lengths = [np.array([len(choice.encode()) for choice in question.choices]) for question in questions]
    groups, found = list(range(len(questions))), {}
    for ending, divisors in {"": [1] * len(questions), "_per_byte": lengths}.items():
        of_each = []
        for lines in (mine, its):
            chosen = [int(np.argmax(np.array(line["log_probs"]) / by)) for line, by in zip(lines, divisors)]
            of_each.append((np.array(chosen) == right).astype(float))
        found["accuracy" + ending] = share(of_each[0], groups, seed)
        found["base_accuracy" + ending] = share(of_each[1], groups, seed)
        found["accuracy_difference" + ending] = mean(of_each[0] - of_each[1], groups, seed)
    return found


def _verdict(metrics, num_drawn, num_questions):
    """In words: kept, lost or unclear, by whether the interval lies on one side of the bound; an interval of fewer
    than `FEW_DOCUMENTS` draws says nothing."""
    words = []
    if "perplexity_ratio" in metrics:
        low, high = metrics["perplexity_ratio"]["interval"]
        most = 1 + MOST_LOST
        told = "Too little text to tell"
        if num_drawn >= FEW_DOCUMENTS:
            told = "Language is kept" if high <= most else "Language is lost" if low > most else told
        words.append(
            f"{told}: the perplexity of held text is {metrics['perplexity_ratio']['value']:.4f} times the base's "
            f"({in_words((low, high))}; at most {most} counts as kept)."
        )
    if "accuracy_difference" in metrics:
        (low, high), value = metrics["accuracy_difference"]["interval"], metrics["accuracy_difference"]["value"]
        told = "not shown to differ from"
        if num_questions >= FEW_DOCUMENTS:
            told = "lower than" if high < 0 else "higher than" if low > 0 else told
        words.append(
            f"Accuracy of choices is {told} the base's: {100 * value:+.1f} points "
            f"({in_words((low, high), '+.1f', 100)})."
        )
    return " ".join(words)
