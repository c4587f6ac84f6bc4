"""What a teacher gives: features of every patch of the student's grid, in their order."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import GRID, IMAGE, PATCH, SHAPE, prompt, text, tiny_llm, tiny_vora
from tiny_teachers import TEACHERS, tiny_vit
from transformers import AutoConfig, AutoModel

from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, attach_vision_lora
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation
from vora.distill.objective import Objective
from vora.distill.teacher import images_of_patches, resample_features

SIDE = PATCH * GRID
SQUARE = (GRID, GRID)


@pytest.fixture(scope="module", params=TEACHERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def vit(kind):
    vit = tiny_vit(kind)
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
    assert not any(module.training for module in torch.nn.ModuleList([teacher]).train()[0].modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = noise_images(SQUARE, SQUARE)
    found = teacher([image.requires_grad_() for image in images], [SQUARE, SQUARE], [0, 2, 3])
    assert not found[0].requires_grad
    with torch.no_grad():
        own = vit(**own_inputs(kind, torch.stack(images) * 2 - 1), output_hidden_states=True).hidden_states
    assert own[0].shape[1] == GRID**2 + TEACHERS[kind][1]
    assert set(found) == {0, 2, 3}
    for block in (0, 2):  # entry i + 1 is the output of block i; the last one may be after the final norm
        expected = own[block + 1][:, TEACHERS[kind][1] :].flatten(0, 1)
        assert found[block].shape == (2 * GRID**2, 24)
        torch.testing.assert_close(found[block], expected, atol=1e-5, rtol=1e-5)


def test_other_grids_have_a_feature_per_patch_in_order(kind, teacher):
    grids = [(2, 5), SQUARE, (4, 1), (2, 5)]
    images = noise_images(*grids)
    together = teacher(images, grids, [3])[3]
    assert together.shape == (10 + 9 + 4 + 10, 24) and together.isfinite().all()
    alone = [teacher([image], [grid], [3])[3] for image, grid in zip(images, grids)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_teacher_in_bf16_sees_grids_that_are_not_its_own(kind, teacher):
    """Of aimv2 the image is resampled, which a processor does in float32 alone."""
    found = copy.deepcopy(teacher).to(torch.bfloat16)(noise_images(SQUARE), [SQUARE], [1])[1].float()
    torch.testing.assert_close(found, teacher(noise_images(SQUARE), [SQUARE], [1])[1], atol=0.1, rtol=0.1)


def test_positions_are_resampled_and_rows_and_columns_are_not_swapped(kind, teacher):
    """A bright patch moves the state at its own place most, in the first block, on a grid that is not square."""
    square = teacher(noise_images(SQUARE), [SQUARE], [1])[1]
    if kind == "aimv2_vision_model":  # its features are resampled, so that a patch reaches its neighbours
        pixels = teacher.resize(noise_images(SQUARE), SQUARE)
        assert torch.equal(square, teacher.features_on_grid(pixels, SQUARE, [1])[1][0])
        return
    assert (teacher.embedding.position is None) == (kind == "dinov3_vit")
    found = teacher(noise_images((4, 4)), [(4, 4)], [1])[1]
    assert not torch.allclose(found, resample_features(square[None], SQUARE, (4, 4))[0], atol=1e-2)
    dark = torch.zeros(3, 2 * PATCH, 5 * PATCH)
    bright = dark.clone()
    bright[:, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] = 1
    moved = (teacher([bright], [(2, 5)], [0])[0] - teacher([dark], [(2, 5)], [0])[0]).norm(dim=-1)
    assert moved.argmax() == 7  # row 1, column 2


def test_the_students_patches_become_the_same_images_again():
    pixels = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0))
    processor = VoraImageProcessor(patch_size=4, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    rounded = (pixels * 255).round() / 255
    inputs = processor(rounded.numpy(), return_tensors="pt")
    (image,) = images_of_patches(inputs["pixel_values"], [(2, 3)], 4, processor.image_mean, processor.image_std)
    torch.testing.assert_close(image, rounded, atol=1e-5, rtol=0)


def test_from_pretrained_reads_weights_and_normalisation(vit, teacher, tmp_path):
    vit.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    loaded = Teacher.from_pretrained(str(tmp_path))
    assert (loaded.image_mean, loaded.image_std) == ([0.1] * 3, [0.2] * 3)
    assert (loaded.hidden_size, loaded.num_blocks, loaded.patch_size) == (24, 4, PATCH)
    loaded.image_mean, loaded.image_std = teacher.image_mean, teacher.image_std
    found, expected = (one(noise_images(SQUARE), [SQUARE], [1])[1] for one in (loaded, teacher))
    torch.testing.assert_close(found, expected)


def test_weights_that_are_missing_are_named_but_for_a_pooler(vit, tmp_path, caplog):
    vit.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    Teacher.from_pretrained(tmp_path)
    assert "REPORT" not in caplog.text
    gone = next(name for name in kept if "layer" in name and name.endswith("weight"))
    save_file({name: kept[name] for name in kept if name != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of its weights, such as .*: copy or fetch its files again"):
        Teacher.from_pretrained(tmp_path)


def test_a_fresh_patch_embedding_starts_as_the_teachers_own(kind, vit, teacher):
    how = {"teacher": teacher, "image_token_id": IMAGE}
    vora = VoraForConditionalGeneration.from_llm(tiny_llm("llama"), **how)
    assert vora.config.patch_size == PATCH and vora.config.vision_hidden_size == 24
    assert vora.config.grid_size == GRID
    embedding = vora.model.patch_embedding
    pixels = torch.stack(noise_images(SQUARE)) * 2 - 1
    inputs = own_inputs(kind, pixels)
    inputs.pop("pixel_attention_mask", None)
    with torch.no_grad():
        expected = vit.embeddings(**inputs)
        expected = expected[0] if isinstance(expected, tuple) else expected
        patches = pixels.reshape(3, GRID, PATCH, GRID, PATCH).permute(1, 3, 0, 2, 4).reshape(GRID**2, -1)
        found = embedding.norm(embedding.patch(patches))
        if kind == "dinov3_vit":
            assert embedding.position.std() > 0  # rotary: nothing to copy, so they start at random
        else:
            found = found + embedding.positions([(1, GRID, GRID)])
    torch.testing.assert_close(found, expected[0, TEACHERS[kind][1] :], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"patch_size 7 .* {PATCH} pixels"):
        VoraForConditionalGeneration.from_llm(tiny_llm("llama"), patch_size=7, **how)
    larger = VoraForConditionalGeneration.from_llm(tiny_llm("llama"), image_size=2 * SIDE, **how)
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


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("yolos", {"image_size": [SIDE, SIDE], "num_detection_tokens": 5}, "move the feature of another one"),
        ("timesformer", {}, "it takes no plain images"),
    ],
)
def test_a_vit_whose_features_are_not_its_patches_is_refused(kind, changes, message):
    with pytest.raises(ValueError, match=f"{message}.*must give one feature for each patch, in raster order"):
        Teacher(tiny_vit(kind, **changes))


class MeanColours(torch.nn.Module):
    """A teacher that is no ViT at all: of each patch its mean colour."""

    name, hidden_size, num_blocks, patch_size, image_mean, image_std = None, 3, 1, PATCH, [0.5] * 3, [0.5] * 3
    device = torch.device("cpu")

    def forward(self, images, grids, blocks):
        patches = [F.avg_pool2d(image, PATCH).flatten(1).T for image in images]
        return {0: torch.cat(patches), SUMMARY: torch.stack([one.mean(0) for one in patches])}


def test_whatever_gives_what_the_protocol_says_can_teach():
    student, processor = attach_vision_lora(tiny_vora("llama"), rank=2), VoraImageProcessor(patch_size=PATCH)
    distillation = BlockwiseDistillation([(1, 0), (1, SUMMARY)], SHAPE["hidden_size"], 3, center=False)
    objective = Objective(student, processor, MeanColours(), distillation)
    inputs = prompt([*text(3), (2, 3, 0), (3, 3, 1)])
    targets = objective.teach(inputs["pixel_values"], inputs["image_grid_thw"])
    colours = inputs["pixel_values"].unflatten(1, (3, -1)).mean(-1) / 2 + 0.5
    torch.testing.assert_close(targets[0], colours)
    torch.testing.assert_close(targets[SUMMARY][7], colours[6:].mean(0))
    losses = objective(torch.full_like(inputs["input_ids"], -100), **inputs)
    assert losses["pair_losses"].shape == (2,) and losses["loss"].requires_grad
