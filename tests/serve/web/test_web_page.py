"""What the page does, without a browser: the images that it sends, the answers that it shows, and its refusals."""

import asyncio
import re
from dataclasses import replace

import numpy as np
import pytest
from command import vora
from PIL import Image

from vora.model.image_processing_vora import VoraImageProcessor

pytest.importorskip("gradio")
pytest.importorskip("openai")

from vora.serve.web.client import Answer, Server, find_server, stream_answer  # noqa: E402
from vora.serve.web.conditions import (  # noqa: E402
    BLANK,
    CONDITIONS,
    RIGHT,
    SHUFFLED,
    as_read,
    images_to_show,
    token_grid,
    with_budget,
)
from vora.serve.web.examples import example_images  # noqa: E402
from vora.serve.web.page import NO_IMAGE, Page, answer_card, build_page, stopped  # noqa: E402
from vora.serve.web.verdict import verdict  # noqa: E402


def image_processor(**options):
    return VoraImageProcessor(
        **{"patch_size": 4, "patch_merge": 2, "min_image_tokens": 4, "max_image_tokens": 24} | options
    )


def photo(folder, size=(90, 60)):
    """Noise, red at its upper left: no shuffle leaves that."""
    image = Image.effect_noise(size, 80).convert("RGB")
    image.paste("red", (0, 0, 20, 20))
    image.save(folder / "photo.png")
    return str(folder / "photo.png")


def asked(page, *inputs):
    async def collected():
        return [update async for update in page.ask(*inputs)]

    return asyncio.run(collected())


def last(updates):
    """The texts that the page shows in the end."""
    shown = list(updates[0])
    for update in updates[1:]:
        shown = [new if isinstance(new, str) else old for new, old in zip(update, shown)]
    return [re.sub(r"<[^>]+>", "", text) for text in shown]


@pytest.mark.parametrize("options", [{}, {"pad_to_square": True}, {"patch_merge": 1, "resample": 2}])
@pytest.mark.parametrize("most", [24, 7, 1])
def test_an_engine_reads_what_is_sent_as_it_would_read_the_image_itself(options, most):
    """With the same bytes: it resizes nothing any more."""
    own, image = image_processor(**options), Image.effect_noise((90, 60), 80).convert("RGB")
    limited = with_budget(own, most)
    sent = as_read(image, limited)
    of_engine = image_processor(**options, min_image_tokens=1)  # which follows the page
    ours, theirs = limited.preprocess(image), of_engine.preprocess(sent)
    assert np.prod(token_grid(sent, own)) <= most
    np.testing.assert_array_equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    np.testing.assert_allclose(ours["pixel_values"], theirs["pixel_values"], atol=1e-6)
    assert own.max_image_tokens == 24 and own.min_image_tokens == 4


def test_what_is_shown_has_one_size_and_differs_as_it_says():
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    image.paste("red", (0, 0, 20, 20))
    shown = images_to_show(image, image_processor(), CONDITIONS[::-1])
    assert list(shown) == list(CONDITIONS) and len({one.size for one in shown.values()}) == 1
    right, blank, shuffled = (np.asarray(shown[one]) for one in CONDITIONS)
    assert np.ptp(blank, axis=(0, 1)).max() == 0 and abs(blank.mean() - right.mean()) < 1
    assert (np.sort(right.reshape(-1, 3), 0) == np.sort(shuffled.reshape(-1, 3), 0)).all() and (
        right != shuffled
    ).any()
    assert list(images_to_show(image, image_processor(), [BLANK])) == [BLANK]


def test_the_page_asks_once_for_each_image_and_says_whether_the_model_looked(reader, tmp_path):
    reader, address = reader
    page = Page(asyncio.run(find_server(address)), image_processor(), max_new_tokens=7)
    updates = asked(page, photo(tmp_path), " colours? ", 12.0, list(CONDITIONS))
    said, right, first, blank, second, shuffled, third = last(updates)
    assert first.startswith("It is red.") and second.startswith("It is grey.") and third.startswith("It is grey.")
    assert re.search(r"first token after \d+\.\d\d s · \d+\.\d tokens/s · 3 tokens$", first)
    assert said.startswith("Another answer with a blank image and shuffled patches: it looks at the image")
    assert all(len(one.getcolors(9999)) == 1 for one in reader.images[1:2]) and len(reader.images) == 3
    rows, columns = token_grid(reader.images[0], page.image_processor)
    assert rows * columns <= 12 and f"{rows * columns} image tokens ({rows} × {columns})" in right
    body = reader.bodies[0]
    assert body["max_tokens"] == 7 and body["temperature"] == 0 and body["model"] == "/models/tiny-model"
    texts = [update[2] for update in updates[1:] if isinstance(update[2], str)]
    assert len(texts) >= 4  # waiting, and each piece
    assert page.server.title == "tiny-model" and replace(page.server, name="mine").title == "mine"
    same = last(asked(page, photo(tmp_path), "hello <b>you</b>", 12, [RIGHT, BLANK]))
    assert same[0] == "The same answer with a blank image: it does not look at the image for this question."
    assert same[2].startswith("hello &lt;b&gt;you&lt;/b&gt;") and same[5:] == ["", ""]


