"""How likely given answers are and whether a greedy model would give them, in one forward pass per image.

A greedy answer is right exactly when, fed the right answer, the model's first choice at every place is the next token
of that answer, end of turn included. So no token is generated, and all questions about an image share its tokens.

Dims: A answers about one image.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vora.data.packing import collate_sequences, tokenize_sample
from vora.eval.scoring.generate import check_context_length, check_log_probs, sliding_window

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}
ROWS_OF_LOGITS = 512  # made at once
MOST_AT_ONCE, BYTES_AT_ONCE = 1024, 512 << 20  # records, and their pixels, that are sorted by length together


@dataclass
class AnswerScore:
    """What a model holds of the answers about one image.

    Args:
        log_probs: float[A], sums over the tokens of each answer, end of turn included.
        num_tokens: int[A], of each answer.
        right: list of A bools, True = a greedy model says exactly this.
    """

    log_probs: np.ndarray
    num_tokens: np.ndarray
    right: list


def exact_answers(model, processor, records, progress=None, **images_kwargs):
    """Which questions a model answers exactly, greedily.

    Args:
        model: a `VoraForConditionalGeneration`.
        records: sequence of `Sample`s whose conversations are one question and one answer each.
        progress: called with the number of questions done after each batch.
        images_kwargs: for the image processor, such as `max_image_tokens`.

    Returns:
        list of lists of bool: per record and conversation, True = right.
    """
    right = [None] * len(records)
    for batch in score_answers(model, processor, records, **images_kwargs):
        for index, told in batch.items():
            right[index] = told.right
        if progress is not None:
            progress(sum(len(told.right) for told in batch.values()))
    return right


def score_answers(model, processor, records, done=(), **images_kwargs):
    """How a model takes the answers of records, batch by batch.

    Args:
        records: as for `exact_answers`.
        done: indices that are left out.

    Returns:
        iterator over batches: {index of the record: `AnswerScore`}.

    Raises:
        ValueError: an image with an answer exceeds the LLM's context; it is named.
    """
    window, waiting = sliding_window(model), {}  # the latter has what is known of each part of a record

    def samples():
        for index in range(len(records)):
            if index not in done:
                record = records[index]
                parts = _samples_within(window, record, processor, record.conversations, **images_kwargs)
                longest = max(int(sample["position_ids"].max()) for sample in parts) + 2
                check_context_length(model, longest, f"lower --max-image-tokens, or leave out {record.name}")
                waiting[index] = [None] * len(parts)
                yield from (((index, number), sample) for number, sample in enumerate(parts))

    for batch in score_samples(model, samples()):
        for (index, number), told in batch.items():
            waiting[index][number] = told
        whole = dict.fromkeys(index for index, _ in batch if None not in waiting[index])
        if whole:
            yield {index: _joined(waiting.pop(index)) for index in whole}


def _samples_within(window, record, processor, conversations, **images_kwargs):
    """A record's conversations as samples of at most `window` tokens each; one that exceeds it alone stands alone."""
    sample = tokenize_sample(record, processor, conversations, **images_kwargs)
    if window is None or len(sample["input_ids"]) <= window or len(conversations) == 1:
        return [sample]
    half = len(conversations) // 2
    halves = conversations[:half], conversations[half:]
    return [one for part in halves for one in _samples_within(window, record, processor, part, **images_kwargs)]


def _joined(parts):
    """`AnswerScore` of all parts of a record."""
    return AnswerScore(
        np.concatenate([told.log_probs for told in parts]),
        np.concatenate([told.num_tokens for told in parts]),
        [one for told in parts for one in told.right],
    )


