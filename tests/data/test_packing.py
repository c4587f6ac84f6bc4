"""What is packed into a sequence, or shares an image's tokens, computes what it computes alone."""

import numpy as np
import pytest
import torch
from packed import Waits, objective_of, questions, sample
from PIL import Image
from tiny import GRID, IMAGE, PATCH, states_of_blocks, text, tiny_vora
from transformers import ViTConfig, ViTModel

from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, VoraProcessor
from vora.data.packing import (
    collate_sequences,
    cut_text,
    label_weights,
    next_sequence,
    next_targets,
    places,
    share_prefixes,
    tokenize_sample,
)
from vora.data.schema import Sample
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.model import label_loss, segmented_sdpa
from vora.model.segmented_sdpa import SEGMENTED_SDPA, trees

FAMILIES = pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])


def losses_of_samples(learner, samples):
    """Summed cross-entropy of each sample alone, by the ordinary road."""
    losses = []
    for one in samples:
        inputs = {name: torch.from_numpy(one[name]) for name in ("pixel_values", "image_grid_thw") if name in one}
        inputs |= {name: torch.from_numpy(one[name])[None] for name in ("input_ids", "labels")}
        losses.append(learner.vora(**inputs, num_items_in_batch=1).loss)
    return torch.stack(losses)


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


def path_to(end, seen_until):
    """bool[B, T]: the tokens of the sample that ends there."""
    return (torch.arange(seen_until.shape[1]) <= end) & (end <= seen_until)


@FAMILIES
def test_questions_that_share_an_image_learn_as_they_would_alone(family):
    learner, samples = objective_of(family), questions()
    shared = share_prefixes(samples)
    assert (shared["input_ids"] == IMAGE).sum() == 6  # the image stands once
    batch = collate_sequences([[shared]], len(shared["input_ids"]) + 3, pad_token_id=0)

    alone = losses_of_samples(learner, samples)
    together = learner(**batch, num_items_in_batch=1)["loss"]
    torch.testing.assert_close(together, alone.sum(), rtol=1e-5, atol=0)
    for end, expected in zip(shared["ends"], alone):
        only = {**batch, "targets": batch["targets"].where(path_to(end, batch["seen_until"]), -100)}
        torch.testing.assert_close(learner(**only, num_items_in_batch=1)["loss"], expected, rtol=1e-5, atol=0)
    assert_same(gradients(learner, together), gradients(learner, alone.sum()))


@FAMILIES
def test_packed_sequences_learn_as_their_samples_would_alone(family):
    learner = objective_of(family)
    groups = [
        questions(0),
        [sample(*text(9, 3))],  # text only
        questions(1, count=2),
        [sample(*text(2, 4), (3, 3, 5), (2, 2, 6), *text(5, 5))],  # two images that touch
        [sample((2, 2, 7), *text(5, 6))],  # begins with its image, right after the one before
        [sample(*text(2, 7), (1, 2, 8), *text(2, 8), (2, 1, 9), *text(2, 9), (1, 1, 10), *text(4, 10))],  # many
        [sample(*text(1, 11), (2, 2, 11, 3), *text(4, 12))],  # a video of three frames
        [sample((1, 2, 12, 2), (1, 2, 13), *text(4, 13))],  # a video that touches an image
    ]
    shared = [share_prefixes(group) for group in groups]
    lengths, rows, left = [len(one["input_ids"]) for one in shared], [], list(range(len(groups)))
    while left:
        row = [left[i] for i in next_sequence([lengths[i] for i in left], 48)]
        rows.append(row)
        left = [i for i in left if i not in row]
    assert len(rows) < len(groups) - 3
    batch = collate_sequences([[shared[i] for i in row] for row in rows], 48, pad_token_id=0)
    together = learner(**batch, num_items_in_batch=1)["loss"]
    alone = losses_of_samples(learner, sum(groups, []))
    torch.testing.assert_close(together, alone.sum(), rtol=1e-5, atol=0)
    assert_same(gradients(learner, together), gradients(learner, alone.sum()))

    number = 0
    for index, group in enumerate(groups):  # each sample's own loss, by masking all others
        row = next(r for r, members in enumerate(rows) if index in members)
        start = sum(lengths[i] for i in rows[row][: rows[row].index(index)])
        for end in start + shared[index]["ends"]:
            own = torch.zeros_like(batch["targets"], dtype=torch.bool)
            own[row] = path_to(end, batch["seen_until"])[row] & (torch.arange(48) >= start)
            only = {**batch, "targets": batch["targets"].where(own, -100)}
            with torch.no_grad():
                found = learner(**only, num_items_in_batch=1)["loss"]
            torch.testing.assert_close(found, alone[number], rtol=1e-5, atol=0)
            number += 1


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
        expected, every = (lengths**-balance * alone).sum() / whole, alone.sum() / lengths.sum()
        if most:
            monkeypatch.setattr(label_loss, "MOST_LOGITS", most)  # each label's logits for themselves
        found = learner(**batch, label_weights=weights)
        torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(found["lm_loss"], every, rtol=1e-5, atol=0)  # tells the same whatever counts
        assert_same(gradients(learner, found["loss"]), gradients(learner, expected))


