"""Videos as frames, several images, and budgets, from messages to model inputs."""

import numpy as np
import pytest
import torch
from messages import encode, noise, user
from PIL import Image

from vora.model.image_processing_vora import Video


def frames(count=3, size=(8, 12), seed=0):
    return [noise(size, 10 * seed + number) for number in range(count)]


RED = frames(1)[0]


def test_a_video_is_an_image_of_several_frames(processor, model):
    film, image = frames(), frames(1, seed=1)[0]
    inputs = encode(processor, [user("see", film, "and", image, "what?")])
    assert inputs["image_grid_thw"].tolist() == [[3, 3, 2], [1, 3, 2]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 24
    apart = encode(processor, [user("see", *film, "and", image, "what?")])
    assert torch.equal(inputs["pixel_values"], apart["pixel_values"])  # the same patches
    with torch.no_grad():
        logits, expected = model(**inputs).logits, model(**apart).logits
    torch.testing.assert_close(logits, expected)  # and each frame is a block of attention of its own


def test_animated_images_arrays_and_paths_are_videos(processor, tmp_path):
    film, path = frames(), str(tmp_path / "film.png")
    film[0].save(path, save_all=True, append_images=film[1:])
    expected = encode(processor, [user(film)])["pixel_values"]
    array = np.stack([np.asarray(frame) for frame in film])
    with Image.open(path) as opened:
        videos = {"video": path}, {"path": path}, {"video": array}, {"video": Video(film)}, {"video": Video(opened)}
        for given in videos:
            found = encode(processor, [{"role": "user", "content": [{"type": "video", **given}]}])
            assert torch.equal(found["pixel_values"], expected)
    no_videos = {"0 frames": [], "film.mp4.*list of images": "film.mp4", "no such file": ["no.png"]}
    for cause, given in no_videos.items():
        with pytest.raises(ValueError, match=cause):
            encode(processor, [{"role": "user", "content": [{"type": "video", "video": given}]}])


def test_the_budget_is_of_each_image_and_each_frame(processor):
    mixed = encode(processor, [user([RED, *frames(1, (40, 4))], "?")])  # the first frame's grid is that of all
    assert mixed["image_grid_thw"].tolist() == [[2, 3, 2]]
    grids = encode(processor, [user(frames(2, (120, 80)), frames(1, (100, 400))[0])], max_image_tokens=6)
    grids = grids["image_grid_thw"]
    assert (grids[:, 1:].prod(-1) <= 6).all() and grids[0, 0] == 2
    assert grids[1, 1] > grids[1, 2]  # tall stays tall
    large = encode(processor, [user(RED, "?")], min_image_tokens=100, max_image_tokens=200)
    assert 100 <= large["image_grid_thw"].prod() <= 200
    for how in ({"max_image_tokens": 1}, {"processor_kwargs": {"images_kwargs": {"max_image_tokens": 1}}}):
        assert encode(processor, [user(RED)], **how)["image_grid_thw"].tolist() == [[1, 1, 1]]
    with pytest.raises(ValueError, match="min_image_tokens 9 must be in 1..max_image_tokens 4"):
        encode(processor, [user(RED)], min_image_tokens=9, max_image_tokens=4)


def test_images_alone_make_pixels_and_no_images_none(processor):
    images = frames()
    array = np.stack([np.asarray(one) for one in images])
    expected = processor.image_processor(images, return_tensors="pt")
    for use in (processor.image_processor, processor):  # an array of several images is a list of them
        for given in (images, array, torch.from_numpy(array), [array[:2], array[2]]):
            found = use(images=given, return_tensors="pt")
            assert found.keys() == expected.keys() == {"pixel_values", "image_grid_thw"}
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    inputs = processor(text=processor.image_token * 3, images=array)
    assert inputs["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    for none in ([], [[]]):
        assert set(processor(text="hello", images=none)) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="at least one input"):
        processor()
    with pytest.raises(ValueError, match="Videos go into messages"):
        processor(text="hello", videos=[frames(2)])
