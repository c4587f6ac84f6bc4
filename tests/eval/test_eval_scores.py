"""Scorers against published values, other libraries' values, and values worked out by hand."""

import math

import numpy as np
import pytest

from vora.eval.metrics.captions import bleu_4, bleu_counts, cider_d, words_of
from vora.eval.metrics.intervals import in_words, interval_of, mean, ratio, share, wilson
from vora.eval.metrics.vqa import exact_accuracy, normalised, soft_accuracy

# The example of aac-metrics' documentation (README of its 0.6.0), with the values published there
TOLD = ["a man is speaking", "rain falls"]
WANTED = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]


def test_cider_is_the_published_one():
    scores = cider_d(TOLD, WANTED)
    assert scores.round(4).tolist() == [1.3641, 0.5587] and round(scores.mean(), 4) == 0.9614


def test_scores_are_those_of_pycocoevalcap():
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed").Cider()
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    draw = np.random.default_rng(0)
    words = np.array("a the dog cat man runs sits on in red small park street with two".split())
    sentence = lambda: " ".join(draw.choice(words, draw.integers(3, 12)))  # noqa: E731
    wanted = [[sentence() for _ in range(draw.integers(1, 6))] for _ in range(60)]
    said = [" ".join(draw.permutation(row[0].split())) if draw.random() < 0.3 else row[0][4:] for row in wanted]
    theirs = {n: row for n, row in enumerate(wanted)}, {n: [one] for n, one in enumerate(said)}
    value, each = cider.compute_score(*theirs)
    np.testing.assert_allclose(cider_d(said, wanted), each, atol=1e-9)
    assert cider_d(said, wanted).mean() == pytest.approx(value)
    ours = bleu_4(np.sum([bleu_counts(*pair) for pair in zip(said, wanted)], 0))
    assert ours == pytest.approx(bleu.compute_score(*theirs, verbose=0)[0][3], abs=1e-6) and 0 < ours < 1


def test_bleu_by_hand():
    said, wanted = "a b c d e", ["a b c d f", "a b c d e f g h"]
    assert bleu_counts(said, wanted) == [5, 4, 3, 2, 5, 4, 3, 2, 5, 5]
    assert bleu_counts("the the the", ["the cat"])[:1] == [1]
    assert bleu_4(bleu_counts("a b c d", ["a b c d e f"])) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu_4(bleu_counts("", ["a b"])) == 0 == bleu_4(bleu_counts("a b", ["a b"]))


def test_one_image_alone_and_empty_captions_score_nothing():
    assert cider_d(["a dog"], [["a dog"]]).tolist() == [0.0]
    assert cider_d(["", "a dog"], [["a dog"], ["a cat"]])[0] == 0.0


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # as Stanford's PTBTokenizer 3.4.1 gives them, by which COCO's scores are made
        ("A dog's tail, it can't... \"jump\"!", "a dog 's tail it ca n't jump"),
        ("The men's (two) dogs -- U.S. 3.5 semi-circle", "the men 's -lrb- two -rrb- dogs u.s. 3.5 semi-circle"),
        ("a 4x4 and 10,000 people at 3:30 .", "a 4x4 and 10,000 people at 3:30"),
        ("five o'clock slip 'n' slide , at&t", "five o'clock slip 'n' slide at & t"),
    ],
)
def test_words_are_penn_treebanks(caption, words):
    assert " ".join(words_of(caption)) == words


def test_answers_are_normalised_as_vqa_does():
    assert normalised("The  Dog!") == "dog"
    assert normalised("two wine_glasses") == "2 wine glasses"
    assert normalised("it's 2.5") == "it's 2.5" and normalised("dont.") == "don't"
    assert normalised("1,000") == "1000" and normalised("red/blue") == "red blue"


def test_soft_accuracy_by_hand():
    people = ["red"] * 2 + ["blue"] * 8
    # two of ten: left out one of the two, 1 / 3 in two of ten cases; else 2 / 3
    assert soft_accuracy("red", people) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert soft_accuracy("blue", people) == 1.0 and soft_accuracy("green", people) == 0.0
    assert soft_accuracy("A chair", ["chair"]) == 1.0
    assert exact_accuracy("red", people) == 0.0 and exact_accuracy("Blue.", people) == 1.0
    assert exact_accuracy("bottle, book", ["book, bottle"]) == 1.0 and exact_accuracy("book", ["book, bottle"]) == 0.0


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draw, hits = np.random.default_rng(0), 0
    for trial in range(100):
        low, high = mean(draw.normal(0.3, 1, 60), range(60), trial)["interval"]
        hits += low <= 0.3 <= high
    assert 88 <= hits <= 100


def test_questions_of_one_image_are_drawn_together():
    scores = [1.0] * 10 + [0.0] * 10
    apart = share(scores, range(20))["interval"]
    together = share(scores, [0] * 10 + [1] * 10)["interval"]
    assert together == [0.0, 1.0] and 0.2 < apart[0] < apart[1] < 0.8


def test_shares_of_all_or_none_have_an_interval():
    assert share([0.0] * 20, range(20))["interval"] == [0.0, pytest.approx(0.161, abs=1e-3)]
    assert wilson(1.0, 20) == (pytest.approx(0.839, abs=1e-3), 1.0)
    assert wilson(0.5, 100) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))


def test_undefined_values_are_none_and_few_groups_have_an_interval_that_says_so():
    assert interval_of(ratio, np.zeros((0, 2)), [])["value"] is None
    assert interval_of(ratio, np.zeros((3, 2)), range(3)) == {"value": None, "interval": [None, None]}
    assert share([0.0, 1.0] * 3, [0, 0, 1, 1, 2, 2])["interval"] == pytest.approx(wilson(0.5, 3))
    assert share([1 / 3] * 3, range(3))["interval"] == pytest.approx(wilson(1 / 3, 3))
    assert share([0.0, 1.0], [0, 0])["interval"] == pytest.approx(wilson(0.5, 1))
    assert mean([1.0, 3.0], [0, 0]) == {"value": 2.0, "interval": [None, None]}
    assert in_words([None, None]) == "-" and in_words([0.1, 0.25], ".0f", 100) == "10 to 25"


def test_an_answer_of_which_nothing_is_left_is_itself():
    assert normalised("A") == "a" == normalised("a.") and normalised("?") == "?" and normalised(".5") == ".5"
    for right in ("A", "?", "-"):
        assert exact_accuracy(right, [right]) == soft_accuracy(right, [right]) == 1.0
        for wrong in ("", "the"):
            assert exact_accuracy(wrong, [right]) == soft_accuracy(wrong, [right]) == 0.0