def test_answers_are_told_apart_by_where_they_stand():
    twice = sample(*text(3), (2, 3, 0), *text(12, 1), answer=0)
    twice["labels"][-9:-5], twice["labels"][-2:] = twice["input_ids"][-9:-5], twice["input_ids"][-2:]  # two turns
    silent = cut_text(share_prefixes([sample(*text(4))]), 48)
    row = [share_prefixes([twice]), share_prefixes([sample(*text(4), answer=4)])]
    batch = collate_sequences([row, [silent]], sum(len(one["input_ids"]) for one in row), pad_token_id=0)
    expected = [1 / 4] * 4 + [1 / 2] * 2 + [1 / 3] * 3  # a first token has nothing before it that could predict it
    torch.testing.assert_close(label_weights(batch, 1.0), torch.tensor(expected))
    nothing = {name: value[1:] for name, value in batch.items() if value.dim() == 2}
    assert label_weights(nothing, 1.0).shape == (0,)


@FAMILIES
def test_nothing_leaks_between_branches_and_documents(family):
    learner = objective_of(family)
    batch = collate_sequences(
        [[share_prefixes(questions(0)), share_prefixes(questions(1, count=2))]], 64, pad_token_id=0
    )
    del batch["targets"], batch["num_samples"]
    own = batch["seen_until"][0] == share_prefixes(questions(0))["ends"].min()  # one question's, without the image
    assert own.sum() >= 3
    before = states_of_blocks(learner.vora, **batch)
    for place in own.nonzero()[:, 0]:
        moved = {**batch, "input_ids": batch["input_ids"].clone()}
        moved["input_ids"][0, place] = 127 if moved["input_ids"][0, place] != 127 else 126
        for old, new in zip(before, states_of_blocks(learner.vora, **moved)):
            assert torch.equal(old[0, ~own], new[0, ~own])
            assert not torch.equal(old[0, place], new[0, place])


def test_branches_beyond_a_sliding_window_are_refused():
    learner = Objective(tiny_vora("mistral"), image_processor=None)  # a window of 6 tokens
    batch = collate_sequences([[share_prefixes(questions())]], 32, pad_token_id=0)
    with pytest.raises(ValueError, match="32 tokens .* window of 6"):
        learner(**batch)


def test_targets_are_the_next_labels_and_the_silent_end_is_dropped():
    one = {"input_ids": np.array([4, 5, 6, 7, 8]), "labels": np.array([-100, -100, 6, 7, -100])}
    found = next_targets(one)
    assert found["input_ids"].tolist() == [4, 5, 6] and found["targets"].tolist() == [-100, 6, 7]


def test_one_question_alone_is_all_trunk_up_to_its_first_prediction():
    shared = share_prefixes(questions(count=1))
    assert shared["position_ids"].tolist() == list(range(len(shared["input_ids"])))
    assert set(shared["seen_until"].tolist()) == {len(shared["input_ids"]) - 1}


