"""The terminal chat: a line is a question, a line that begins with / a command, an empty line ends."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image
from rich.console import Console
from rich.markup import escape

from vora.model.fetch_image import fetch_image, is_animated
from vora.model.image_processing_vora import Video
from vora.serve.chat import Chat

with suppress(ImportError):  # Windows has none; with it, `input` takes arrow keys and knows the lines before
    import readline  # noqa: F401

HELP = (
    "/image PATH adds an image to the next question, /clear forgets all that was said and shown, /help shows this, an "
    "empty line ends, and Ctrl-C stops an answer."
)
NO_IMAGE = "No image was given, so the answer is from the text alone"


def open_image(source: str) -> Image.Image | Video:
    """The image at a path or URL; an animated file with all its frames, an animation at a URL with its first."""
    return Video(source) if is_animated(source) else fetch_image(source, allow_urls=True)


def print_answer(chat: Chat, question: str, images: Sequence[Image.Image | Video]) -> None:
    """Ask, and print the answer to stdout as it comes; that it is empty, to stderr."""
    is_empty = True
    for piece in chat.ask(question, images):
        print(piece, end="", flush=True)
        is_empty = is_empty and not piece.strip()
    print(flush=True)
    if is_empty:
        print("The answer is empty: the model ends it at once.", file=sys.stderr)


def several_images(num_images: int, trained_with: int | None) -> str | None:
    """What is to be said of several images, where it is known with how many a model was trained."""
    if num_images < 2 or trained_with is None:
        return None
    if trained_with < num_images:
        most = f"{trained_with} image{'s' * (trained_with != 1)}"
        return f"{num_images} images, and the model was trained with at most {most} in a sample: expect little."
    return f"{num_images} images; the model was trained with up to {trained_with} in a sample."


def converse(
    chat: Chat, images: Sequence[Image.Image | Video], console: Console, trained_with: int | None = None
) -> None:
    """Answer what is typed; a question or image that is refused ends nothing.
    `trained_with` as of `several_images`."""
    pending = list(images)
    console.print(f"Images: {len(pending)}. {HELP}", highlight=False)
    while line := read_line():
        if line.startswith("/"):
            _obey(line, chat, pending, console)
            continue
        if not pending and not chat.num_images:
            console.print(f"{NO_IMAGE}: /image PATH adds one.", highlight=False)
        if pending and (said := several_images(chat.num_images + len(pending), trained_with)):
            console.print(said, highlight=False)
        try:
            print_answer(chat, line, pending)
        except KeyboardInterrupt:
            console.print("\nStopped; the question and its images count as not asked.")
        except ValueError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            if pending:
                console.print(f"{len(pending)} images were left out with that question: /image PATH adds them again.")
            pending = []
        else:
            pending = []


def _obey(line: str, chat: Chat, pending: list[Image.Image | Video], console: Console) -> None:
    """Do what a line that begins with / says."""
    command, _, place = line.partition(" ")
    if command == "/image" and place.strip():
        try:
            pending.append(open_image(_path(place.strip())))
            console.print(f"Images of the next question: {len(pending)}.", highlight=False)
        except ValueError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
    elif command == "/clear":
        chat.messages.clear()
        pending.clear()
        console.print("A new conversation, without images.")
    else:
        known = "" if command == "/help" else f"{command} is unknown, or names no image. "
        console.print(f"{escape(known)}{HELP}", highlight=False)


def _path(typed: str) -> str:
    """A path as a shell or a file manager writes it: in quotes, with its spaces escaped, or from ~ on."""
    try:
        words = shlex.split(typed)
    except ValueError:  # of a quote that is a part of it
        words = []
    return os.path.expanduser(words[0] if len(words) == 1 else typed)


def read_line() -> str:
    """The next line of stdin; empty where it ends."""
    try:
        return input("> ").strip() if sys.stdin.isatty() else sys.stdin.readline().strip()
    except EOFError:
        return ""
