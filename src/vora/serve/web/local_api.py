"""A server of one's own for the page: `vora serve`'s, on a free port of this machine, in a thread."""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from vora.serve.api.app import create_app
from vora.serve.api.service import Service
from vora.serve.web.client import Server

HOST = "127.0.0.1"


@contextmanager
def local_api(service: Service) -> Iterator[Server]:
    """Where to ask a service while it runs; nobody else knows its key."""
    key = secrets.token_urlsafe()
    config = uvicorn.Config(
        create_app(service, [key]), host=HOST, port=0, log_level="error", access_log=False, lifespan="off",
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    api = uvicorn.Server(config)
    thread = threading.Thread(target=api.run, daemon=True, name="vora-api")
    thread.start()
    while not api.started:
        if not thread.is_alive():
            raise ValueError(f"No server could be started at {HOST}: see whether other programs may listen there.")
        time.sleep(0.01)
    try:
        yield Server(f"http://{HOST}:{api.servers[0].sockets[0].getsockname()[1]}/v1", service.model, key)
    finally:
        api.should_exit = True
        thread.join(10)
