"""The teacher's features on the student's grid, which block imitates which, and the loss."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import GRID, IMAGE, PATCH, SHAPE, prompt, states_of_blocks, text, tiny_llm, tiny_vora
from transformers import AutoConfig, AutoModel

import vora
from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, attach_vision_lora, merge_vision_lora
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import images_of_patches, resample_features

SIDE = PATCH * GRID
ONE = pytest.mark.parametrize("kind", ["vit"], indirect=True)
TINY = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 3}
TINY["patch_size"] = PATCH
SIZED = {**TINY, "image_size": SIDE, "initializer_range": 0.2}
# model_type: (configuration, tokens before the patches)
TEACHERS = {
    "vit": (SIZED, 1),
    "deit": (SIZED, 2),
    "clip_vision_model": (SIZED, 1),
    "siglip_vision_model": (SIZED, 0),
    "siglip2_vision_model": ({**TINY, "num_patches": GRID**2}, 0),
    "dinov2": (SIZED, 1),
    "dinov2_with_registers": ({**SIZED, "num_register_tokens": 3}, 4),
    "dinov3_vit": ({**SIZED, "num_register_tokens": 3}, 4),
    "aimv2_vision_model": (SIZED, 0),
}
RESAMPLES_FEATURES = ("aimv2_vision_model",)


@pytest.fixture(scope="module", params=TEACHERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def vit(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TEACHERS[kind][0])
    vit = AutoModel.from_config(config, attn_implementation="eager").eval()
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # also positions and CLS tokens that start at zero
    return vit


@pytest.fixture(scope="module")
def teacher(vit):
    return Teacher(copy.deepcopy(vit))


def noise_images(*grids):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, rows * PATCH, columns * PATCH, generator=generator) for rows, columns in grids]


def own_inputs(kind, pixels):
    """What the ViT itself takes, for normalised float[n, C, H, W]."""
    if kind != "siglip2_vision_model":
        return {"pixel_values": pixels}
    count, channels, height, width = pixels.shape
    rows, columns = height // PATCH, width // PATCH
    patches = pixels.reshape(count, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.reshape(count, rows * columns, -1),
        "pixel_attention_mask": torch.ones(count, rows * columns),
        "spatial_shapes": torch.tensor([[rows, columns]] * count),
    }


def test_features_are_the_vits_own_hidden_states_without_extra_tokens(kind, vit, teacher):
    grid = (GRID, GRID)
    images = noise_images(grid, grid)
    found = teacher(images, [grid, grid], [0, 2, 3])
    with torch.no_grad():
        own = vit(**own_inputs(kind, torch.stack(images) * 2 - 1), output_hidden_states=True).hidden_states
    assert own[0].shape[1] == GRID**2 + TEACHERS[kind][1]
    assert set(found) == {0, 2, 3}
    for block in (0, 2):  # entry i + 1 is the output of block i; the last one may be after the final norm
        expected = own[block + 1][:, TEACHERS[kind][1] :].flatten(0, 1)
        assert found[block].shape == (2 * GRID**2, 24)
        torch.testing.assert_close(found[block], expected, atol=1e-5, rtol=1e-5)


def test_other_grids_have_a_feature_per_patch_in_order(kind, teacher):
    grids = [(2, 5), (GRID, GRID), (4, 1), (2, 5)]
    images = noise_images(*grids)
    together = teacher(images, grids, [3])[3]
    assert together.shape == (10 + 9 + 4 + 10, 24) and together.isfinite().all()
    alone = [teacher([image], [grid], [3])[3] for image, grid in zip(images, grids)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_rows_and_columns_are_not_swapped(kind, teacher):
    """A bright patch moves the state at its own place most, in the first block, on a grid that is not square."""
    if kind in RESAMPLES_FEATURES:
        pytest.skip("its features are resampled, so a patch reaches its neighbours")
    grid, place = (2, 5), 7  # row 1, column 2
    dark = torch.zeros(3, 2 * PATCH, 5 * PATCH)
    bright = dark.clone()
    bright[:, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] = 1
    moved = (teacher([bright], [grid], [0])[0] - teacher([dark], [grid], [0])[0]).norm(dim=-1)
    assert moved.argmax() == place


def test_positions_are_resampled_not_the_features(kind, teacher):
    if kind in RESAMPLES_FEATURES:
        assert torch.equal(teacher(noise_images((GRID, GRID)), [(GRID, GRID)], [1])[1], own_size(teacher))
        return
    table = teacher.embedding.position
    assert (table is None) == (kind == "dinov3_vit")
    found = teacher(noise_images((4, 4)), [(4, 4)], [1])[1]
    square = teacher(noise_images((GRID, GRID)), [(GRID, GRID)], [1])[1][None]
    coarse = resample_features(square, (GRID, GRID), (4, 4))[0]
    assert not torch.allclose(found, coarse, atol=1e-2)


def own_size(teacher):
    pixels = teacher.resize(noise_images((GRID, GRID)), (GRID, GRID))
    return teacher.features_on_grid(pixels, (GRID, GRID), [1])[1][0]


def test_a_teacher_stays_in_eval_mode_and_without_gradients(teacher):
    holder = torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = noise_images((GRID, GRID))[0].requires_grad_()
    assert not teacher([pixels], [(GRID, GRID)], [0])[0].requires_grad


def test_the_students_patches_become_the_same_images_again():
    pixels = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    processor = VoraImageProcessor(patch_size=4, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    rounded = (pixels * 255).round() / 255
    inputs = processor(rounded.numpy(), return_tensors="pt")
    (image,) = images_of_patches(inputs["pixel_values"], [(2, 3)], 4, processor.image_mean, processor.image_std)
    torch.testing.assert_close(image, rounded, atol=1e-5, rtol=0)


def test_from_pretrained_reads_weights_and_normalisation(kind, vit, teacher, tmp_path):
    vit.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    loaded = Teacher.from_pretrained(str(tmp_path))
    assert (loaded.image_mean, loaded.image_std) == ([0.1] * 3, [0.2] * 3)
    assert (loaded.hidden_size, loaded.num_blocks, loaded.patch_size) == (24, 4, PATCH)
    loaded.image_mean, loaded.image_std = teacher.image_mean, teacher.image_std
    images, grids = noise_images((GRID, GRID)), [(GRID, GRID)]
    torch.testing.assert_close(loaded(images, grids, [1])[1], teacher(images, grids, [1])[1])


def test_fresh_eyes_start_as_the_teachers_own_embedding(kind, vit, teacher):
    vora = VoraForConditionalGeneration.from_llm(tiny_llm("llama"), teacher=teacher, image_token_id=IMAGE)
    assert vora.config.patch_size == PATCH and vora.config.vision_hidden_size == 24
    assert vora.config.grid_size == GRID
    eyes = vora.model.patch_embedding
    pixels = torch.stack(noise_images((GRID, GRID))) * 2 - 1
    inputs = own_inputs(kind, pixels)
    inputs.pop("pixel_attention_mask", None)
    with torch.no_grad():
        expected = vit.embeddings(**inputs)
        expected = expected[0] if isinstance(expected, tuple) else expected
        expected = expected[0, TEACHERS[kind][1] :]
        patches = pixels.reshape(3, GRID, PATCH, GRID, PATCH).permute(1, 3, 0, 2, 4).reshape(GRID**2, -1)
        found = eyes.norm(eyes.patch(patches))
        if kind == "dinov3_vit":
            assert eyes.position.std() > 0  # rotary: nothing to copy, so they start at random
        else:
            found = found + eyes.positions([(1, GRID, GRID)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_sizes_that_do_not_fit_the_teacher(teacher):
    with pytest.raises(ValueError, match=f"patch_size 7 .* {PATCH} pixels"):
        VoraForConditionalGeneration.from_llm(tiny_llm("llama"), teacher=teacher, patch_size=7, image_token_id=IMAGE)
    larger = VoraForConditionalGeneration.from_llm(
        tiny_llm("llama"), teacher=teacher, image_size=2 * SIDE, image_token_id=IMAGE
    )
    assert larger.model.patch_embedding.position.shape == (4 * GRID**2, 24)


NO_VITS = {
    "convnext": {"depths": [1] * 4, "hidden_sizes": [8] * 4},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
    "llama": SHAPE,
}


@pytest.mark.parametrize("family", NO_VITS)
def test_what_is_no_plain_vit_is_refused(family):
    other = AutoModel.from_config(AutoConfig.for_model(family, **NO_VITS[family]))
    with pytest.raises(ValueError, match="only plain ViTs"):
        Teacher(other)


# Which block imitates which


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


@pytest.mark.parametrize("students", range(1, 13))
@pytest.mark.parametrize("teachers", range(1, 13))
def test_spread_pairs_ascend_and_end_with_last_to_last(students, teachers):
    pairs = block_pairs(students, teachers, spread=True)
    assert len(pairs) == min(students, teachers) and pairs[-1] == (students - 1, teachers - 1)
    for mine, theirs in zip(*[iter(zip(*pairs))] * 2):
        assert list(mine) == sorted(set(mine)) and list(theirs) == sorted(set(theirs))


# The loss


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


@ONE
def test_the_summary_is_the_cls_token_at_every_token_of_its_own_image(learner_with_summary):
    learner, inputs = learner_with_summary, batch()
    taught = learner.teach(inputs["pixel_values"], inputs["image_grid_thw"])
    sizes = inputs["image_grid_thw"].prod(-1).tolist()
    first, second = taught[SUMMARY].split(sizes)
    assert torch.equal(first, first[:1].expand_as(first)) and torch.equal(second, second[:1].expand_as(second))
    assert not torch.equal(first[0], second[0])
    grids, processor = [tuple(grid[1:]) for grid in inputs["image_grid_thw"].tolist()], learner.image_processor
    pixels = images_of_patches(inputs["pixel_values"], grids, PATCH, processor.image_mean, processor.image_std)
    pixels = learner.teacher.resize(pixels[:1], grids[0])
    said = learner.teacher.vit(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(first[0], said[0, 0])
    losses = learner(**batch())
    assert losses["pair_losses"].shape == (4,) and learner.distillation.pairs[-1] == (2, SUMMARY)
    losses["loss"].backward()
    assert learner.distillation.heads[SUMMARY][1].weight.grad.abs().sum() > 0


def test_a_teacher_in_bf16_teaches_what_it_teaches_in_float32():
    """The quickstart's, which is trained; a student half way there."""
    folder = Path(vora.__file__).parent / "quickstart" / "teacher"
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 4, 4, generator=generator)
    images, grids = (
        list(torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)),
        [(4, 4)] * 12,
    )
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


