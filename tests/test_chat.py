"""A conversation: who stops listening stops the model, and pictures are what they are."""

import threading
import time

import pytest
from PIL import Image

from vora.cli import _picture_or_animation
from vora.model.image_processing_vora import read_image
from vora.serve.chat import Chat, load_model


@pytest.mark.parametrize("leave", ["close", "raise"])
def test_a_model_that_nobody_listens_to_stops(model_folder, leave):
    model, processor = load_model(str(model_folder))
    model.generation_config.eos_token_id = None
    steps = []
    model.model.register_forward_hook(lambda *_: (steps.append(1), time.sleep(0.01)) and None)
    conversation = Chat(model, processor, max_new_tokens=100)
    others, answer = threading.active_count(), conversation.ask("what colour?")
    next(answer)
    if leave == "close":
        answer.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
    made = len(steps)
    assert made < 60 and threading.active_count() == others
    time.sleep(0.05)
    assert len(steps) == made and conversation.messages == []


def test_the_command_takes_animations_whole_and_addresses_of_files(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.png")
    assert len(_picture_or_animation(str(tmp_path / "a.gif")).frames) == 3
    assert _picture_or_animation(str(tmp_path / "a.png")).size == (8, 8)
    assert read_image(f"file://{tmp_path}/a.png").getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="there is no such file"):
        _picture_or_animation(str(tmp_path / "none.png"))