@torch.inference_mode()
def score_samples(model, samples):
    """How a model takes what is to be predicted in samples, batch by batch.

    Args:
        samples: iterable of (index, sample of `share_prefixes`); those that exceed the LLM's sliding window are of one
            conversation.

    Yields:
        {index: `AnswerScore`} for each batch.

    Raises:
        ValueError: the model's logits are no numbers.
    """
    model.eval()
    window = sliding_window(model)
    for batch in _batches(samples, model.device, window):
        rows = collate_sequences([[sample] for _, sample in batch], len(batch[-1][1]["input_ids"]), 0)
        rows.pop("num_samples")
        if window and rows["input_ids"].shape[1] > window:
            rows.pop("seen_until")  # nothing is shared, and such borders may not exceed the window
        targets = rows.pop("targets").to(model.device)
        inputs = {name: tensor.to(model.device) for name, tensor in rows.items()}
        states = model.model(**inputs, use_cache=False).last_hidden_state
        wanted = targets != -100
        found = torch.zeros(2, *targets.shape, dtype=torch.float64, device=model.device)
        found[:, wanted] = _at_targets(model, states[wanted], targets[wanted])
        log_probs, chosen = found.cpu().numpy()
        wanted = wanted.cpu().numpy()
        told = {}
        for row, (index, sample) in enumerate(batch):
            places = np.arange(len(sample["input_ids"]))
            paths = [
                wanted[row, : len(places)] & (places <= end) & (end <= sample["seen_until"]) for end in sample["ends"]
            ]
            told[index] = AnswerScore(
                np.array([log_probs[row, : len(places)][path].sum() for path in paths]),
                np.array([path.sum() for path in paths]),
                [bool(chosen[row, : len(places)][path].all()) for path in paths],
            )
        yield told


def _at_targets(model, states, targets):
    """float[2, places]: log-probability of each target, and 1 where it is the model's first choice."""
    found = torch.zeros(2, len(targets), dtype=torch.float64, device=targets.device)
    for part in torch.arange(len(targets), device=targets.device).split(ROWS_OF_LOGITS):
        logits = model.logits(states[part]).float()
        found[0, part] = (logits.gather(1, targets[part, None])[:, 0] - logits.logsumexp(-1)).double()
        check_log_probs(model, found[0, part])
        found[1, part] = (logits.argmax(-1) == targets[part]).double()
    return found


def _batches(samples, device, window=None):
    """Samples, of many at a time the shortest first, in batches of about equal cost: lists of (index, sample). Those
    that exceed a window are apart."""
    most = TOKENS_PER_BATCH["cuda" if device.type == "cuda" else "cpu"]
    for part in _parts(samples):
        batch = []
        for index, sample in sorted(part, key=lambda pair: len(pair[1]["input_ids"])):
            length = len(sample["input_ids"])
            exceeds = window is not None and batch and len(batch[-1][1]["input_ids"]) <= window < length
            if batch and (length * (len(batch) + 1) > most or exceeds):
                yield batch
                batch = []
            batch.append((index, sample))
        yield batch


def _parts(samples):
    """Lists of samples whose pixels are bounded."""
    part, num_bytes = [], 0
    for index, sample in samples:
        part.append((index, sample))
        num_bytes += sample["pixel_values"].nbytes if "pixel_values" in sample else 0
        if len(part) == MOST_AT_ONCE or num_bytes > BYTES_AT_ONCE:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def accuracy(right):
    """Share of questions answered exactly."""
    answers = [answer for record in right for answer in record]
    return sum(answers) / len(answers)


def accuracy_by_answer(right, records):
    """{kind of answer: (share right, number of questions)}: yes/no questions apart from the others."""
    groups = defaultdict(list)
    for index, answers in enumerate(right):
        for answer, conversation in zip(answers, records[index].conversations):
            groups["yes / no" if conversation[-1]["content"] in ("yes", "no") else "what"].append(answer)
    return {kind: (sum(answers) / len(answers), len(answers)) for kind, answers in groups.items()}


def blank_image_accuracy(model, processor, records, colour="white"):
    """What the same model scores when every image is blank: each distinct question is asked once."""
    size = records[0].open_images()[0].size
    answers = defaultdict(Counter)
    for index in range(len(records)):
        for question, answer in records[index].conversations:
            answers[question["content"]][answer["content"]] += 1
    blanks = [
        type(records[0])(
            "blank",
            [Image.new("RGB", size, colour)],
            [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for answer in counts],
        )
        for question, counts in answers.items()
    ]
    right = exact_answers(model, processor, blanks)
    hits = sum(
        count * ok
        for counts, answers_ok in zip(answers.values(), right)
        for count, ok in zip(counts.values(), answers_ok)
    )
    return hits / sum(sum(counts.values()) for counts in answers.values())


def majority_accuracy(train_records, test_records):
    """What guessing the most frequent training answer to the same question scores."""
    seen, overall = defaultdict(Counter), Counter()
    for index in range(len(train_records)):
        for question, answer in train_records[index].conversations:
            seen[question["content"]][answer["content"]] += 1
            overall[answer["content"]] += 1
    hits = total = 0
    for index in range(len(test_records)):
        for question, answer in test_records[index].conversations:
            counts = seen.get(question["content"], overall)
            hits += counts.most_common(1)[0][0] == answer["content"]
            total += 1
    return hits / total