# The student with its scaffolding


@pytest.fixture
def learner(teacher):
    student = attach_vision_lora(tiny_vora("llama"), rank=2)
    distillation = BlockwiseDistillation(block_pairs(3, 4), SHAPE["hidden_size"], teacher.hidden_size)
    processor = VoraImageProcessor(patch_size=PATCH)
    torch.manual_seed(3)
    return Objective(student, processor, teacher, distillation, distill_weight=0.5)


@pytest.fixture
def learner_with_summary(teacher):
    student = attach_vision_lora(tiny_vora("llama"), rank=2)
    pairs = [*block_pairs(3, 4), (2, SUMMARY)]
    distillation = BlockwiseDistillation(pairs, SHAPE["hidden_size"], teacher.hidden_size, standardize=True)
    return Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation)


def batch():
    inputs = prompt([*text(3), (2, 3, 0), (3, 3, 1), *text(4, 2)])
    inputs["targets"] = torch.cat([inputs["input_ids"][:, 1:], torch.full((1, 1), -100)], 1)
    inputs["targets"][:, :17] = -100
    return inputs


@ONE
def test_losses_are_named_and_summed_once(learner):
    losses = learner(**batch())
    assert set(losses) == {"loss", "lm_loss", "distill_loss", "pair_losses"}
    torch.testing.assert_close(losses["loss"], losses["lm_loss"] + 0.5 * losses["distill_loss"])
    torch.testing.assert_close(losses["pair_losses"].mean(), losses["distill_loss"].detach())
    assert losses["pair_losses"].shape == (3,)
    inputs = batch()
    labels = torch.nn.functional.pad(inputs.pop("targets")[:, :-1], (1, 0), value=-100)
    torch.testing.assert_close(learner.vora(**inputs, labels=labels).loss, losses["lm_loss"])


