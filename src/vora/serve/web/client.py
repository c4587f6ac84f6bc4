"""A question to a server with an OpenAI API, and the answer as it grows."""

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import openai
from PIL import Image

from vora.checkpoint.names import published
from vora.report.images import data_url

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECONDS_WITHOUT_A_TOKEN = 300.0  # of a large model on a processor


@dataclass(frozen=True)
class Server:
    """Where to ask, and which of the models there."""

    url: str  # up to and with /v1
    model: str
    api_key: str | None = None
    name: str = ""  # of the model, for people

    @property
    def title(self) -> str:
        """The model's name for people, else the one that it has there: of a path the last part."""
        return self.name or published(self.model)

    def client(self) -> openai.AsyncOpenAI:
        """A proxy is for servers elsewhere; nothing is asked twice."""
        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self.api_key or "none",
            max_retries=0,
            timeout=openai.Timeout(SECONDS_WITHOUT_A_TOKEN, connect=10.0),
            http_client=openai.DefaultAsyncHttpxClient(trust_env=urlsplit(self.url).hostname not in LOOPBACK),
        )


@dataclass(frozen=True)
class Answer:
    """What has come so far."""

    text: str = ""
    seconds_to_first_token: float | None = None
    seconds: float = 0.0
    num_tokens: int | None = None  # once the server has counted them
    is_whole: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """Of those behind the first; None of fewer than two, or where the server does not count."""
        if self.seconds_to_first_token is None or not self.num_tokens or self.num_tokens < 2:
            return None
        return (self.num_tokens - 1) / max(self.seconds - self.seconds_to_first_token, 1e-6)


async def find_server(url: str, api_key: str | None = None) -> Server:
    """The server at a URL, with or without /v1, and its first model. ValueError where none answers."""
    url = url.rstrip("/")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url} is no address of a server: give one such as http://127.0.0.1:8080.")
    server = Server(url if url.endswith("/v1") else f"{url}/v1", "", api_key)
    try:
        async with server.client() as client:
            models = (await client.models.list()).data
    except (openai.OpenAIError, ValueError) as error:
        raise ValueError(f"{cause_of(error, server)} It has to have an OpenAI API.") from None
    if not models:
        raise ValueError(f"The server at {server.url} has 0 models: start it with one.")
    return replace(server, model=models[0].id)


async def stream_answer(
    server: Server, question: str, image: Image.Image, *, max_new_tokens: int, temperature: float = 0.0
) -> AsyncGenerator[Answer, None]:
    """The answer to a question about an image, again with each piece that comes; closing it hangs up, which stops
    the model. The image is sent as it is, without loss. ValueError, of one line, for whatever goes wrong."""
    part = {"type": "image_url", "image_url": {"url": data_url(image, "png")}}
    answer, start = Answer(), time.perf_counter()
    try:
        async with (
            server.client() as client,
            await client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": [part, {"type": "text", "text": question}]}],  # type: ignore
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=0,
                stream=True,
                stream_options={"include_usage": True},
            ) as chunks,
        ):
            async for chunk in chunks:
                seconds = time.perf_counter() - start
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                if piece:
                    first = answer.seconds_to_first_token
                    first = seconds if first is None else first
                    answer = replace(answer, text=answer.text + piece, seconds_to_first_token=first, seconds=seconds)
                if chunk.usage:
                    answer = replace(answer, num_tokens=chunk.usage.completion_tokens)
                if piece:
                    yield answer
    except (openai.OpenAIError, ValueError) as error:
        raise ValueError(cause_of(error, server)) from None
    yield replace(answer, is_whole=True)


def cause_of(error: Exception, server: Server) -> str:
    """What went wrong, and the cure, in a line that a person reads."""
    if isinstance(error, openai.APITimeoutError):
        return f"The server at {server.url} did not answer in time: it may be busy; ask again later."
    if isinstance(error, openai.APIConnectionError):
        return f"No server answers at {server.url}: start it, or correct its address."
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return f"The server at {server.url} wants another API key: give it with --api-key."
    if isinstance(error, openai.RateLimitError):
        return f"The server at {server.url} has too many questions waiting: ask again later."
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    status = f" ({error.status_code})" if isinstance(error, openai.APIStatusError) else ""
    told = " ".join(str(message or error).split())[:400]
    return f"The server at {server.url} refused{status}: {told}"