def test_what_is_wrong_is_said_on_the_page(reader, tmp_path):
    reader, address = reader
    page = Page(asyncio.run(find_server(address)), image_processor())
    everything = [12, list(CONDITIONS)]
    assert last(asked(page, None, "what?", *everything))[0] == NO_IMAGE
    assert "Ask a question" in last(asked(page, photo(tmp_path), "  ", *everything))[0]
    assert "5,000 characters" in last(asked(page, photo(tmp_path), "x" * 5000, *everything))[0]
    assert "at least one" in last(asked(page, photo(tmp_path), "what?", 12, []))[0]
    (tmp_path / "bad.png").write_text("no image")
    bad = last(asked(page, str(tmp_path / "bad.png"), "what?", *everything))[0]
    assert "Cannot read image: it is not an image of a known format" in bad and str(tmp_path) not in bad
    assert not reader.images  # nothing of that was sent
    refused = last(asked(page, photo(tmp_path), "refuse", *everything))
    assert "refused (400): The image is too large for me." in refused[0] and refused[2] == "No answer"
    assert len(reader.images) == 1
    gone = Page(Server("http://127.0.0.1:9/v1", "none"), image_processor())
    assert "No server answers at http://127.0.0.1:9/v1" in last(asked(gone, photo(tmp_path), "what?", *everything))[0]


def test_a_server_is_found_or_the_reason_said(reader):
    _, address = reader
    assert asyncio.run(find_server(f"{address}/v1/", "right")).url == f"{address}/v1"
    with pytest.raises(ValueError, match="wants another API key: give it with --api-key"):
        asyncio.run(find_server(address, "wrong"))
    for wrong, cause in (("127.0.0.1:80", "no address of a server"), ("http://127.0.0.1:9", "No server answers")):
        with pytest.raises(ValueError, match=cause):
            asyncio.run(find_server(wrong))


def test_who_stops_listening_hangs_up(reader):
    reader, address = reader

    async def listen():
        answers = stream_answer(await find_server(address), "forever", Image.new("RGB", (8, 8)), max_new_tokens=5)
        async for answer in answers:
            if len(answer.text) > 20:
                break
        await answers.aclose()
        return await asyncio.to_thread(reader.hung_up.wait, 10)

    assert asyncio.run(listen())


def test_the_command_says_what_does_not_go_together(model_folder, tmp_path):
    for options, cause in (
        (["--url", "http://127.0.0.1:9"], "add --web"),
        (["--web", "--url", "http://127.0.0.1:9"], "--url needs -m MODEL"),
        (["--web", "-m", model_folder, photo(tmp_path), photo(tmp_path)], "2 were given"),
        (["--web", "-m", model_folder, "--port", 18790, "--url", "http://127.0.0.1:9"], "No server answers at"),
    ):
        refused = vora("chat", *options)
        assert refused.returncode == 1 and cause in refused.stderr.splitlines()[-1], refused.stderr


def test_verdicts():
    same, other = "it does not look at the image", "it looks at the image"
    assert verdict({RIGHT: "Red."}) == "" and verdict({BLANK: "red", SHUFFLED: "red"}) == ""
    assert same in verdict({RIGHT: "Red.", BLANK: " red", SHUFFLED: "red"})
    assert other in verdict({RIGHT: "red", BLANK: "blue"}) and "shuffled" not in verdict({RIGHT: "red", BLANK: "blue"})
    assert "not at where things are" in verdict({RIGHT: "red", BLANK: "blue", SHUFFLED: "red"})
    assert "needs no image" in verdict({RIGHT: "red", BLANK: "red", SHUFFLED: "blue"})
    assert "does not matter" in verdict({RIGHT: "red", SHUFFLED: "red"})
    assert "drawn at random" in verdict({RIGHT: "red", BLANK: "blue"}, temperature=0.7)


def test_speed_is_of_the_tokens_behind_the_first():
    answer = Answer("a b c", seconds_to_first_token=0.5, seconds=1.5, num_tokens=3)
    assert answer.tokens_per_second == 2 and "first token after 0.50 s · 2.0 tokens/s" in answer_card(answer)
    assert Answer("a", 0.5, 0.5, 1).tokens_per_second is None
    assert "tokens/s" not in answer_card(Answer("a b", 0.5, 1.5))  # the server counts none


def test_a_stop_keeps_what_came():
    parts = stopped(
        "", "", answer_card(Answer("so far", 0.1, 0.2)), "", '<p class="answer quiet">Waiting …</p>', "", ""
    )
    assert "Stopped." in parts[0] and "so far" in parts[2] and "more" not in parts[2] and "Stopped" in parts[4]


def test_examples_are_drawn_and_the_page_is_built():
    assert all(image.size == (384, 384) and question for image, question in example_images().values())
    built = build_page(Page(Server("http://127.0.0.1:9/v1", "tiny"), image_processor()))
    assert built.title == "tiny · vora" and not built.analytics_enabled and built.delete_cache