@ONE
def test_gradients_reach_lora_eyes_and_heads_and_nothing_else(learner):
    learner(**batch())["loss"].backward()
    for name, parameter in learner.named_parameters():
        trains = "lora_" in name or ".patch_embedding.modules_to_save." in name or name.startswith("distillation")
        assert (parameter.grad is not None) == trains == parameter.requires_grad, name
    assert all(parameter.grad is None for parameter in learner.teacher.parameters())


@ONE
def test_student_and_teacher_are_compared_patch_by_patch(learner):
    inputs = batch()
    inputs.pop("targets")
    seen = {}
    learner.distillation.forward = lambda student, teacher: seen.update(student=student, teacher=teacher) or (0, 0)
    learner(**batch())
    is_image = inputs["input_ids"] == IMAGE
    for block, states in enumerate(states_of_blocks(learner.vora, **inputs)):
        torch.testing.assert_close(seen["student"][block], states[is_image])
    grids = [(2, 3), (3, 3)]
    images = images_of_patches(inputs["pixel_values"], grids, PATCH, [0.5] * 3, [0.5] * 3)
    for block, features in learner.teacher(images, grids, [0, 1, 2]).items():
        torch.testing.assert_close(seen["teacher"][block], features)


@ONE
def test_teacher_and_heads_never_enter_a_saved_model(learner, tmp_path):
    assert not any("teacher" in name or "vit" in name for name in learner.state_dict())
    merged = merge_vision_lora(learner.student)
    merged.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "model.safetensors"))
    fresh = set(tiny_vora("llama").state_dict())
    assert saved and saved <= fresh


