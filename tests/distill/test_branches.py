"""Images in one row learn what they learn packed, of every family that takes them so."""

import pytest
import torch
from packed import sample
from tiny import FAMILIES, IMAGE, PATCH, SHAPE, text, tiny_vora
from tiny_teachers import tiny_vit
from torch import nn

from vora import Teacher, VoraImageProcessor, attach_vision_lora
from vora.data.packing import (
    collate_sequences,
    cut_after_images,
    images_in_branches,
    places,
    places_of_text,
    share_prefixes,
    without_targets,
)
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.branches import Branches, mask_of_branches, takes_branches
from vora.distill.objective import Objective
from vora.model.segmented_sdpa import SEGMENTED_SDPA, segmented_sdpa

LENGTH = 40
REFUSED = {"gemma2"}  # attends eagerly


def objective_of(family, attention=SEGMENTED_SDPA, **changes):
    student = attach_vision_lora(tiny_vora(family), rank=2)
    if family not in REFUSED:
        student.get_base_model().set_attn_implementation(attention)
    student.get_base_model().config.update(changes)
    torch.manual_seed(4)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    pairs = [*block_pairs(2, 2), (1, SUMMARY)]
    distillation = BlockwiseDistillation(pairs, SHAPE["hidden_size"], 24, center=False)
    teacher = Teacher(tiny_vit("vit", num_hidden_layers=2))
    return Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation, 1.0, 0.5).eval()


def seen(*parts):
    """A sample cut after its image."""
    return cut_after_images(share_prefixes([sample(*parts, *text(3, 9))]), IMAGE)


def images(beginning=2):
    """Sequences of images of three sizes, of which two have as many tokens."""
    sizes = [(2, 3), (3, 3), (3, 2), (2, 3)]
    made = [seen(*text(beginning), (*size, seed)) for seed, size in enumerate(sizes)]
    return [made[:2], made[2:]]


def texts():
    return [[without_targets(share_prefixes([sample(*text(length, length))]), LENGTH)] for length in (9, 14)]


def step(objective, batch):
    objective.zero_grad()
    losses = objective(**batch)
    losses["loss"].backward()
    return losses, {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("beginning", [2, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_learns_what_packed_sequences_do(family, beginning):
    objective, sequences = objective_of(family), [*images(beginning), *texts()]
    packed = collate_sequences(sequences, LENGTH, 0) | places_of_text(sequences, LENGTH)
    row = images_in_branches(sequences, LENGTH, IMAGE, 0)
    assert row["branches"].tolist() == [[3, 6], [1, 9]] and row["input_ids"].shape == (1, beginning + 27)
    assert row["num_samples"] == packed["num_samples"] == 6 and len(row["text_places"]) == 21
    expected = FAMILIES[family].get("sliding_window", LENGTH) >= LENGTH and family not in REFUSED
    assert takes_branches(objective, LENGTH) == expected
    if expected:
        (losses, gradients), (found, same) = (step(objective, b) for b in (packed | places(packed, IMAGE), row))
        assert losses["distill_loss"] > 0.1 and losses["text_loss"] > 1e-4
        for name in losses:
            torch.testing.assert_close(found[name], losses[name], rtol=1e-5, atol=1e-6)
        assert gradients.keys() == same.keys()
        for name, gradient in gradients.items():
            assert (same[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_what_is_more_than_a_beginning_and_one_image_is_packed():
    first = images()
    for other in (
        seen(*text(2), (2, 3, 0), (2, 3, 1)),
        seen(*text(2, 5), (2, 3, 0)),
        seen(*text(3), (2, 3, 0)),
        share_prefixes([sample(*text(2), (2, 3, 0), *text(3))]),
    ):
        assert images_in_branches([*first, [other]], LENGTH, IMAGE, 0) is None
    assert images_in_branches(texts(), LENGTH, IMAGE, 0) is None
    predicting = [share_prefixes([sample(*text(9))])]
    assert images_in_branches([*first, predicting], LENGTH, IMAGE, 0) is None


def test_other_rules_of_attention_keep_their_packed_sequences():
    assert takes_branches(objective_of("llama"), LENGTH)
    assert not takes_branches(objective_of("llama", "sdpa"), LENGTH)
    assert not takes_branches(objective_of("llama", image_attention="causal"), LENGTH)


@pytest.mark.parametrize("bf16", [False, True])
def test_values_may_be_narrower_and_attention_may_drop(bf16):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 8, 6), torch.randn(1, 2, 8, 6), torch.randn(1, 2, 8, 5)
    mask = mask_of_branches(Branches(2, [(2, 3)]), query.device)
    sees = torch.ones(8, 8, dtype=torch.bool).tril()
    sees[2:5, 2:5] = sees[5:, 5:] = True
    sees[5:, 2:5] = False
    attend = nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found, _ = segmented_sdpa(nn.Module(), query, key, value, mask)
        dropped, _ = segmented_sdpa(nn.Module(), query, key, value, mask, dropout=0.5)
    expected = attend(query, key, value, sees, enable_gqa=True).transpose(1, 2)
    assert found.is_contiguous() and not torch.equal(found, dropped)
    torch.testing.assert_close(found.float(), expected, atol=0.05 if bf16 else 1e-5, rtol=0.05 if bf16 else 1e-5)
