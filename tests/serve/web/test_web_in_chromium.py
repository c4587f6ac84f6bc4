"""The page in a real browser: an image in, streamed answers of a tiny model out."""

import os
import re
import shutil

import pytest
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("openai")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]

from vora.serve.port import check_port  # noqa: E402
from vora.serve.web.client import Server  # noqa: E402
from vora.serve.web.launch import launched  # noqa: E402
from vora.serve.web.page import Page, build_page  # noqa: E402
from vora.serve.web.run import image_processor_of, own_server  # noqa: E402

PATIENCE = 120_000  # milliseconds, on a busy machine
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """A function that opens an address in a window of so many pixels; then no error of the page is left."""
    pages, wrong = [], []

    def opened(address, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: pages.append(request.url))
        page.goto(address)
        page.wait_for_selector("#ask")
        page.requests = pages
        return page

    yield opened
    assert not wrong


def test_an_image_goes_in_and_answers_stream_out(opened, model_folder, tmp_path):
    Image.effect_noise((90, 60), 80).convert("RGB").save(tmp_path / "photo.png")
    image_processor = image_processor_of(str(model_folder), None, None, 12)
    with own_server(str(model_folder), image_processor, 20) as server:
        page = Page(server, image_processor, max_new_tokens=20)
        with launched(lambda: build_page(page)) as address:
            window = opened(address)
            assert "Drop or paste an image" in window.inner_text("#said")
            window.set_input_files("#image input[type=file]", tmp_path / "photo.png")
            window.wait_for_selector(".card figure img")
            assert window.locator(".card:visible").count() == 3
            window.fill("#question textarea", "what colour is the shape?")
            window.click("#ask")
            window.wait_for_selector("#stop")
            window.wait_for_selector(".remark.verdict")
            window.wait_for_selector("#ask")
            for card in window.locator(".card").all():
                assert re.search(r"1[0-2] image tokens \(\d × \d\)", card.inner_text())
                assert re.search(r"first token after \d+\.\d\d s", card.inner_text())
            assert {one.split("/")[2] for one in window.requests if one.startswith("http")} == {address.split("/")[2]}
            with pytest.raises(ValueError, match="another --port"):
                check_port("127.0.0.1", int(address.split(":")[-1].strip("/")))
            kept = os.environ["GRADIO_TEMP_DIR"]
            assert any(files for _, _, files in os.walk(kept))
    assert not os.path.exists(kept)


PASTE = """async () => {
    const canvas = document.createElement("canvas");
    const image = await new Promise(resolve => canvas.toBlob(resolve, "image/png"));
    const data = new DataTransfer();
    data.items.add(new File([image], "image.png", {type: "image/png"}));
    document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true}));
}"""


def test_an_image_is_pasted_and_a_missing_server_is_said(opened):
    page = Page(Server("http://127.0.0.1:9/v1", "tiny"), image_processor_of_reader())
    with launched(lambda: build_page(page)) as address:
        window = opened(address)
        window.wait_for_selector("#image input[type=file]", state="attached")
        window.evaluate(PASTE)
        window.wait_for_selector(".card figure img")
        window.click("#ask")  # of a server that is not there
        window.wait_for_selector(".remark.bad")
        assert "No server answers" in window.inner_text("#said")


def test_an_answer_is_stopped_and_a_narrow_window_is_enough(opened, reader):
    reader, address = reader
    image_processor = image_processor_of_reader()
    page = Page(Server(f"{address}/v1", "tiny"), image_processor)
    with launched(lambda: build_page(page, Image.new("RGB", (64, 64), "red"), "forever")) as found:
        window = opened(found, width=390)
        window.wait_for_selector(".card figure img")
        assert window.evaluate("document.documentElement.scrollWidth") <= 390
        window.click("#ask")
        window.wait_for_function("document.querySelector('.card .answer').innerText.includes('forever forever')")
        window.click("#stop")
        assert reader.hung_up.wait(30)
        window.wait_for_selector("#ask")
        window.wait_for_function("document.querySelector('#said').innerText.includes('Stopped.')")
        assert "forever" in window.inner_text(".card .answer") and len(reader.images) == 1
        window.locator("#examples button.thumbnail-item").nth(2).click()
        window.wait_for_function("document.querySelector('#question textarea').value.includes('color of the circle')")


def image_processor_of_reader():
    from vora.model.image_processing_vora import VoraImageProcessor

    return VoraImageProcessor(patch_size=8, patch_merge=2, max_image_tokens=16)
