"""Which block imitates which, and how well."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vora
from vora import Teacher
from vora.distill.blockwise import BlockwiseDistillation, block_pairs


@pytest.mark.parametrize(
    "students, teachers, spread, expected",
    [
        (3, 3, False, [(0, 0), (1, 1), (2, 2)]),
        (30, 2, False, [(0, 0), (1, 1)]),
        (2, 24, False, [(0, 0), (1, 1)]),
        (3, 6, True, [(0, 1), (1, 3), (2, 5)]),
        (6, 3, True, [(1, 0), (3, 1), (5, 2)]),
        (4, 4, True, [(0, 0), (1, 1), (2, 2), (3, 3)]),
    ],
)
def test_block_pairs(students, teachers, spread, expected):
    assert block_pairs(students, teachers, spread) == expected


def test_spread_pairs_ascend_and_end_with_last_to_last():
    for students, teachers in product(range(1, 13), repeat=2):
        pairs = block_pairs(students, teachers, spread=True)
        assert len(pairs) == min(students, teachers) and pairs[-1] == (students - 1, teachers - 1)
        for blocks in zip(*pairs):
            assert list(blocks) == sorted(set(blocks))


def states(*seeds, tokens=50, size=8):
    return {i: torch.randn(tokens, size, generator=torch.Generator().manual_seed(s)) for i, s in enumerate(seeds)}


def perfect_heads(distillation):
    """Heads that give back what they are given, up to its length, which a cosine ignores."""
    for head in distillation.heads.values():
        torch.nn.init.eye_(head[1].weight)
        torch.nn.init.zeros_(head[1].bias)


def test_the_loss_is_0_for_a_perfect_student_1_for_an_unrelated_and_2_for_an_opposite_one():
    distillation = BlockwiseDistillation([(0, 1), (1, 0)], 8, 8, center=False)
    perfect_heads(distillation)
    teacher = states(0, 1)
    loss, pairs = distillation({0: teacher[1], 1: teacher[0]}, teacher)
    assert loss.abs() < 1e-6 and pairs.abs().max() < 1e-6
    loss, pairs = distillation({0: teacher[1], 1: -teacher[0]}, teacher)
    torch.testing.assert_close(pairs, torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, torch.tensor(1.0))
    big = states(3, 4, tokens=5000)
    unrelated, _ = distillation(states(1, 2, tokens=5000), big)
    assert abs(unrelated - 1) < 0.05


def test_the_loss_has_gradients_for_students_and_heads_only():
    distillation = BlockwiseDistillation([(0, 0)], 8, 6)
    student, teacher = states(0)[0].requires_grad_(), states(1, size=6)[0].requires_grad_()
    distillation({0: student}, {0: teacher.detach()})[0].backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in distillation.heads.parameters())


def test_the_running_mean_is_that_of_the_teachers_channels_and_is_subtracted():
    distillation = BlockwiseDistillation([(0, 0)], 8, 8).train()
    perfect_heads(distillation)
    common = 100 * torch.arange(8.0)
    batches = [states(seed)[0] + common for seed in range(5)]
    for batch in batches:
        distillation({0: batch}, {0: batch})
    torch.testing.assert_close(distillation.mean_0, torch.stack(batches).mean((0, 1)))
    features = states(9)[0] + common
    predicts_the_mean, _ = distillation.eval()({0: common.expand(50, 8)}, {0: features})
    assert predicts_the_mean > 0.8  # no credit for the common part
    before = distillation.mean_0.clone()
    distillation({0: features}, {0: features + 1})
    assert torch.equal(distillation.mean_0, before)  # evaluation moves nothing
    perfect, _ = distillation({0: features - before}, {0: features})
    assert perfect < 1e-5
    plain = BlockwiseDistillation([(0, 0)], 8, 8, center=False)
    perfect_heads(plain)
    assert plain({0: common.expand(50, 8)}, {0: features})[0] < 0.01  # which is why the mean goes


def test_standardized_channels_count_alike():
    distillation = BlockwiseDistillation([(0, 0)], 8, 8, standardize=True).train()
    perfect_heads(distillation)
    scale, common = torch.tensor([300.0, 1, 1, 1, 1, 1, 1, 1]), 5.0  # one channel holds nearly all of the variance
    batches = [scale * states(seed, tokens=400)[0] + common for seed in range(8)]
    for batch in batches:
        distillation({0: batch}, {0: batch})
    torch.testing.assert_close(distillation.variance_0.sqrt(), scale, rtol=0.1, atol=0)
    features = scale * states(9, tokens=400)[0] + common
    first_alone = torch.zeros_like(features)
    first_alone[:, 0] = features[:, 0] - common
    centered = BlockwiseDistillation([(0, 0)], 8, 8)
    perfect_heads(centered)
    centered.mean_0.fill_(common)
    assert centered.eval()({0: first_alone}, {0: features})[0] < 0.05  # the one channel is enough for a perfect score
    assert distillation.eval()({0: first_alone}, {0: features})[0] > 0.5
    perfect = (features - distillation.mean_0) / distillation.variance_0.sqrt()
    assert distillation({0: perfect}, {0: features})[0] < 1e-4
    with pytest.raises(ValueError, match="center"):
        BlockwiseDistillation([(0, 0)], 8, 8, center=False, standardize=True)


def test_a_teacher_in_bf16_teaches_what_it_teaches_in_float32():
    """The quickstart's, which is trained; a student half way there."""
    folder = Path(vora.__file__).parent / "quickstart" / "teacher"
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 4, 4, generator=generator)
    images, grids = list(F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)), [(4, 4)] * 12
    exact, rounded = (Teacher.from_pretrained(folder, dtype)(images, grids, range(5))
                      for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    assert {features.dtype for features in rounded.values()} == {torch.bfloat16}
    distillation = BlockwiseDistillation([(i, i) for i in range(5)], 96, 96).train()
    perfect_heads(distillation)
    distillation(exact, exact)  # finds the means
    distillation.eval()
    means = {i: getattr(distillation, f"mean_{i}") for i in exact}
    perfect = {i: features - means[i] for i, features in exact.items()}
    noise = {i: f + f.std() * torch.randn(f.shape, generator=generator) for i, f in perfect.items()}
    for student in (perfect, noise):
        (loss, pairs), (other, others) = (distillation(student, teacher) for teacher in (exact, rounded))
        assert abs(other - loss) < 2e-4 and (others - pairs).abs().max() < 5e-4
    assert 0.2 < loss < 0.4


@pytest.mark.parametrize(("center", "standardize"), [(True, True), (True, False), (False, False)])
def test_features_come_back_from_their_target(center, standardize):
    distillation, pair = BlockwiseDistillation([(0, 0)], 8, 6, center, standardize), (0, 0)
    features = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 5
    distillation({0: torch.randn(50, 8)}, {0: features})  # moments
    torch.testing.assert_close(distillation.features_of(pair, distillation.target(pair, features)), features)
