"""What is packed into a sequence, or shares an image's tokens, computes what it computes alone."""

import numpy as np
import pytest
import torch
from packed import objective_of, questions, sample
from PIL import Image
from tiny import IMAGE, states_of_blocks, text

from vora.data import packing
from vora.data.packing import collate_sequences, label_weights, next_sequence, places, share_prefixes
from vora.data.schema import Sample
from vora.distill import label_loss
from vora.model import segmented_sdpa
from vora.model.segmented_sdpa import SEGMENTED_SDPA

FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])


def losses_of_samples(learner, samples):
    """Summed cross-entropy of each sample alone, by the ordinary road."""
    losses = []
    for one in samples:
        inputs = {name: torch.from_numpy(one[name]) for name in ("pixel_values", "image_grid_thw") if name in one}
        inputs |= {name: torch.from_numpy(one[name])[None] for name in ("input_ids", "labels")}
        losses.append(learner.vora(**inputs, num_items_in_batch=1).loss)
    return torch.stack(losses)


def loss_of(learner, batch):
    return learner(**batch, num_items_in_batch=1)["loss"]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def gradients(learner, loss):
    learner.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=1e-5):
    """Relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert scale > 0, name
        assert (found[name] - expected[name]).abs().max() <= tolerance * scale, name


@FAMILIES
def test_packed_sequences_learn_as_their_samples_would_alone(family):
    learner = objective_of(family)
    groups = [
        questions(0),  # they share an image
        [sample(*text(9, 3))],  # text only
        questions(1, count=2),
        questions(1, count=1) * 2,  # the same one twice
        [sample(*text(2, 4), (3, 3, 5), (2, 2, 6), *text(5, 5))],  # two images that touch
        [sample((2, 2, 7), *text(5, 6))],  # begins with its image, right after the one before
        [sample(*text(2, 7), (1, 2, 8), *text(2, 8), (2, 1, 9), *text(2, 9), (1, 1, 10), *text(4, 10))],  # many
        [sample(*text(1, 11), (2, 2, 11, 3), *text(4, 12))],  # a video of three frames
        [sample((1, 2, 12, 2), (1, 2, 13), *text(4, 13))],  # a video that touches an image
    ]
    shared = [share_prefixes(group) for group in groups]
    assert (shared[0]["input_ids"] == IMAGE).sum() == 6  # the image stands once
    lengths, rows, left = [len(one["input_ids"]) for one in shared], [], list(range(len(groups)))
    while left:
        rows.append([left[i] for i in next_sequence([lengths[i] for i in left], 48)])
        left = [i for i in left if i not in rows[-1]]
    assert len(rows) < len(groups) - 3
    batch = collate_sequences([[shared[i] for i in row] for row in rows], 48, pad_token_id=0)
    together, alone = loss_of(learner, batch | places(batch, IMAGE)), losses_of_samples(learner, sum(groups, []))
    close(together, alone.sum())
    assert_same(gradients(learner, together), gradients(learner, alone.sum()))
    with pytest.raises(ValueError, match="image tokens"):
        places({**batch, "image_grid_thw": batch["image_grid_thw"][:1]}, IMAGE)


@pytest.mark.parametrize("most", [None, 128])
def test_short_answers_count_as_much_as_long_ones(most, monkeypatch):
    learner = objective_of("llama")
    groups = [questions(0, count=4), [sample(*text(9, 3), answer=6)], [sample((2, 2, 7), *text(5, 6), answer=1)]]
    shared = [share_prefixes(group) for group in groups]
    samples, length = sum(groups, []), max(len(one["input_ids"]) for one in shared) + 8
    batch = collate_sequences([[shared[0]], shared[1:]], length, pad_token_id=0)
    lengths = torch.tensor([(one["labels"] != -100).sum() for one in samples])
    assert lengths.tolist() == [2, 3, 4, 5, 6, 1]
    for balance in (0.0, 0.5, 1.0):
        weights = label_weights(batch, balance)
        whole = (lengths**-balance * lengths).sum()
        torch.testing.assert_close(weights.sum(), whole)
        alone = losses_of_samples(learner, samples)
        expected = (lengths**-balance * alone).sum() / whole
        if most:
            monkeypatch.setattr(label_loss, "MOST_LOGITS", most)  # each label's logits for themselves
        found = learner(**batch, label_weights=weights)
        close(found["loss"], expected)
        close(found["lm_loss"], alone.sum() / lengths.sum())  # tells the same whatever counts
        assert_same(gradients(learner, found["loss"]), gradients(learner, expected))


def test_answers_are_told_apart_by_where_they_stand():
    twice = sample(*text(3), (2, 3, 0), *text(12, 1), answer=0)
    twice["labels"][-9:-5], twice["labels"][-2:] = twice["input_ids"][-9:-5], twice["input_ids"][-2:]  # two turns
    silent = packing.without_targets(share_prefixes([sample(*text(4))]), 48)
    row = [share_prefixes([twice]), share_prefixes([sample(*text(4), answer=4)])]
    batch = collate_sequences([row, [silent]], sum(len(one["input_ids"]) for one in row), pad_token_id=0)
    expected = [1 / 4] * 4 + [1 / 2] * 2 + [1 / 3] * 3  # a first token has nothing before it that could predict it
    torch.testing.assert_close(label_weights(batch, 1.0), torch.tensor(expected))
    nothing = {name: value[1:] for name, value in batch.items() if value.dim() == 2}
    assert label_weights(nothing, 1.0).shape == (0,)


@FAMILIES
def test_nothing_leaks_between_branches_and_documents(family):
    learner, row = objective_of(family), [share_prefixes(questions(0)), share_prefixes(questions(1, count=2))]
    batch = collate_sequences([row], 64, pad_token_id=0)
    del batch["targets"], batch["num_samples"]
    own = batch["seen_until"][0] == row[0]["ends"].min()  # one question's, without the image
    assert own.sum() >= 3
    before = states_of_blocks(learner.vora, **batch)
    for place in own.nonzero()[:, 0]:
        moved = {**batch, "input_ids": batch["input_ids"].clone()}
        moved["input_ids"][0, place] = 127 if moved["input_ids"][0, place] != 127 else 126
        for old, new in zip(before, states_of_blocks(learner.vora, **moved)):
            assert torch.equal(old[0, ~own], new[0, ~own])
            assert not torch.equal(old[0, place], new[0, place])


def test_text_that_questions_begin_with_alike_stands_once():
    samples = [sample(*ids, answer=1) for ids in ([9, 8, 7, 40], [9, 8, 6, 41], [9, 5, 42], [9, 8, 7, 43])]
    shared = share_prefixes(samples)
    assert shared["input_ids"].tolist() == [9, 5, 8, 6, 7, 7]
    assert shared["position_ids"].tolist() == [0, 1, 1, 2, 2, 2]
    assert shared["seen_until"].tolist() == [5, 1, 5, 3, 4, 5]
    assert shared["targets"].tolist() == [-100, 42, -100, 41, 40, 43]  # 7 predicts, so it is not shared
    assert shared["ends"].tolist() == [4, 3, 1, 5] and shared["num_samples"] == 4
    one = {"input_ids": np.array([4, 5, 6, 7, 8]), "labels": np.array([-100, -100, 6, 7, -100])}
    alone = share_prefixes([one])  # its end predicts nothing
    assert alone["input_ids"].tolist() == [4, 5, 6] and alone["targets"].tolist() == [-100, 6, 7]
    assert alone["position_ids"].tolist() == [0, 1, 2] and alone["seen_until"].tolist() == [2, 2, 2]
    silent = {"input_ids": np.array([4, 5]), "labels": np.array([-100, -100])}
    with pytest.raises(ValueError, match="All labels of 1 of its 2 conversations are masked"):
        share_prefixes([one, silent])


def test_a_row_takes_the_oldest_then_the_longest_that_fit():
    assert next_sequence([5, 6, 4, 3], 10) == [0, 2]
    assert next_sequence([5, 1, 2, 3], 10) == [0, 2, 3]
    assert next_sequence([10, 1], 10) == [0]


def test_conversations_share_images_only_where_these_stand_alike(processor):
    images = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]

    def asked(*parts):
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]

    conversations = [asked(None, "is it", None), asked("is", None, "like", None), asked(None, "is it", None, "?")]
    whole = Sample("r", images, conversations)
    for chosen, num_copies in ((conversations, 3), (conversations[::2], 1)):
        one = packing.tokenize_sample(whole, processor, chosen)
        assert len(one["image_grid_thw"]) == 2 * num_copies and one["num_samples"] == len(chosen)
        samples = [processor.training_sample(whole.messages(images, c)) for c in chosen]
        assert (one["targets"] != -100).sum() == sum((alone["labels"] != -100).sum() for alone in samples)
        copies = [alone["pixel_values"] for alone in samples[:num_copies]]
        assert np.array_equal(one["pixel_values"], np.concatenate(copies))


ROWS = [[share_prefixes(questions(0)), share_prefixes([sample(*text(9, 3))])], [share_prefixes(questions(1, 1))]]


@FAMILIES
def test_attention_by_segment_learns_as_attention_in_rows(family, monkeypatch):
    """In bf16 as exactly as sdpa: both are compared with sdpa in float32."""
    monkeypatch.setattr(segmented_sdpa, "SHORT", 0)
    batch, masks = collate_sequences(ROWS, 64, pad_token_id=0), []

    def learned(attention, bf16=False, checkpointed=False):
        learner = objective_of(family)
        learner.vora.set_attn_implementation(attention)
        if checkpointed:
            learner.gradient_checkpointing_enable()
        learner.train()
        learner.vora.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(learner, batch)
        return {"loss": loss.detach(), **gradients(learner, loss)}

    exact = learned("sdpa")
    assert_same(learned(SEGMENTED_SDPA), exact)
    in_rows, by_segment = (one if isinstance(one, torch.Tensor) else one["full_attention"] for one in masks)
    assert not hasattr(in_rows, "segments")
    used = [[len(one["input_ids"]) for one in row] for row in ROWS]
    found = [[segment.queries.stop - segment.queries.start for segment in row] for row in by_segment.segments]
    assert found == [lengths + [64 - sum(lengths)] for lengths in used]
    assert all(segment.keys == segment.queries for row in by_segment.segments for segment in row)
    assert_same(learned(SEGMENTED_SDPA, checkpointed=True), exact)

    def distance(found):
        return torch.stack([(found[name] - one).norm() / one.norm() for name, one in exact.items()]).mean()

    assert 0 < distance(learned(SEGMENTED_SDPA, bf16=True)) < 1.5 * distance(learned("sdpa", bf16=True))
