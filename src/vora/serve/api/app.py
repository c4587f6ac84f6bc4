"""The app: routes, behind the gate, with errors in OpenAI's form."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp

from vora.serve.api.errors import answer_errors
from vora.serve.api.gate import OPEN, Gate
from vora.serve.api.routes import router
from vora.serve.api.service import Service


def create_app(service: Service, api_keys: Sequence[str] = ()) -> ASGIApp:
    """An ASGI app that answers with a service; with keys only those who send one of them. Pages of other origins are
    not let in (CORS)."""
    app = FastAPI(title="vora", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(router)
    answer_errors(app)
    _describe(app, service, bool(api_keys))
    return Gate(app, service.limits, api_keys, service.metrics)


def _describe(app: FastAPI, service: Service, with_keys: bool) -> None:
    """Write into `/openapi.json` what only this server knows: its model, its limits, and whether it wants a key."""
    found, limits = app.openapi(), service.limits
    asked = found["components"]["schemas"]["ChatRequest"]["properties"]
    asked["model"]["enum"] = [service.model]
    asked["messages"]["maxItems"] = limits.max_messages
    asked["stop"]["maxItems"] = limits.max_stops
    asked["max_tokens"]["maximum"] = asked["max_completion_tokens"]["maximum"] = limits.max_tokens
    if with_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        for path in OPEN:
            found["paths"][path]["get"]["security"] = []
