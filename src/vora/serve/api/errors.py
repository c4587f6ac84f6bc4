"""Every refusal in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from vora.serve.api.schemas import TAGS
from vora.serve.engine import ContextError

log = logging.getLogger("vora.serve")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
PLAIN = {  # of what pydantic says in its own words
    "union_tag_not_found": "a part is {'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': ...}.",
    "model_type": "an object is wanted.", "model_attributes_type": "an object is wanted.",
    "string_type": "a text is wanted.", "string_unicode": "the text is no Unicode.",
}  # fmt: skip


class ApiError(Exception):
    """What a client is told."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        code = code or CODES.get(status)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def refused(error: ValueError) -> ApiError:
    """What an engine or the processor does not take."""
    code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_value"
    return ApiError(400, str(error), code=code, param="messages")


def internal(error: BaseException) -> ApiError:
    """What went wrong on our side is written to the log, not to the client."""
    log.error("An answer broke off: %s", error, exc_info=error)
    return ApiError(500, "The server failed at this request; its log says why.", code="internal_error")


def timed_out(seconds: float) -> ApiError:
    message = f"The answer took longer than the limit of {seconds:g} seconds: ask for fewer tokens, or later."
    return ApiError(504, message, code="timeout")


def answer_errors(app: FastAPI) -> None:
    """Let an app answer all errors so, those of its framework included."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def of_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, str(error.detail), headers=headers).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _of_validation(error.errors()[0]).response()

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return internal(error).response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(HTTPException, of_framework)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unknown)


def _of_validation(found: Any) -> ApiError:
    """The first thing that is wrong with a body."""
    places = [str(place) for place in found["loc"][1:] if place not in TAGS]  # the first is the body
    if found["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {found.get('ctx', {}).get('error', '')}.", code="invalid_json")
    if found["type"] == "union_tag_not_found":
        places.append("type")
    param = ".".join(places) or None
    if param is None and isinstance(found.get("input"), bytes):
        message = "The body is taken for text: send it with Content-Type: application/json."
        return ApiError(400, message, code="invalid_json")
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"The parameter {param} is not supported.", code="unsupported_parameter", param=param)
    message = PLAIN.get(found["type"], str(found["msg"])).removeprefix("Value error, ")
    return ApiError(400, f"{param or 'The body'}: {message}", code="invalid_value", param=param)
