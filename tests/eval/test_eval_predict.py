"""Answers in batches, by likelihood and freely, are those of one example alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, SHAPE, log_prob_of_answer
from transformers import AutoConfig, AutoModelForCausalLM

import vora
from vora.data.schema import Sample
from vora.data.turns import question_and_answer
from vora.eval.prediction_cache import PredictionCache
from vora.eval.rows import Example
from vora.eval.scoring import candidates as likelihood
from vora.eval.scoring.candidates import AnswerTree, answer_ids, candidate_scores
from vora.eval.scoring.generate import batches, free_answers, prompt_of
from vora.eval.scoring.predict import predict
from vora.eval.scoring.teacher_forced import score_answers
from vora.eval.tasks.captions import Captions

ANSWERS = ["red", "red circle", "red circle two", "blue", "blue square", "yes", "no", "teal", "green", "yes yes yes"]


@pytest.fixture(scope="module")
def seeing(llm_folder):
    torch.manual_seed(0)
    model = vora.VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=12)
    for parameter in model.parameters():
        parameter.data *= 1.5  # surer of its answers, so that they differ
    processor = vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (8, 4 * n, 3), dtype=np.uint8)) for n in (1, 2, 3, 4)]
    questions = ("what?", "Which colour is the shape?", "what is it?", "Is there a teal shape in the image?")
    examples = [Example(f"e{i}", question, [], lambda i=i: [images[i]], i) for i, question in enumerate(questions)]
    examples.append(Example("text_only", "what?", [], lambda: [], 4))
    return model, processor, [prompt_of(processor, example) for example in examples], examples, images


@pytest.mark.parametrize("top", [None, 1, 3])
@pytest.mark.parametrize("first_nodes", [1, 16])
def test_likelihoods_are_those_of_each_answer_alone(seeing, top, first_nodes, monkeypatch):
    model, processor, prompts, examples, _ = seeing
    monkeypatch.setattr(likelihood, "FIRST_NODES", first_nodes)
    top = len(ANSWERS) if top is None else top
    trees = [AnswerTree(answer_ids(processor, prompt, ANSWERS)) for prompt in prompts]
    found = candidate_scores(model, processor, prompts, trees, top)
    winners = set()
    for example, scores in zip(examples, found):
        wanted = np.array([log_prob_of_answer(model, processor, example, answer) for answer in ANSWERS])
        best = np.argsort(-wanted)[:top]
        assert np.array_equal(np.argsort(-scores, kind="stable")[:top], best)
        exact = np.isfinite(scores)
        np.testing.assert_allclose(scores[exact], wanted[exact], atol=2e-4)
        winners.add(int(best[0]))
    if top == 1 and first_nodes == 1:
        assert not all(np.isfinite(scores).all() for scores in found)  # some were never read


def test_some_candidates_are_read_though_they_are_not_the_best(seeing, monkeypatch):
    model, processor, prompts, examples, _ = seeing
    monkeypatch.setattr(likelihood, "FIRST_NODES", 1)
    trees = [AnswerTree(answer_ids(processor, prompt, ANSWERS)) for prompt in prompts]
    for number, answer in enumerate(ANSWERS):
        both = [[number, (number + 4) % len(ANSWERS)]]
        found = candidate_scores(model, processor, prompts, trees, 1, both * len(prompts))
        for example, scores in zip(examples[:2], found):
            assert np.isfinite(scores[both[0]]).all()
            assert scores[number] == pytest.approx(log_prob_of_answer(model, processor, example, answer), abs=2e-4)


def test_answers_share_what_they_begin_with(seeing):
    _, processor, prompts, _, _ = seeing
    answers = answer_ids(processor, prompts[0], ["red circle", "red square"])
    assert AnswerTree(answers).paths[0][0] == AnswerTree(answers).paths[1][0]
    assert all(answer[-1] == processor.tokenizer.eos_token_id for answer in answers)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_answers_are_those_of_each_alone(seeing, num_beams):
    model, processor, prompts, _, _ = seeing
    together = free_answers(model, processor, prompts, 6, num_beams=num_beams)
    alone = [free_answers(model, processor, [prompt], 6, num_beams=num_beams)[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 1


@pytest.mark.parametrize("max_new_tokens", [1, 100])
def test_captions_are_searched_with_beams_and_batched_for_them(seeing, max_new_tokens, tmp_path, monkeypatch):
    model, processor, prompts, examples, _ = seeing
    longest = max(map(len, prompts[:3])) + max_new_tokens
    monkeypatch.setattr("vora.eval.scoring.generate.TOKENS_PER_BATCH", {"cpu": 3 * 2 * longest})
    monkeypatch.setattr(Captions, "max_new_tokens", max_new_tokens)
    calls = []

    def spy(model, processor, prompts, max_new_tokens, **sampling):
        calls.append((len(prompts), sampling))
        return [""] * len(prompts)

    monkeypatch.setattr("vora.eval.scoring.predict.free_answers", spy)
    predict(model, processor, Captions(), examples[:3], PredictionCache(tmp_path / "lines.jsonl", {}))
    assert calls == [(2, {"num_beams": 3}), (1, {"num_beams": 3})]


def test_answers_depend_on_the_image(seeing):
    model, processor, prompts, examples, images = seeing
    examples = [Example("x", "what?", [], lambda one=one: [one], 0) for one in (images[0], images[3])]
    prompts = [prompt_of(processor, example) for example in examples]
    trees = [AnswerTree(answer_ids(processor, prompt, ANSWERS)) for prompt in prompts]
    first, second = candidate_scores(model, processor, prompts, trees, None or len(ANSWERS))
    assert not np.allclose(first, second)


def test_batches_hold_all_and_no_more_tokens_than_allowed(monkeypatch):
    monkeypatch.setattr("vora.eval.scoring.generate.TOKENS_PER_BATCH", {"cpu": 100})
    lengths = [5, 60, 7, 33, 30, 90, 200]
    found = list(batches(lengths, torch.device("cpu")))
    assert sorted(index for batch in found for index in batch) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 100 for batch in found)
    assert len(found) == 5


@pytest.mark.parametrize(("end", "still_open"), [(-5.0, [1]), (-0.2, []), (-0.4, [1])])
def test_a_likely_beginning_is_not_yet_a_likely_answer(end, still_open):
    tree = AnswerTree([[1, 9], [2, 9]])
    search = likelihood.Search(tree)
    (first, first_end), (second, _) = tree.paths
    search.sums[[first, second]] = -0.1, -0.5
    search.update()
    assert search.open(1) == [0, 1] and search.next_nodes(1, 1) == [first]
    search.sums[first_end] = -0.1 + end
    search.update()
    assert search.open(1) == still_open  # -0.5 is the most that the second can reach


@pytest.mark.parametrize("window", [6, 36])  # smaller than each prompt; than what all answers share
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_likelihoods_are_those_of_each_answer_alone_where_a_window_slides(seeing, family, window):
    _, processor, _, examples, images = seeing
    shape = {**SHAPE, **FAMILIES[family], "vocab_size": len(processor.tokenizer), "sliding_window": window}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    model = vora.VoraForConditionalGeneration.from_llm(
        llm, patch_size=4, image_size=12, image_token_id=processor.image_token_id
    ).eval()
    prompts = [prompt_of(processor, example) for example in examples]
    trees = [AnswerTree(answer_ids(processor, prompt, ANSWERS)) for prompt in prompts]
    wanted = [[log_prob_of_answer(model, processor, example, answer) for answer in ANSWERS] for example in examples]
    found = candidate_scores(model, processor, prompts, trees, None)
    np.testing.assert_allclose(np.array(found), wanted, atol=2e-4)
    records = [
        Sample(one.name, one.images(), [question_and_answer(one.prompt, answer) for answer in ANSWERS])
        for one in examples
    ]
    scores = {index: one for batch in score_answers(model, processor, records) for index, one in batch.items()}
    np.testing.assert_allclose([scores[index].log_probs for index in range(len(records))], wanted, atol=2e-4)


def test_logits_that_are_no_numbers_are_refused(seeing, monkeypatch):
    model, processor, prompts, examples, _ = seeing
    monkeypatch.setattr(model, "logits", lambda states: torch.full((len(states), 400), float("nan")))
    trees = [AnswerTree(answer_ids(processor, prompts[0], ANSWERS))]
    with pytest.raises(ValueError, match="no numbers: .* not finite in float32. Save it"):
        candidate_scores(model, processor, prompts[:1], trees)
    with pytest.raises(ValueError, match="no numbers: .* not finite in float32. Save it"):
        list(score_answers(model, processor, [Sample("r", [], [question_and_answer("what?", "red")])]))


def test_an_overlong_record_is_named(seeing):
    model, processor, *_ = seeing
    record = Sample("row 7", [], [question_and_answer("what? " * 300, "red")])
    with pytest.raises(ValueError, match="context holds 256: lower --max-image-tokens, or leave out row 7"):
        list(score_answers(model, processor, [record]))
