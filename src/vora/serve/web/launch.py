"""Starting the page, on this machine and for it alone unless told otherwise."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vora.serve.port import check_port
from vora.serve.web.style import CSS, THEME

MAX_FILE_SIZE = "20mb"
MAX_WAITING, MAX_AT_ONCE = 16, 2  # questions
ONLY_FROM_HERE = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'none'"
)


PASTE_ANYWHERE = """() => document.addEventListener("paste", event => {
    const image = [...event.clipboardData.files].find(file => file.type.startsWith("image/"));
    const input = document.querySelector("#image input[type=file]");
    if (!image || !input) return;
    const files = new DataTransfer();
    files.items.add(image);
    input.files = files.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
})"""


class NothingFromElsewhere:
    """Tells browsers to load nothing from other hosts, whatever a library's page asks for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", ONLY_FROM_HERE.encode())]
            await send(message)

        await self.app(scope, receive, marked)


@contextmanager
def launched(build: Callable[[], gr.Blocks], host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """The address of the page that `build` makes while it is served: on the port, or on a free one. Files that were
    uploaded are gone afterwards. ValueError where the port is taken."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="vora-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # which gradio's components read as they are made
        blocks = build()
        check_port(host, port)
        blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=MAX_AT_ONCE, api_open=False)
        try:
            _, address, _ = blocks.launch(
                server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True,
                show_error=True, max_file_size=MAX_FILE_SIZE, footer_links=[], run_history=False, ssr_mode=False,
                enable_monitoring=False, pwa=False, mcp_server=False, theme=THEME, css=CSS, js=PASTE_ANYWHERE,
                num_workers=1, app_kwargs={"middleware": [Middleware(NothingFromElsewhere)]},
            )  # fmt: skip
            yield address
        finally:
            blocks.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def wait_for_the_end() -> None:
    """Return never; Ctrl-C and SIGTERM raise KeyboardInterrupt here, so that the page is taken down in order."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Event().wait()
