"""The terminal chat: a line is a question, `+ IMAGE` adds an image to the next one, an empty line ends."""

import sys
from collections.abc import Sequence

from PIL import Image
from rich.console import Console
from rich.markup import escape

from vora.model.fetch_image import fetch_image, is_animated
from vora.model.image_processing_vora import Video
from vora.serve.chat import Chat


def open_image(source: str) -> Image.Image | Video:
    """The image at a path or URL; an animated file with all its frames, an animation at a URL with its first."""
    return Video(source) if is_animated(source) else fetch_image(source, allow_urls=True)


def print_answer(chat: Chat, question: str, images: Sequence[Image.Image | Video]) -> None:
    """Ask, and print the answer to stdout as it comes."""
    for piece in chat.ask(question, images):
        print(piece, end="", flush=True)
    print(flush=True)


def converse(chat: Chat, images: Sequence[Image.Image | Video], console: Console) -> None:
    """Answer what is typed; a question or image that is refused ends nothing."""
    pending = list(images)
    console.print(f"Images: {len(pending)}. Ask away; `+ IMAGE` adds an image, an empty line ends.")
    while line := read_line():
        try:
            if line.startswith("+"):
                pending.append(open_image(line[1:].strip()))
                continue
            print_answer(chat, line, pending)
        except ValueError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            if line.startswith("+") or not pending:
                continue
            console.print(f"{len(pending)} images were left out with that question: add them again with `+ IMAGE`.")
        pending = []


def read_line() -> str:
    """The next line of stdin; empty where it ends."""
    try:
        return input("> ").strip() if sys.stdin.isatty() else sys.stdin.readline().strip()
    except EOFError:
        return ""
