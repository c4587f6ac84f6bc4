"""Accuracy without generating: it must agree with what greedy generation answers."""

import numpy as np
import pytest

from vora.data.packing import share_prefixes
from vora.data.schema import Sample
from vora.data.turns import question_and_answer
from vora.eval.rows import Example
from vora.eval.scoring.prompt import padded, prompt_of
from vora.eval.scoring.teacher_forced import AnswerScore, score_samples
from vora.eval.tasks.exact import majority_accuracy


@pytest.mark.parametrize("question", ["what?", "which?"])
def test_exact_answers_agree_with_greedy_generation(seeing, question):
    model, processor, images = seeing
    for image in images:
        prompt = prompt_of(processor, Example("x", question, [], lambda image=image: [image], 0))
        inputs = padded([prompt], processor.tokenizer.eos_token_id, model.device)
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        for answer, is_right in ((said, True), ([*said[:-1], (said[-1] + 1) % 50 + 10], False)):
            ids = np.append(prompt.inputs["input_ids"], answer)
            labels = np.where(np.arange(len(ids)) < len(prompt), -100, ids)
            images_of = {name: value.numpy() for name, value in prompt.image_inputs.items()}
            sample = share_prefixes([{"input_ids": ids, "labels": labels, **images_of}])
            (found,) = score_samples(model, [("a", sample)])
            assert found["a"].right == [is_right]


def test_accuracies_count_questions_and_each_is_asked_once_of_a_blank_image(parquet, png, report_of, monkeypatch):
    asked = []

    def red_is_right(model, processor, records):
        for index, record in records:
            answers = [conversation[-1]["content"] for conversation in record.conversations]
            asked.append((record.images[0].getcolors() == [(96, (255, 255, 255))], answers))
            right = [answer == "red" for answer in answers]
            yield {index: AnswerScore(np.zeros(len(answers)), np.ones(len(answers), int), right)}

    monkeypatch.setattr("vora.eval.probe.probe.score_answers", red_is_right)
    questions = [("what?", "red"), ("what?", "red"), ("what?", "blue"), ("is it?", "yes")]
    rows = [
        {"image": png(n // 2), "question": question, "answer": answer}
        for n, (question, answer) in enumerate(questions)
    ]
    rows.insert(1, {"image": {"bytes": b"no image", "path": "x.png"}, "question": "what?", "answer": "red"})
    report = report_of("exact", parquet("rows", rows))
    assert report["num_images"] == 2 and report["num_examples"] == 4
    assert [one["name"] for one in report["bad"]] == ["rows.parquet:1#0"]
    assert asked == [(False, ["red", "red"]), (False, ["blue", "yes"]), (True, ["red", "blue", "yes"])]
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert values == {"accuracy": 0.5, "accuracy_yes_no": 0, "accuracy_other": 2 / 3, "accuracy_with_blank": 0.5}


def test_majority_guesses_by_question_and_falls_back():
    train = [Sample("a", [], [question_and_answer("q", a) for a in ("no", "no", "yes")])]
    pairs = [("q", "no"), ("q", "yes"), ("new", "no")]
    test = [Sample("b", [], [question_and_answer(*pair) for pair in pairs])]
    assert majority_accuracy(train, test) == pytest.approx(2 / 3)
