"""`vora chat --web`: the page over a server that runs already, or over one that starts with it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from vora.checkpoint.load import load_processor
from vora.checkpoint.pretrained import NAME, committed_model
from vora.model.image_processing_vora import VoraImageProcessor
from vora.serve.limits import Limits
from vora.serve.port import check_port
from vora.serve.server import default_name, service
from vora.serve.web.client import Server, find_server
from vora.serve.web.launch import launched, wait_for_the_end
from vora.serve.web.local_api import local_api
from vora.serve.web.page import Page, build_page


def name_of(model: str) -> str:
    """What a model is called on the page."""
    return NAME if model == committed_model() else default_name(model)


@dataclass(frozen=True)
class First:
    """What the page begins with, and how it asks."""

    image: Image.Image | None = None
    question: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0


def image_processor_of(
    model: str, llm: str | None, min_image_tokens: int | None, max_image_tokens: int | None
) -> VoraImageProcessor:
    """The image processor of a model, with this budget."""
    image_processor = load_processor(model, llm).image_processor
    image_processor.set_budget(min_image_tokens, max_image_tokens)
    return image_processor


@contextmanager
def own_server(
    model: str, image_processor: VoraImageProcessor, max_new_tokens: int, **loading: Any
) -> Iterator[Server]:
    """A server of a model that leaves images as the page sends them, `loading` as `load_model` takes it."""
    limits = Limits(max_tokens=max(max_new_tokens, Limits().max_tokens))
    most = image_processor.max_image_tokens
    with service(
        "transformers", model, name_of(model), limits, min_image_tokens=1, max_image_tokens=most, **loading
    ) as found:
        with local_api(found) as server:
            yield server


def serve_page(
    server: Server, image_processor: VoraImageProcessor, first: First, host: str, port: int, say: Callable[[str], Any]
) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    page = Page(server, image_processor, first.max_new_tokens, first.temperature)
    with launched(lambda: build_page(page, first.image, first.question), host, port) as address:
        say(f"Open {address} (Ctrl-C ends it).")
        wait_for_the_end()


def chat_page(
    model: str, first: First, host: str, port: int, say: Callable[[str], Any], *, url: str | None = None,
    api_key: str | None = None, llm: str | None = None, min_image_tokens: int | None = None,
    max_image_tokens: int | None = None, **loading: Any,
) -> None:  # fmt: skip
    """The page of a model, that asks the server at `url`, or one of its own. ValueError where none answers there,
    or the port is taken."""
    check_port(host, port)
    server = asyncio.run(find_server(url, api_key)) if url else None
    image_processor = image_processor_of(model, llm, min_image_tokens, max_image_tokens)
    if server is not None:
        serve_page(replace(server, name=name_of(model)), image_processor, first, host, port, say)
        return
    with own_server(model, image_processor, first.max_new_tokens, llm=llm, **loading) as server:
        serve_page(server, image_processor, first, host, port, say)