def test_text_that_questions_begin_with_alike_stand_once():
    samples = [sample(*ids, answer=1) for ids in ([9, 8, 7, 40], [9, 8, 6, 41], [9, 5, 42], [9, 8, 7, 43])]
    shared = share_prefixes(samples)
    assert shared["input_ids"].tolist() == [9, 5, 8, 6, 7, 7]
    assert shared["position_ids"].tolist() == [0, 1, 1, 2, 2, 2]
    assert shared["seen_until"].tolist() == [5, 1, 5, 3, 4, 5]
    assert shared["targets"].tolist() == [-100, 42, -100, 41, 40, 43]  # 7 predicts, so it is not shared
    assert shared["ends"].tolist() == [4, 3, 1, 5] and shared["num_samples"] == 4


def test_same_question_twice_counts_twice():
    learner, samples = objective_of("llama"), questions(count=1) * 2
    batch = collate_sequences([[share_prefixes(samples)]], 40, pad_token_id=0)
    together = learner(**batch, num_items_in_batch=1)["loss"]
    torch.testing.assert_close(together, losses_of_samples(learner, samples).sum(), rtol=1e-5, atol=0)


def test_samples_of_the_processor_pack_as_well(llm_folder):
    """From messages to packed loss: the whole journey, but for files."""
    processor = VoraProcessor.from_llm(llm_folder, patch_size=PATCH, image_size=PATCH * GRID)
    vora = VoraForConditionalGeneration.from_llm(llm_folder, patch_size=PATCH, image_size=PATCH * GRID)
    learner = Objective(vora, processor.image_processor)
    red = Image.new("RGB", (12, 12), "red")

    def messages(question, answer):
        content = [{"type": "image", "image": red}, {"type": "text", "text": question}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]

    pairs = [("what colour is the shape?", "red"), ("Is there a circle?", "no"), ("what?", "a red square")]
    samples = [processor.training_sample(messages(*pair)) for pair in pairs]
    batch = collate_sequences([[share_prefixes(samples)]], 80, processor.tokenizer.pad_token_id)
    alone = losses_of_samples(learner, samples)
    torch.testing.assert_close(learner(**batch, num_items_in_batch=1)["loss"], alone.sum(), rtol=1e-5, atol=0)
    spoken = sum((one["labels"] != -100).sum() for one in samples)
    assert (batch["targets"] != -100).sum() == spoken


def test_a_row_takes_the_oldest_then_the_longest_that_fit():
    assert next_sequence([5, 6, 4, 3], 10) == [0, 2]
    assert next_sequence([5, 1, 2, 3], 10) == [0, 2, 3]
    assert next_sequence([10, 1], 10) == [0]


def test_conversations_whose_images_stand_elsewhere_share_nothing(llm_folder):
    processor = VoraProcessor.from_llm(llm_folder, patch_size=PATCH, image_size=PATCH * GRID)
    vora = VoraForConditionalGeneration.from_llm(llm_folder, patch_size=PATCH, image_size=PATCH * GRID)
    place, images = {"type": "image"}, [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]

    def request(*parts):
        parts = [place if part is None else {"type": "text", "text": part} for part in parts]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]

    conversations = [
        request(None, "is it", None),
        request("is", None, "like", None),
        request(None, "is it", None, "?"),
    ]
    whole = Sample("r", images, conversations)
    learner = Objective(vora, processor.image_processor)
    for chosen, num_copies in ((conversations, 3), (conversations[::2], 1)):
        one = tokenize_sample(whole, processor, chosen)
        assert len(one["image_grid_thw"]) == 2 * num_copies and one["num_samples"] == len(chosen)
        batch = collate_sequences([[one]], len(one["input_ids"]) + 3, 0)
        samples = [processor.training_sample(whole.messages(images, c)) for c in chosen]
        alone = losses_of_samples(learner, samples)
        torch.testing.assert_close(learner(**batch, num_items_in_batch=1)["loss"], alone.sum(), rtol=1e-5, atol=0)


