"""Changed images: the same for the same seed, as much as was asked for, and nothing that makes its text untrue."""

import random
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from test_readers import write

import vora
from vora.data.augment import augmented
from vora.data.readers import load_source
from vora.data.schema import Sample
from vora.data.stream import PackedSequences
from vora.data.turns import question_and_answer

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
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


def test_a_stream_changes_images_anew_each_epoch_and_resumes(tmp_path, llm_folder):
    for number in range(4):
        IMAGE.rotate(90 * number).save(tmp_path / f"{number}.png")
    write(tmp_path / "t.jsonl", *({"image": f"{n}.png", "question": "what?", "answer": "it"} for n in range(4)))
    processor = vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)

    def stream(augment=ALL, **options):
        return PackedSequences([load_source(tmp_path / "t.jsonl")], processor, 200, augment=[augment], **options)

    def sums(sequences):
        return [float(one["pixel_values"].sum()) for sequence in islice(sequences, 6) for one in sequence]

    whole = stream()
    before, state = sums(whole), whole.state_dict()
    assert len(set(before)) == len(before) > 8  # four images, and never twice the same
    again = stream(num_workers=2)
    again.load_state_dict(state)
    assert sums(again) == sums(whole)
    with pytest.raises(ValueError, match="augment"):
        stream(augment=None).load_state_dict(state)
