"""Conversations: turns of any usual form to messages, and the places in them where images go.

A message has a `role`, and as `content` text, or parts: `{"type": "text", "text": ...}` and places
`{"type": "image"}`, which the images of a sample fill in order. An assistant's message with `learn: False` is read but
not learned. All functions that read turns raise ValueError for what is not understood.
"""

import base64
import json
import re
from collections.abc import Sequence
from typing import Any

from vora.data.answers import as_list, text_of
from vora.data.columns import Row
from vora.data.images import VideoPath

Message = dict[str, Any]
Conversation = list[Message]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS, VIDEO_PARTS = ("image", "image_url", "input_image"), ("video", "video_url")
PART_KEYS = ("image", "video", "image_url", "video_url", "path", "url", "base64")
LEARN_KEYS = ("weight", "loss", "loss_mask", "loss_scale", "train")  # as OpenAI, ms-swift, verl and axolotl call it
CALLS = ("tool_calls", "function_call")
PLACE = re.compile(r"\n?<(?:image|video)>\n?")
UNFILLED = re.compile(r"^\s*<(video|audio)>", re.MULTILINE)  # within a sentence it is text about a tag
NOTHING_TO_LEARN = "Its answer is empty: there is nothing to learn."


def question_and_answer(question: Any, answer: Any) -> Conversation:
    """Two messages; ValueError if one is no text, or the answer is empty."""
    if question is None:
        raise ValueError("Its question is null.")
    answer = text_of(answer, "answer")
    if not answer.strip():
        raise ValueError(NOTHING_TO_LEARN)
    return [{"role": "user", "content": text_of(question, "question")}, {"role": "assistant", "content": answer}]


def conversation_of(turns: Any) -> tuple[Conversation, list[Any]]:
    """Turns in the form of OpenAI (`role`, `content`) or ShareGPT (`from`, `value`), also as JSON or by columns: the
    conversation, and the images that stand in it."""
    messages, images = [], []
    for turn in as_list(json.loads(turns) if isinstance(turns, str) else turns):
        speaker = turn.get("role") or turn.get("from")
        role = ROLES.get(speaker)
        if role is None:
            raise ValueError(f"Who is {speaker!r}? Known are {', '.join(ROLES)}.")
        if any(turn.get(key) for key in CALLS):
            raise ValueError(f"Its {role} calls tools, which is not understood: leave the row out.")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if not isinstance(content, str):
            content, given = _parts_and_images(content or [], role)
            images += given
        messages.append({"role": role, "content": content} | _mark(turn, role))
    while messages and messages[0]["role"] == "assistant":  # an answer to nothing, as in ShareGPT, LLaVA leaves out
        messages.pop(0)
    answers = [text_in(message) for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("It has no answer of an assistant: there is nothing to learn.")
    if not all(answer.strip() for answer in answers):
        raise ValueError(NOTHING_TO_LEARN)
    return messages, images


def lead_of(row: Row) -> Conversation:
    """What stands before a row's conversations: its columns `system`, and `history` of earlier questions and
    answers."""
    lead = [{"role": "system", "content": text_of(row["system"], "system")}] if row.get("system") else []
    for turn in row.get("history", []):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError("Its history is no list of pairs of a question and an answer.")
        lead += question_and_answer(*turn)
    return lead


def with_lead(lead: Conversation, conversation: Conversation) -> Conversation:
    """A conversation that goes on after what leads to it; ValueError if a system speaks in both, and not alike."""
    if lead and conversation[0]["role"] == "system":
        if lead[0]["role"] == "system" and lead[0] != conversation[0]:
            raise ValueError("It has a system's text in its messages and another in a column of its own.")
        return [conversation[0], *(message for message in lead if message["role"] != "system"), *conversation[1:]]
    return [*lead, *conversation]


def with_places(conversation: Conversation, has_images: bool) -> Conversation:
    """A conversation whose users' `<image>` (and, beside images, `<video>`) have become places; ValueError for a place
    for a video or for sound that nothing fills."""
    found = []
    for message in conversation:
        parts = message["content"]
        if message["role"] == "user":
            tag = UNFILLED.search(text_in(message))
            if tag and (tag[1] == "audio" or not has_images):
                raise ValueError(f"It has a place for {tag[1]}, <{tag[1]}>, but none to stand there.")
            parts = _as_parts(parts)
            if has_images or any("<image>" in part.get("text", "") for part in parts):
                parts = [one for p in parts for one in (_split_at_places(p["text"]) if p["type"] == "text" else [p])]
        if not isinstance(parts, str) and all(part["type"] == "text" for part in parts):
            parts = "".join(part["text"] for part in parts)
        found.append({**message, "content": parts})
    return found


def with_places_first(conversation: Conversation, count: int) -> Conversation:
    """A conversation with so many places before the first user's text; ValueError if there is no user."""
    first = next((i for i, message in enumerate(conversation) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("It has images, but no message of a user to stand in.")
    parts = [{"type": "image"}] * count + _as_parts(conversation[first]["content"])
    return [*conversation[:first], {**conversation[first], "content": parts}, *conversation[first + 1 :]]


def num_places(conversation: Conversation) -> int:
    """How many images go into a conversation."""
    return sum(part["type"] == "image" for message in conversation for part in _as_parts(message["content"]))


def filled(conversation: Conversation, images: Sequence[Any]) -> Conversation:
    """A conversation with opened images in its places; a list of frames becomes a video."""
    left = iter(images)

    def with_image(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        image = next(left)
        kind = "video" if isinstance(image, list) else "image"
        return {"type": kind, kind: image}

    contents = [message["content"] for message in conversation]
    parts = [content if isinstance(content, str) else list(map(with_image, content)) for content in contents]
    return [{**message, "content": content} for message, content in zip(conversation, parts)]


def text_in(message: Message) -> str:
    """The text of a message, without its images."""
    return "".join(part.get("text", "") for part in _as_parts(message["content"]))


def _as_parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _mark(turn: dict[str, Any], role: str) -> dict[str, bool]:
    """What says whether an assistant's turn is learned."""
    marks = {key: turn[key] for key in LEARN_KEYS if turn.get(key) is not None}
    if role != "assistant":
        return {}
    if wrong := [f"{key} {value!r}" for key, value in marks.items() if value not in (0, 1)]:
        raise ValueError(f"Its turns are weighed by {wrong[0]}: a turn counts (1) or does not (0).")
    return {} if all(marks.values()) else {"learn": False}


def _parts_and_images(content: Any, role: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Parts with places for images, and the images that stand in them."""
    parts, images = [], []
    for part in content:
        kind = part["type"]
        if kind in TEXT_PARTS:
            parts.append({"type": "text", "text": text_of(part["text"], "text")})
            continue
        if kind not in IMAGE_PARTS + VIDEO_PARTS or role == "assistant":
            raise ValueError(
                f"Its {role} says a part of type {kind!r}, which is not understood: an assistant's are text, others' "
                "text, image, image_url or video."
            )
        parts.append({"type": "image"})
        key = next((key for key in PART_KEYS if part.get(key) is not None), None)
        if key is not None:
            image = base64.b64decode(part[key]) if key == "base64" else part[key]
            if kind in VIDEO_PARTS and isinstance(image, dict):
                image = image.get("url")
            images.append(VideoPath(image) if kind in VIDEO_PARTS and isinstance(image, str) else image)
    return parts, images


def _split_at_places(text: str) -> list[dict[str, Any]]:
    """Text to parts; a line break beside a place belongs to it, as people ask without one."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(PLACE.split(text)):
        parts += [{"type": "image"}] if number else []
        parts += _as_parts(piece) if piece else []
    return parts