def test_a_sample_that_predicts_nothing_is_refused():
    silent = {"input_ids": np.array([4, 5]), "labels": np.array([-100, -100])}
    with pytest.raises(ValueError, match="All labels of 1 of its 2 conversations are masked"):
        share_prefixes([sample(*text(5)), silent])


@FAMILIES
@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_by_segment_is_attention_in_rows(family, checkpointed, monkeypatch):
    monkeypatch.setattr(segmented_sdpa, "SHORT", 0)
    learner, found = objective_of(family), []
    rows = [[share_prefixes(questions(0)), share_prefixes([sample(*text(9, 3))])], [share_prefixes(questions(1, 1))]]
    batch = collate_sequences(rows, 64, pad_token_id=0)
    calls = []
    for attention in ("sdpa", SEGMENTED_SDPA):
        learner.vora.set_attn_implementation(attention)
        if checkpointed:
            learner.gradient_checkpointing_enable()
        learner.train()
        hook = learner.vora.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs["attention_mask"]), with_kwargs=True
        )
        losses = learner(**batch, num_items_in_batch=1)
        found.append({"loss": losses["loss"].detach(), **gradients(learner, losses["loss"])})
        hook.remove()
    assert_same(found[1], found[0])
    masks = [one if isinstance(one, torch.Tensor) else one["full_attention"] for one in calls]
    assert not hasattr(masks[0], "segments")
    lengths = [[s.queries.stop - s.queries.start for s in row] for row in masks[1].segments]
    assert lengths == [
        [len(one["input_ids"]) for one in row] + [64 - sum(len(o["input_ids"]) for o in row)] for row in rows
    ]
    assert all(segment.keys == segment.queries for row in masks[1].segments for segment in row)


@FAMILIES
def test_attention_by_segment_in_bf16_is_as_exact_as_sdpa(family, monkeypatch):
    """Both are compared with sdpa in float32."""
    monkeypatch.setattr(segmented_sdpa, "SHORT", 0)
    rows = [[share_prefixes(questions(0)), share_prefixes([sample(*text(9, 3))])], [share_prefixes(questions(1, 1))]]
    batch, found = collate_sequences(rows, 64, pad_token_id=0), {}
    for name, attention, bf16 in (("exact", "sdpa", False), ("sdpa", "sdpa", True), ("ours", SEGMENTED_SDPA, True)):
        learner = objective_of(family)
        learner.vora.set_attn_implementation(attention)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = learner(**batch, num_items_in_batch=1)["loss"]
        found[name] = gradients(learner, loss)

    def distance(name):
        parts = [(found[name][key] - exact).norm() / exact.norm() for key, exact in found["exact"].items()]
        return torch.stack(parts).mean()

    assert 0 < distance("ours") < 1.5 * distance("sdpa")


def test_trees_of_a_row():
    seen_until = torch.tensor([[3, 1, 3, 3, 5, 5, 6, 7, 8], [8, 8, 8, 8, 8, 8, 8, 8, 8]])
    assert trees(seen_until) == [[(0, 4), (4, 6), (6, 9)], [(0, 9)]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_never_waits_for_the_device(family):
    learner = objective_of(family)
    config = ViTConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, patch_size=PATCH
    )
    learner.set_teacher(Teacher(ViTModel(config, add_pooling_layer=False).requires_grad_(False)))
    learner.image_processor = VoraImageProcessor(patch_size=PATCH)
    learner.distillation = BlockwiseDistillation(block_pairs(3, 2), 32, 24)
    batch = collate_sequences([[share_prefixes(questions(0))], [share_prefixes(questions(1, 1))]], 64, pad_token_id=0)
    located = batch | places(batch, IMAGE)
    learner.train()
    without = learner(**batch)["loss"]
    with Waits() as waits:
        losses = learner(**located)
        losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(without.item(), rel=1e-3) and {"lm_loss", "distill_loss"} < set(
        losses
    )
    assert waits.found == []
    with Waits() as waits:
        learner(**batch)
    assert len(waits.found) > 2
    with pytest.raises(ValueError, match="image tokens"):
        places({**batch, "image_grid_thw": batch["image_grid_thw"][:1]}, IMAGE)
