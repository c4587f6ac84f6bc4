"""Videos as frames, several images, and budgets, from messages to model inputs."""

import numpy as np
import pytest
import torch
from PIL import Image

from vora.model.image_processing_vora import Video


def frames(count=3, size=(8, 12), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)) for _ in range(count)]


def messages(*parts):
    kinds = {str: "text", list: "video", Video: "video"}
    content = []
    for part in parts:
        kind = kinds.get(type(part), "image")
        content.append({"type": kind, kind: part})
    return [{"role": "user", "content": content}]


def encode(processor, *conversations, **kwargs):
    batch = list(conversations) if len(conversations) > 1 else conversations[0]
    return processor.apply_chat_template(
        batch, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def test_a_video_is_an_image_of_several_frames(processor, model):
    film, image = frames(), frames(1, seed=1)[0]
    inputs = encode(processor, messages("see", film, "and", image, "what?"))
    assert inputs["image_grid_thw"].tolist() == [[3, 3, 2], [1, 3, 2]]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 24
    apart = encode(processor, messages("see", *film, "and", image, "what?"))
    assert torch.equal(inputs["pixel_values"], apart["pixel_values"])  # the same patches
    with torch.no_grad():
        logits, expected = model(**inputs).logits, model(**apart).logits
    torch.testing.assert_close(logits, expected)  # and each frame is a block of attention of its own


def test_videos_batch_with_images_and_text(processor, model):
    conversations = [
        messages(frames(2), "what?"),
        messages("hello"),
        messages(frames(1)[0], frames(1, (16, 8))[0], "?"),
    ]
    batch = encode(processor, *conversations)
    assert batch["image_grid_thw"].tolist() == [[2, 3, 2], [1, 3, 2], [1, 2, 4]]
    with torch.no_grad():
        together = model(**batch).logits
        for row, conversation in enumerate(conversations):
            alone = model(**encode(processor, conversation)).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_training_takes_videos_as_chat_does(processor):
    asked = messages("see", frames(), "what?")
    answered = [*asked, {"role": "assistant", "content": "it moves"}]
    sample, inputs = processor.training_sample(answered), encode(processor, asked)
    prompt = inputs["input_ids"][0].tolist()
    assert sample["input_ids"][: len(prompt)].tolist() == prompt
    assert sample["image_grid_thw"].tolist() == [[3, 3, 2]]
    assert np.array_equal(sample["pixel_values"], inputs["pixel_values"].numpy())


def test_animated_images_arrays_and_paths_are_videos(processor, tmp_path):
    film = frames(3)
    film[0].save(tmp_path / "film.png", save_all=True, append_images=film[1:])
    expected = encode(processor, messages(film, "?"))["pixel_values"]
    array = np.stack([np.asarray(frame) for frame in film])
    for given in (str(tmp_path / "film.png"), array, Video(film)):
        found = encode(processor, [{"role": "user", "content": [{"type": "video", "video": given}]}])
        assert torch.equal(found["pixel_values"], expected)
    path = encode(processor, [{"role": "user", "content": [{"type": "video", "path": str(tmp_path / "film.png")}]}])
    assert torch.equal(path["pixel_values"], expected)
    with Image.open(tmp_path / "film.png") as opened:
        assert torch.equal(encode(processor, messages(Video(opened), "?"))["pixel_values"], expected)


def test_frames_of_other_sizes_take_the_first_ones_grid(processor):
    mixed = [*frames(1, (8, 12)), *frames(1, (40, 4))]
    assert encode(processor, messages(mixed, "?"))["image_grid_thw"].tolist() == [[2, 3, 2]]


def test_the_budget_is_of_each_image_and_each_frame(processor):
    inputs = encode(processor, messages(frames(2, (120, 80)), frames(1, (100, 400))[0], "?"), max_image_tokens=6)
    grids = inputs["image_grid_thw"]
    assert (grids[:, 1:].prod(-1) <= 6).all() and grids[0, 0] == 2
    assert grids[1, 1] > grids[1, 2]  # tall stays tall
    large = encode(processor, messages(frames(1)[0], "?"), min_image_tokens=100, max_image_tokens=200)
    assert 100 <= large["image_grid_thw"].prod() <= 200


def test_a_budget_below_the_processors_least_is_followed(processor):
    assert encode(processor, messages(frames(1)[0], "?"), max_image_tokens=1)["image_grid_thw"].tolist() == [[1, 1, 1]]
    with pytest.raises(ValueError, match="min_image_tokens 9 must be in 1..max_image_tokens 4"):
        encode(processor, messages(frames(1)[0], "?"), min_image_tokens=9, max_image_tokens=4)


@pytest.mark.parametrize(
    ("given", "cause"), [([], "0 frames"), ("film.mp4", "film.mp4.*list of images"), (["no.png"], "no such file")]
)
def test_what_is_no_video_is_refused(processor, given, cause):
    with pytest.raises(ValueError, match=cause):
        encode(processor, [{"role": "user", "content": [{"type": "video", "video": given}]}])


def test_images_alone_make_pixels_and_no_images_none(processor):
    red = frames(1)[0]
    inputs, alone = processor(images=red, return_tensors="pt"), processor.image_processor(red, return_tensors="pt")
    assert set(inputs) == {"pixel_values", "image_grid_thw"}
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    for none in ([], [[]]):
        assert set(processor(text="hello", images=none)) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_an_array_of_several_images_is_a_list_of_them(processor):
    images = frames(3)
    array = np.stack([np.asarray(one) for one in images])
    expected = processor.image_processor(images, return_tensors="pt")
    for given in (array, torch.from_numpy(array), [array[:2], array[2]]):
        found = processor.image_processor(given, return_tensors="pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    inputs = processor(text=processor.image_token * 3, images=array)
    assert inputs["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()


def test_images_and_places_must_match(processor):
    with pytest.raises(ValueError, match="1 places .* 2 images"):
        processor(text=processor.image_token, images=frames(2))
    with pytest.raises(ValueError, match="Videos go into messages"):
        processor(text="hello", videos=[frames(2)])