def count_runs(learner):
    """list of how often each block of the LLM computes, recomputation included, from now on."""
    counts = [0] * len(learner.vora.model.blocks)
    for block, module in enumerate(learner.vora.model.blocks):

        def count(*_, block=block):
            counts[block] += 1

        module.self_attn.register_forward_pre_hook(count)
    return counts


@ONE
@pytest.mark.parametrize("num_blocks", [0, 4])
def test_as_many_blocks_as_there_are_can_be_checkpointed(learner, num_blocks):
    with pytest.raises(ValueError, match=f"{num_blocks} blocks .* the LLM has 3"):
        learner.gradient_checkpointing_enable(num_blocks=num_blocks)


@ONE
@pytest.mark.parametrize("num_blocks", [None, 1, 2])
@pytest.mark.parametrize("distill_only", [False, True])
def test_checkpointed_blocks_learn_the_same(learner, distill_only, num_blocks):
    inputs, found = batch(), []
    if distill_only:
        inputs["targets"].fill_(-100)
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    learner.train()
    for checkpointed in (False, True):
        if checkpointed:
            learner.gradient_checkpointing_enable(num_blocks=num_blocks)
            ran = count_runs(learner)
        learner.zero_grad()
        learner.distillation.num_updates.zero_()
        learner(**inputs)["loss"].backward()
        found.append({name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None})
    assert learner.distillation.recomputes
    assert ran == [2 if num_blocks is None or block < num_blocks else 1 for block in range(3)]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("center", "standardize"), [(True, True), (True, False), (False, False)])
def test_features_come_back_from_their_target(center, standardize):
    distillation, pair = BlockwiseDistillation([(0, 0)], 8, 6, center, standardize), (0, 0)
    features = 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 5
    distillation({0: torch.randn(50, 8)}, {0: features})  # moments
    torch.testing.assert_close(distillation.features_of(pair, distillation.target(pair, features)), features)
