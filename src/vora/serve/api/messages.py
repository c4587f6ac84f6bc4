"""A request's messages as `VoraProcessor.apply_chat_template` takes them, images opened."""

from typing import Any

from vora.model.fetch_image import fetch_image
from vora.serve import engine
from vora.serve.api.errors import ApiError
from vora.serve.api.schemas import ChatRequest, ImagePart, Message
from vora.serve.limits import Limits


def check_limits(request: ChatRequest, limits: Limits) -> None:
    """ApiError where a request asks for more than the server gives."""
    parts = [part for message in request.messages for part in message.content if not isinstance(part, str)]
    num_images = sum(isinstance(part, ImagePart) for part in parts)
    texts = [message.content for message in request.messages if isinstance(message.content, str)]
    texts += [part.text for part in parts if not isinstance(part, ImagePart)]
    counts = {
        "messages": ("messages", len(request.messages), limits.max_messages),
        "images": ("messages", num_images, limits.max_images),
        "characters of text": ("messages", sum(map(len, texts)), limits.max_characters),
        "stop texts": ("stop", len(request.stops), limits.max_stops),
        "characters of stop texts": ("stop", sum(map(len, request.stops)), 1000),
        "tokens of the answer": ("max_tokens", request.num_tokens or 1, limits.max_tokens),
    }
    for name, (param, count, limit) in counts.items():
        if count > limit:
            raise ApiError(400, f"{count} {name} are more than the limit of {limit}.", code="limit", param=param)


def has_images(request: ChatRequest) -> bool:
    return any(isinstance(part, ImagePart) for message in request.messages for part in message.content)


def opened(messages: list[Message], limits: Limits, allow_urls: bool) -> list[engine.Message]:
    """Images at data URLs, and at http(s) URLs where these are allowed, become PIL images. ApiError, that names the
    place, for others: a path of this machine is never opened."""
    found: list[engine.Message] = []
    for number, message in enumerate(messages):
        content: str | list[dict[str, Any]]
        if isinstance(message.content, str):
            content = message.content
        else:
            content = []
            for place, part in enumerate(message.content):
                if isinstance(part, ImagePart):
                    where = f"messages.{number}.content.{place}.image_url"
                    content.append({"type": "image", "image": _image(part.image_url.url, where, limits, allow_urls)})
                else:
                    content.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        found.append({"role": role, "content": content})
    return found


def _image(url: str, where: str, limits: Limits, allow_urls: bool) -> Any:
    scheme = url[:8].partition(":")[0].lower()
    if scheme not in ("data", "http", "https"):
        message = "An image is given as data:image/png;base64,... with its bytes, never as a path."
    elif scheme != "data" and not allow_urls:
        message = "This server opens no images at URLs: send it as data:image/png;base64,... with its bytes."
    else:
        try:
            return fetch_image(url, allow_urls=allow_urls, policy=limits.images)
        except ValueError as error:
            # of a data URL a few letters, so that no answer holds the image again
            message = str(error).replace(url[:200], url[:30] + "...") if scheme == "data" else str(error)
    raise ApiError(400, message, code="invalid_image", param=where)
