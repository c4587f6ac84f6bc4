"""The app: routes, behind the gate, with errors in OpenAI's form."""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp

from vora.serve.api.errors import answer_errors
from vora.serve.api.gate import Gate
from vora.serve.api.routes import router
from vora.serve.api.service import Service


def create_app(service: Service, api_keys: Sequence[str] = ()) -> ASGIApp:
    """An ASGI app that answers with a service; with keys only those who send one of them. Pages of other origins are
    not let in (CORS)."""
    app = FastAPI(title="vora", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(router)
    answer_errors(app)
    return Gate(app, service.limits, api_keys, service.metrics)
