"""The API on a free port, in a thread of this process."""

import base64
import io
import threading
import time
from contextlib import contextmanager

import uvicorn
from PIL import Image

from vora.serve.api.app import create_app

KEY = "secret-key"


@contextmanager
def served(service, api_keys=()):
    """The address of an app."""
    config = uvicorn.Config(create_app(service, api_keys), port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def data_url(colour="red", size=(12, 12), format="PNG"):
    buffer = io.BytesIO()
    image = colour if isinstance(colour, Image.Image) else Image.new("RGB", size, colour)
    image.save(buffer, format)
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def question(text="what colour?", *urls):
    """Messages of one question."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
