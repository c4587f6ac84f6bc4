"""Changed images: the same for the same seed, as much as was asked for, and nothing that makes its text untrue."""

import random
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from vora.data.augment import augmented
from vora.data.schema import Sample
from vora.data.turns import question_and_answer

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


def sample(answer="a dog", images=None):
    return Sample("one", images or [IMAGE], [question_and_answer("what?", answer)])


def changed(seed=0, answer="a dog", images=None, **options):
    return augmented(sample(answer, images), random.Random(seed), **options).open_images()


def test_without_wishes_nothing_changes():
    assert np.array_equal(changed()[0], IMAGE)


def test_the_same_seed_gives_the_same_image_and_others_differ():
    options = {"crop": 0.3, "flip": True, "colour": 0.3}
    images = [np.asarray(changed(seed, **options)[0]) for seed in (1, 1, 2)]
    assert np.array_equal(*images[:2]) and not np.array_equal(images[0], images[2])


def test_crops_are_parts_of_the_image_and_keep_the_area_asked_for():
    array, shares = np.asarray(IMAGE), []
    for seed in range(200):
        part = np.asarray(changed(seed, crop=0.5)[0])
        rows, columns = part.shape[:2]
        found = [
            (y, x)
            for y in range(30 - rows + 1)
            for x in range(40 - columns + 1)
            if np.array_equal(array[y, x], part[0, 0]) and np.array_equal(array[y : y + rows, x : x + columns], part)
        ]
        assert found
        shares.append(rows * columns / array[..., 0].size)
    assert min(shares) > 0.42 and 0.65 < np.mean(shares) < 0.8 and max(shares) <= 1


@pytest.mark.parametrize(("answer", "mirrors"), [("a dog", True), ("the LEFT one", False), ("it is bright", True)])
def test_half_of_the_images_are_mirrored_but_none_with_a_side_in_its_text(answer, mirrors):
    mirrored = np.asarray(IMAGE)[:, ::-1]
    count = sum(np.array_equal(changed(seed, answer, flip=True)[0], mirrored) for seed in range(100))
    assert 30 < count < 70 if mirrors else count == 0


def test_frames_of_a_video_change_alike():
    frames = changed(3, images=[[IMAGE, IMAGE]], crop=0.3, flip=True, colour=0.4)[0]
    assert len(frames) == 2 and np.array_equal(*frames) and frames[0].size != IMAGE.size


def test_a_stream_changes_images_anew_each_epoch_and_resumes(tmp_path, llm_folder):
    import vora
    from vora.data.readers import load_source
    from vora.data.stream import PackedSequences

    for number in range(4):
        IMAGE.rotate(90 * number).save(tmp_path / f"{number}.png")
    lines = [f'{{"image": "{n}.png", "question": "what?", "answer": "it"}}\n' for n in range(4)]
    (tmp_path / "all.jsonl").write_text("".join(lines))
    processor = vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)

    def stream(**options):
        source = load_source(str(tmp_path / "all.jsonl"))
        return PackedSequences(
            [source], processor, 200, augment=[{"crop": 0.3, "flip": True, "colour": 0.3}], **options
        )

    def sums(rows, count):
        return [float(one["pixel_values"].sum()) for row in islice(rows, count) for one in row]

    whole = stream()
    before, state = sums(whole, 6), whole.state_dict()
    after = sums(whole, 6)
    assert len(set(before)) == len(before) > 8  # four images, and never twice the same
    again = stream(num_workers=2)
    again.load_state_dict(state)
    assert sums(again, 6) == after
    other = PackedSequences([load_source(str(tmp_path / "all.jsonl"))], processor, 200)
    with pytest.raises(ValueError, match="augment"):
        other.load_state_dict(state)
