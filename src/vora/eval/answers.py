"""Exact-match accuracy of greedy answers, in one forward pass per picture.

A greedy answer is right exactly when, fed the right answer, the model's first choice at every place is the next token
of that answer, end of turn included. So no token is generated, and all questions about a picture share its tokens.
"""

from collections import Counter, defaultdict

import numpy as np
import torch
from PIL import Image

from vora.data.packing import collate_rows, sample_of_record

TOKENS_PER_BATCH = 2048


@torch.inference_mode()
def exact_answers(model, processor, records, progress=None, **images_kwargs):
    """Which questions a model answers exactly, greedily.

    Args:
        model: a `VoraForConditionalGeneration`.
        records: sequence of `Record`s whose conversations are one question and one answer each.
        progress: called with the number of questions done after each batch.
        images_kwargs: for the image processor, such as `max_image_tokens`.

    Returns:
        list of lists of bool: per record and conversation, True = right.
    """
    model.eval()
    right = [None] * len(records)
    for batch in _batches(processor, records, images_kwargs):
        rows = collate_rows([[sample] for _, sample in batch], len(batch[-1][1]["input_ids"]), 0)
        rows.pop("num_samples")
        targets = rows.pop("targets").to(model.device)
        inputs = {name: tensor.to(model.device) for name, tensor in rows.items()}
        states = model.model(**inputs, use_cache=False).last_hidden_state
        wanted = targets != -100
        chosen = torch.full_like(targets, -100)
        chosen[wanted] = model.logits(states[wanted]).argmax(-1)
        as_wanted = (chosen == targets).cpu()
        for row, (index, sample) in enumerate(batch):
            places = np.arange(len(sample["input_ids"]))
            right[index] = [
                bool(as_wanted[row, places[(places <= end) & (end <= sample["seen_until"])]].all())
                for end in sample["ends"]
            ]
        if progress is not None:
            progress(sum(len(right[index]) for index, _ in batch))
    return right


def _batches(processor, records, images_kwargs):
    """Records as samples, shortest first, in batches of about equal cost: lists of (index, sample)."""
    samples = []
    for index in range(len(records)):
        record = records[index]
        samples.append((index, sample_of_record(record, processor, record.conversations, **images_kwargs)))
    samples.sort(key=lambda pair: len(pair[1]["input_ids"]))
    batch = []
    for index, sample in samples:
        if batch and len(sample["input_ids"]) * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append((index, sample))
    yield batch


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


def blank_picture_accuracy(model, processor, records, colour="white"):
    """What the same model scores when every picture is blank: each distinct question is asked once."""
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
