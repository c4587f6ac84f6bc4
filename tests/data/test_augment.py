"""Changed images: the same for the same seed, as much as was asked for, and nothing that makes its text untrue."""

import random

import numpy as np
import pytest
from messages import noise

from vora.data.augment import augmented
from vora.data.schema import Sample
from vora.data.turns import question_and_answer

IMAGE = noise((40, 30))
ALL = {"crop": 0.3, "flip": True, "colour": 0.3}


def changed(seed=0, answer="a dog", images=(IMAGE,), **options):
    sample = Sample("one", images, [question_and_answer("what?", answer)])
    return augmented(sample, random.Random(seed), **options).open_images()


def test_images_change_with_the_seed_if_it_is_wished_and_frames_of_a_video_alike():
    assert np.array_equal(changed()[0], IMAGE)
    images = [np.asarray(changed(seed, **ALL)[0]) for seed in (1, 1, 2)]
    assert np.array_equal(*images[:2]) and not np.array_equal(images[0], images[2])
    frames = changed(3, images=[[IMAGE, IMAGE]], **ALL)[0]
    assert len(frames) == 2 and np.array_equal(*frames) and frames[0].size != IMAGE.size


def test_crops_are_parts_of_the_image_and_keep_the_area_asked_for():
    array, shares = np.asarray(IMAGE), []
    for seed in range(200):
        part = np.asarray(changed(seed, crop=0.5)[0])
        rows, columns = part.shape[:2]
        windows = np.lib.stride_tricks.sliding_window_view(array, part.shape)[:, :, 0]
        assert (windows == part).all(axis=(2, 3, 4)).any()
        shares.append(rows * columns / array[..., 0].size)
    assert min(shares) > 0.42 and 0.65 < np.mean(shares) < 0.8 and max(shares) <= 1


@pytest.mark.parametrize(("answer", "mirrors"), [("a dog", True), ("the LEFT one", False), ("it is bright", True)])
def test_half_of_the_images_are_mirrored_but_none_with_a_side_in_its_text(answer, mirrors):
    mirrored = np.asarray(IMAGE)[:, ::-1]
    count = sum(np.array_equal(changed(seed, answer, flip=True)[0], mirrored) for seed in range(100))
    assert 30 < count < 70 if mirrors else count == 0
