"""chat/completions, models, health, metrics."""

import time
from contextlib import nullcontext
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from vora.serve.answer import Answer
from vora.serve.api.errors import refused
from vora.serve.api.events import Reply
from vora.serve.api.messages import check_limits, has_images, opened
from vora.serve.api.schemas import ChatCompletion, ChatRequest, ErrorBody, Health, Model, ModelList
from vora.serve.api.service import Service

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
router = APIRouter(responses=ERRORS)


def _service(request: Request) -> Service:
    return request.app.state.service


AService = Annotated[Service, Depends(_service)]
EVENT = {  # of a stream
    "type": "object", "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chat.completion.chunk as JSON; the last is [DONE]."}},
}  # fmt: skip
METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, **STREAM})
async def chat_completions(body: ChatRequest, request: Request, service: AService) -> Any:
    """Answer a conversation, whole or as a stream of events."""
    began = time.monotonic()
    service.check_model(body.model)
    check_limits(body, service.limits)
    answer = await _submit(body, service, began)
    reply = Reply(body, answer, request.receive, service.metrics, began, service.limits.request_seconds)
    if body.stream:
        await reply.begin()
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(reply.events(), media_type="text/event-stream", headers=headers)
    return await reply.whole()


async def _submit(body: ChatRequest, service: Service, began: float) -> Answer:
    """Give a request to the engine, in a thread, for images are decoded there, a few requests' at once; ApiError where
    that is not its turn in time. If it is cancelled meanwhile, the answer is closed."""
    submitted: list[Answer] = []
    limits, temperature, top_p = service.limits, service.temperature, service.top_p

    def submit() -> None:
        messages = opened(body.messages, limits, service.allow_urls)
        submitted.append(
            service.engine.submit(
                messages,
                max_new_tokens=body.num_tokens,
                temperature=temperature if body.temperature is None else body.temperature,
                top_p=top_p if body.top_p is None else body.top_p,
                seed=body.seed,
                stop=body.stops,
            )
        )

    left = began + limits.request_seconds - time.monotonic()
    try:
        async with service.turn_to_open(left) if has_images(body) else nullcontext():
            await anyio.to_thread.run_sync(submit, limiter=service.threads)
    except ValueError as error:
        raise refused(error) from None
    except BaseException:
        for answer in submitted:
            answer.close()
        raise
    return submitted[0]


@router.get("/v1/models")
async def models(service: AService) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[Model(id=service.model, created=service.created)])


@router.get("/v1/models/{name:path}")
async def model(name: str, service: AService) -> Model:
    """That model."""
    service.check_model(name)
    return Model(id=service.model, created=service.created)


@router.get("/health")
async def health(service: AService) -> Health:
    """That the server lives; the only route that needs no key."""
    return Health(model=service.model, engine=service.engine.name)


@router.get("/metrics", response_class=Response, responses={**ERRORS, **METRICS})
async def metrics(service: AService) -> Response:
    """What Prometheus reads."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
