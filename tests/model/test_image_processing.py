"""Sizes within the budget, patches in their order, and steps that cannot be left out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vora import VoraImageProcessor
from vora.model.image_processing_vora import fit_grid

sides = st.integers(1, 5000)


@given(sides, sides, st.integers(1, 32), st.integers(1, 64), st.integers(2, 20))
@settings(max_examples=200)
def test_grids_keep_to_the_budget_and_within_it_are_the_nearest_whole_patches(height, width, size, least, factor):
    rows, columns = fit_grid(height, width, size, least, least * factor)
    assert rows >= 1 and columns >= 1 and least <= rows * columns <= least * factor
    rows, columns = fit_grid(height, width, size, 1, 10**9)
    assert abs(rows - height / size) <= 0.5 or (rows == 1 and height < size)
    assert abs(columns - width / size) <= 0.5 or (columns == 1 and width < size)


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([(4, 16), (4, 64), (16, 16), (64, 256), (9, 9)]))
@settings(max_examples=100)
def test_no_grid_of_as_many_tokens_is_clearly_nearer_in_aspect_ratio(height, width, budget):
    rows, columns = fit_grid(height, width, 14, *budget)
    own = max(1, round(height / 14)) * max(1, round(width / 14))
    if budget[0] <= own <= budget[1]:
        return
    error = abs(math.log(rows / columns * width / height))
    fewest, most = (rows * columns, budget[1]) if own > budget[1] else (budget[0], max(rows * columns, budget[0]))
    for r in range(1, most + 1):
        for c in range(-(-fewest // r), most // r + 1):
            assert abs(math.log(r / c * width / height)) > error - 0.25, (r, c)


@given(sides, sides, st.integers(1, 32), st.integers(1, 300), st.integers(0, 300), st.integers(1, 3))
@settings(max_examples=300)
def test_no_grid_exceeds_the_budget_however_narrow_and_turned_images_have_turned_grids(
    height, width, size, least, more, merge
):
    """In whole tokens; a turned image has as many, as near to its aspect ratio."""
    processor, budget = VoraImageProcessor(size, merge), (least, least + more)
    processor.set_budget(*budget)
    rows, columns = processor.patch_grid(height, width, *budget)
    turned = processor.patch_grid(width, height, *budget)
    assert rows % merge == columns % merge == 0 and rows * columns <= merge**2 * (least + more)
    assert rows * columns == turned[0] * turned[1] == processor.get_number_of_image_patches(height, width)
    off, turned_off = math.log(rows * width / columns / height), math.log(turned[0] * height / turned[1] / width)
    assert abs(off) == pytest.approx(abs(turned_off), abs=1e-9)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((1, 1), (2, 2)), ((1, 4000), (1, 256)), ((4000, 1), (256, 1)), ((224, 224), (16, 16)), ((225, 223), (16, 16)),
        ((448, 448), (16, 16)), ((28, 28), (2, 2)), ((14, 14), (2, 2)), ((140, 70), (10, 5)),
    ],
)  # fmt: skip
def test_grids_of_some_sizes(size, grid):
    assert fit_grid(*size, 14, 4, 256) == grid
    image_processor = VoraImageProcessor(patch_size=14, max_image_tokens=256)
    inputs = image_processor(Image.new("RGB", size[::-1], "red"), return_tensors="np")
    assert inputs["image_grid_thw"].tolist() == [[1, *grid]]
    assert inputs["pixel_values"].shape == (math.prod(grid), 3 * 14**2)
    assert image_processor.get_number_of_image_patches(*size) == math.prod(grid)


def test_patches_are_in_raster_order_channel_first():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    image_processor = VoraImageProcessor(patch_size=4, image_mean=mean, image_std=std)
    patches = image_processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    expected = ((pixels / 255 - mean) / std).reshape(2, 4, 3, 4, 3).transpose(0, 2, 4, 1, 3).reshape(6, -1)
    np.testing.assert_allclose(patches, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "steps", [{"do_rescale": False}, {"do_normalize": False}, {"do_resize": False}, {"size": 9}, {"image_mean": [0]}]
)
def test_steps_that_cannot_be_left_out_or_changed_are_refused(steps):
    """None is silently ignored, neither in a call nor in a configuration."""
    image_processor, image = VoraImageProcessor(patch_size=4), Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=f"{next(iter(steps))}=.* not supported"):
        image_processor(image, **steps)
    done = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    found, expected = image_processor(image, **done), image_processor(image)
    assert np.array_equal(found["pixel_values"], expected["pixel_values"])


def test_no_configuration_changes_steps_or_allows_urls(tmp_path):
    with pytest.raises(ValueError, match="do_resize=False: not supported"):
        VoraImageProcessor(patch_size=4, do_resize=False)
    with pytest.raises(ValueError, match="min_image_tokens 9"):
        VoraImageProcessor(min_image_tokens=9, max_image_tokens=4)
    allowed = VoraImageProcessor(patch_size=4)
    allowed.allow_urls = True
    allowed.save_pretrained(tmp_path)
    assert "allow_urls" not in (tmp_path / "preprocessor_config.json").read_text()
    assert VoraImageProcessor.from_pretrained(tmp_path).allow_urls is False
    assert VoraImageProcessor(**{"allow_urls": True}).allow_urls is False


@pytest.mark.parametrize("std", [(0, 1, 1), (math.nan, 1, 1), (math.inf, 1, 1), (-1, 1, 1), (1e-30, 1, 1), (1, 1), ()])
def test_a_scale_that_gives_no_numbers_is_refused(std):
    image = Image.new("RGB", (8, 8), "red")
    for scale in ({"image_std": std}, {"image_mean": (math.nan, 0, 0)}, {"image_mean": (math.inf, 0, 0)}):
        with pytest.raises(ValueError, match="image_mean .* and image_std .* must be three numbers each"):
            VoraImageProcessor(patch_size=4, **scale)(image)
