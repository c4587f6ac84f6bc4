"""A server with an OpenAI API whose answers follow from what it is sent, so that a page's tests know them."""

import asyncio
import base64
import io
import json
import threading
import time
from contextlib import contextmanager

import pytest
from PIL import Image

WORDS = {(255, 0, 0): "red", (0, 0, 255): "blue"}


class Reader:
    """Answers "colours?" with the colour of the first pixel, word by word, and whatever else with itself."""

    def __init__(self):
        self.images, self.bodies, self.keys, self.hung_up = [], [], [], threading.Event()

    def answer(self, body):
        image, text = body["messages"][-1]["content"]
        encoded = image["image_url"]["url"].removeprefix("data:image/png;base64,")
        self.images.append(Image.open(io.BytesIO(base64.b64decode(encoded))))
        self.images[-1].load()
        self.bodies.append(body)
        colour = WORDS.get(self.images[-1].getpixel((0, 0)), "grey")
        return f"It is {colour}." if text["text"] == "colours?" else text["text"]


@contextmanager
def served(app):
    """The address of an ASGI app, served in a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def reader():
    """(the reader, its address)"""
    pytest.importorskip("gradio")
    pytest.importorskip("openai")
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse

    app, reader = FastAPI(), Reader()

    @app.get("/v1/models")
    def models(request: Request):
        reader.keys.append(request.headers.get("authorization"))
        if reader.keys[-1] == "Bearer wrong":
            return JSONResponse({"error": {"message": "no such key", "code": "invalid_api_key"}}, 401)
        return {"object": "list", "data": [{"id": "/models/tiny-model", "object": "model"}]}

    async def pieces(text, forever):
        def chunk(**rest):
            whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", **rest}
            return f"data: {json.dumps(whole)}\n\n"

        words = text.split()
        try:
            for number, word in enumerate(words * (10_000 if forever else 1)):
                piece = (" " if number else "") + word
                yield chunk(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
                await asyncio.sleep(0.01)
            usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
            yield chunk(choices=[], usage=usage)
            yield "data: [DONE]\n\n"
        finally:
            reader.hung_up.set()

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        text = reader.answer(await request.json())
        if text == "refuse":
            return JSONResponse({"error": {"message": "The image is too large for me.", "code": 400}}, 400)
        return StreamingResponse(pieces(text, forever=text == "forever"), media_type="text/event-stream")

    with served(app) as address:
        yield reader, address
