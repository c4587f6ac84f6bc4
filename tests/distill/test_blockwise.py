"""Which block imitates which, and how well."""

import doctest
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vora
from vora import Teacher
from vora.distill import blockwise
from vora.distill.blockwise import BlockwiseDistillation, block_pairs


def test_block_pairs():
    """The docstring has examples of each kind."""
    assert block_pairs(30, 2) == block_pairs(2, 24) == [(0, 0), (1, 1)]
    assert block_pairs(6, 3, spread=True) == [(1, 0), (3, 1), (5, 2)]
    assert doctest.testmod(blockwise) == (0, 4)
    for students, teachers in product(range(1, 13), repeat=2):
        pairs = block_pairs(students, teachers, spread=True)
        assert len(pairs) == min(students, teachers) and pairs[-1] == (students - 1, teachers - 1)
        for blocks in zip(*pairs):
            assert list(blocks) == sorted(set(blocks))


def states(*seeds, tokens=50, size=8):
    return {i: torch.randn(tokens, size, generator=torch.Generator().manual_seed(s)) for i, s in enumerate(seeds)}


def perfect(size, pairs=((0, 0),), **options):
    """A distillation whose heads give back what they are given, up to its length, which a cosine ignores."""
    distillation = BlockwiseDistillation(pairs, size, size, **options)
    for head in distillation.heads.values():
        torch.nn.init.eye_(head[1].weight)
        torch.nn.init.zeros_(head[1].bias)
    return distillation


def test_the_loss_is_0_for_a_perfect_student_1_for_an_unrelated_and_2_for_an_opposite_one():
    distillation, teacher = perfect(8, [(0, 1), (1, 0)], center=False), states(0, 1)
    for sign, expected in ((1, [0.0, 0.0]), (-1, [0.0, 2.0])):
        loss, pairs = distillation({0: teacher[1], 1: sign * teacher[0]}, teacher)
        torch.testing.assert_close(pairs, torch.tensor(expected), atol=1e-6, rtol=0)
        torch.testing.assert_close(loss, pairs.mean())
    unrelated, _ = distillation(states(1, 2, tokens=5000), states(3, 4, tokens=5000))
    assert abs(unrelated - 1) < 0.05


def test_the_loss_has_gradients_for_students_and_heads_only():
    distillation = BlockwiseDistillation([(0, 0)], 8, 6)
    student, teacher = states(0)[0].requires_grad_(), states(1, size=6)[0].requires_grad_()
    distillation({0: student}, {0: teacher.detach()})[0].backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in distillation.heads.parameters())


def test_the_running_mean_is_that_of_the_teachers_channels_and_is_subtracted():
    distillation = perfect(8).train()
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
    assert distillation({0: features - before}, {0: features})[0] < 1e-5
    plain = perfect(8, center=False)
    assert plain({0: common.expand(50, 8)}, {0: features})[0] < 0.01  # which is why the mean goes


def test_standardized_channels_count_alike():
    distillation = perfect(8, standardize=True).train()
    scale, common = torch.tensor([300.0, 1, 1, 1, 1, 1, 1, 1]), 5.0  # one channel holds nearly all of the variance
    for seed in range(8):
        batch = scale * states(seed, tokens=400)[0] + common
        distillation({0: batch}, {0: batch})
    torch.testing.assert_close(distillation.variance_0.sqrt(), scale, rtol=0.1, atol=0)
    features = scale * states(9, tokens=400)[0] + common
    first_alone = torch.zeros_like(features)
    first_alone[:, 0] = features[:, 0] - common
    centered = perfect(8)
    centered.mean_0.fill_(common)
    assert centered.eval()({0: first_alone}, {0: features})[0] < 0.05  # the one channel is enough for a perfect score
    assert distillation.eval()({0: first_alone}, {0: features})[0] > 0.5
    wanted = (features - distillation.mean_0) / distillation.variance_0.sqrt()
    assert distillation({0: wanted}, {0: features})[0] < 1e-4
    with pytest.raises(ValueError, match="center"):
        BlockwiseDistillation([(0, 0)], 8, 8, center=False, standardize=True)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_running_variance_is_that_of_all_features_so_far(micro_batches):
    """Of steps whose means lie far apart, after each of the first ones; later ones count by momentum."""
    distillation, seen = perfect(8, standardize=True, momentum=0.75).train(), []
    for step in range(6):
        batches = [states(10 * step + n)[0] + 3 * step for n in range(micro_batches)]
        if step == 0:  # as the trainer does
            distillation.begin([{0: batch} for batch in batches])
        for batch in batches:
            distillation({0: batch}, {0: batch}, micro_batches)
        seen.append(torch.cat(batches))
        weights = torch.tensor([1.0])
        for number in range(2, step + 2):
            new = max(1 / number, 0.25)
            weights = torch.cat([weights * (1 - new), torch.tensor([new])])
        mean = sum(w * one.mean(0) for w, one in zip(weights, seen))
        variance = sum(w * (one - mean).square().mean(0) for w, one in zip(weights, seen))
        torch.testing.assert_close(distillation.mean_0, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(distillation.variance_0, variance, rtol=1e-4, atol=1e-5)
        if step == 3:  # all alike until then
            torch.testing.assert_close(variance, torch.cat(seen).var(0, correction=0))


def test_a_teacher_in_bf16_teaches_what_it_teaches_in_float32():
    """The quickstart's, which is trained; a student half way there."""
    folder, generator = Path(vora.__file__).parent / "quickstart" / "teacher", torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 4, 4, generator=generator)
    images, grids = list(F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)), [(4, 4)] * 12
    dtypes = torch.float32, torch.bfloat16
    exact, rounded = (Teacher.from_pretrained(folder, dtype)(images, grids, range(5)) for dtype in dtypes)
    distillation = perfect(96, [(i, i) for i in range(5)]).train()
    with torch.no_grad():
        distillation(exact, exact)  # finds the means
    distillation.eval()
    wanted = {i: features - getattr(distillation, f"mean_{i}") for i, features in exact.items()}
    noise = {i: f + f.std() * torch.randn(f.shape, generator=generator) for i, f in wanted.items()}
    for student in (wanted, noise):
        (loss, pairs), (other, others) = (distillation(student, teacher) for teacher in (exact, rounded))
        assert abs(other - loss) < 2e-4 and (others - pairs).abs().max() < 5e-4
    assert 0.2 < loss < 0.4 and rounded[0].dtype == torch.bfloat16
