"""Accuracy without generating: it must agree with what greedy generation answers."""

import numpy as np
import pytest
import torch
from PIL import Image

import vora
from vora.data.schema import Sample
from vora.data.turns import question_and_answer
from vora.eval.scoring.teacher_forced import (
    accuracy,
    accuracy_by_answer,
    blank_image_accuracy,
    exact_answers,
    majority_accuracy,
)


@pytest.fixture(scope="module")
def seeing(llm_folder):
    """A tiny random model, its processor, and three noise images."""
    torch.manual_seed(0)
    model = vora.VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=12)
    processor = vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)
    noise = np.random.default_rng(0).integers(0, 255, (3, 12, 12, 3), dtype=np.uint8)
    return model, processor, [Image.fromarray(pixels) for pixels in noise]


def greedy_answer(model, processor, image, question, max_new_tokens):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    new = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return new.tolist()


def test_exact_answers_agree_with_greedy_generation(seeing, monkeypatch):
    model, processor, images = seeing
    end = processor.tokenizer.eos_token_id
    spoken = []

    def given_answer(ids):  # answers as token ids, so that a random model's own words can be right
        return lambda messages, *_: {**original(messages), **_with_answer(original(messages), ids, end)}

    original = processor.training_sample
    for image in images:
        for question in ("what?", "which?"):
            ids = greedy_answer(model, processor, image, question, 3)
            spoken.append((image, question, [i for i in ids if i != end][:3]))
    for image, question, ids in spoken:
        record = Sample("r", [image], [question_and_answer(question, "x")])
        full = greedy_answer(model, processor, image, question, len(ids) + 1)
        monkeypatch.setattr(processor, "training_sample", given_answer(ids))
        assert exact_answers(model, processor, [record]) == [[full == [*ids, end]]]
        monkeypatch.setattr(processor, "training_sample", given_answer([*ids[:-1], (ids[-1] + 1) % 50 + 10]))
        assert exact_answers(model, processor, [record]) == [[False]]
        monkeypatch.setattr(processor, "training_sample", original)


def _with_answer(sample, ids, end):
    prompt = int(np.flatnonzero(sample["labels"] != -100).min())
    return {
        "input_ids": np.array([*sample["input_ids"][:prompt], *ids, end]),
        "labels": np.array([-100] * prompt + [*ids, end]),
    }


def test_answers_do_not_depend_on_how_records_are_batched(seeing, monkeypatch):
    model, processor, images = seeing
    monkeypatch.setattr(model, "logits", lambda states: states @ torch.eye(states.shape[-1], 400))
    questions = [("what?", "a"), ("which shape?", "b c"), ("is it?", "yes")]
    records = [
        Sample("r", [image], [question_and_answer(*q) for q in questions[: i + 1]]) for i, image in enumerate(images)
    ]
    together = exact_answers(model, processor, records)
    alone = [exact_answers(model, processor, [record])[0] for record in records]
    assert together == alone and [len(row) for row in together] == [1, 2, 3]


def test_accuracy_counts_questions():
    records = [Sample("a", [], [question_and_answer("q", "yes"), question_and_answer("q", "red")])]
    assert accuracy([[True, False]]) == 0.5
    assert accuracy_by_answer([[True, False]], records) == {"yes / no": (1.0, 1), "what": (0.0, 1)}


def test_majority_guesses_by_question_and_falls_back():
    train = [Sample("a", [], [question_and_answer("q", a) for a in ("no", "no", "yes")])]
    test = [
        Sample(
            "b",
            None,
            [question_and_answer("q", "no"), question_and_answer("q", "yes"), question_and_answer("new", "no")],
        )
    ]
    assert majority_accuracy(train, test) == pytest.approx(2 / 3)


def test_blank_images_score_as_if_each_question_were_asked_alone(seeing, monkeypatch):
    model, processor, images = seeing
    questions = [("what?", "red"), ("what?", "red"), ("what?", "blue"), ("is it?", "yes")]
    records = [Sample("r", [images[0]], [question_and_answer(*pair)]) for pair in questions]
    right = {"red": True, "blue": False, "yes": False}
    monkeypatch.setattr(
        "vora.eval.scoring.teacher_forced.exact_answers",
        lambda model, processor, blanks: [[right[c[-1]["content"]] for c in blank.conversations] for blank in blanks],
    )
    assert blank_image_accuracy(model, processor, records) == 0.5
