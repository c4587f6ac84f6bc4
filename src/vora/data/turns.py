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
from vora.data.columns import LEARN_KEYS, Row, says_nothing
from vora.data.images import as_video

Message = dict[str, Any]
Conversation = list[Message]

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "developer": "system",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS, VIDEO_PARTS = ("image", "image_url", "input_image"), ("video", "video_url")
PART_KINDS = ("text", *IMAGE_PARTS, *VIDEO_PARTS, "audio")
PART_KEYS = ("image", "video", "image_url", "video_url", "path", "url", "base64")
UNREAD_KEYS = (  # of a turn, beside what it says
    "tool_calls", "function_call", "tools", "reasoning_content", "reasoning", "thinking", "refusal", "image", "images",
    "video", "videos", "audio", "audios",
)  # fmt: skip
QWEN_IMAGE = re.compile(r"<img>(.+?)</img>")  # as Qwen-VL writes where an image is
PLACE = re.compile(r"\n?<(?:image|video)>\n?")
UNFILLED = re.compile(r"^\s*<(video|audio)>", re.MULTILINE)  # within a sentence it is text about a tag
TOOL_CALL = re.compile(r"^\s*<\|?(tool_calls?|function_calls?)\|?>", re.MULTILINE)  # as templates write them
NOTHING_TO_LEARN = "Its answer is empty: there is nothing to learn."


def question_and_answer(question: Any, answer: Any) -> Conversation:
    """Two messages; ValueError if one is no text, or the answer is empty."""
    if question is None:
        raise ValueError("Its question is null.")
    answer = text_of(answer, "answer")
    _check_says(answer)
    return [{"role": "user", "content": text_of(question, "question")}, {"role": "assistant", "content": answer}]


def conversation_of(turns: Any, row: Row | None = None) -> tuple[Conversation, list[Any]]:
    """Turns in the form of OpenAI (`role`, `content`) or ShareGPT (`from`, `value`), also as JSON or by columns: the
    conversation, and the images that stand in it. Columns of `row` may say what is learned."""
    messages, images = [], []
    for turn in _with_marks(as_list(_from_json(turns)), row or {}):
        speaker = turn.get("role") or turn.get("from")
        role = ROLES.get(str(speaker))
        if role is None:
            raise ValueError(f"Who is {speaker!r}? Known are {', '.join(ROLES)}.")
        if unread := [key for key in UNREAD_KEYS if not says_nothing(turn.get(key))]:
            raise ValueError(f"Its {role} has {unread[0]!r}, which is not understood: leave the row out.")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if content is None and role == "system":
            continue
        if content is None and role == "user":
            raise ValueError("Its user says nothing: the content is null.")
        if role == "user" and isinstance(content, str) and QWEN_IMAGE.search(content):
            kinds = ("text", "image")  # take turns in what is split
            split = [(kinds[n % 2], piece) for n, piece in enumerate(QWEN_IMAGE.split(content)) if piece]
            content = [{"type": kind, kind: piece} for kind, piece in split]
        if not isinstance(content, str):
            content, given = _parts_and_images(content or [], role)
            images += given
        messages.append({"role": role, "content": content} | _mark(turn, role))
    while messages and messages[0]["role"] == "assistant":  # an answer to nothing, as in ShareGPT, LLaVA leaves out
        messages.pop(0)
    answers = [text_in(message) for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("It has no answer of an assistant: there is nothing to learn.")
    for answer in answers:
        _check_says(answer)
    return messages, images


def _check_says(answer: str) -> None:
    """Raise ValueError for an answer that is empty, only thought, or calls a tool."""
    if call := TOOL_CALL.search(answer):
        raise ValueError(f"Its assistant calls a tool, {call[0].strip()}, which is not understood: leave the row out.")
    if not answer.rpartition("</think>")[2].strip():
        raise ValueError(NOTHING_TO_LEARN)


def lead_of(row: Row) -> Conversation:
    """What stands before a row's conversations: its columns `system`, and `history` of earlier questions and
    answers."""
    lead = [{"role": "system", "content": text_of(row["system"], "system")}] if row.get("system") else []
    history = _from_json(row.get("history") or [])
    if history and all(isinstance(turn, dict) for turn in as_list(history)):
        return lead + conversation_of(history)[0]
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError("Its history is no list of pairs of a question and an answer.")
        lead += question_and_answer(*turn)
    return lead


def with_lead(lead: Conversation, conversation: Conversation) -> Conversation:
    """A conversation that goes on after what leads to it; ValueError if a system speaks in both, and not alike, or it
    is plain text."""
    if lead and conversation[0]["role"] == "text":
        raise ValueError("It has a 'system' or 'history', but its text is no conversation.")
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
    if turn.get("masked") is not None:  # torchtune's
        marks["masked"] = not turn["masked"]
    if role != "assistant":
        return {}
    if wrong := [f"{key} {value!r}" for key, value in marks.items() if value not in (0, 1)]:
        raise ValueError(f"Its turns are weighed by {wrong[0]}: a turn counts (1) or does not (0).")
    return {} if all(marks.values()) else {"learn": False}


def _from_json(turns: Any) -> Any:
    """Turns as they are, or of their JSON; ValueError where a text is none."""
    if not isinstance(turns, str):
        return turns
    try:
        return json.loads(turns)
    except ValueError:
        raise ValueError(f"Its turns are a text, and no list or JSON of one: {turns[:60]!r}.") from None


def _with_marks(turns: list[Any], row: Row) -> list[dict[str, Any]]:
    """Turns with the marks that a row's columns hold, one for all or one for each; a turn's own go before them."""
    given = {key: row[key] for key in LEARN_KEYS if key in row}
    if "weights" in row:
        given["weight"] = row["weights"]
    for key, marks in given.items():
        marks = marks if isinstance(marks, list) else [marks] * len(turns)
        if len(marks) != len(turns):
            raise ValueError(f"Its {key!r} weighs {len(marks)} turns, but it has {len(turns)}.")
        turns = [{**turn, key: mark if turn.get(key) is None else turn[key]} for turn, mark in zip(turns, marks)]
    return turns


def _parts_and_images(content: Any, role: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Parts with places for images, and the images that stand in them."""
    parts, images = [], []
    for part in content:
        # DashScope's parts have no type
        kind = part.get("type") or next((key for key in PART_KINDS if not says_nothing(part.get(key))), None)
        if kind in TEXT_PARTS and part.get("text") is not None:
            parts.append({"type": "text", "text": text_of(part["text"], "text")})
            continue
        if kind not in IMAGE_PARTS + VIDEO_PARTS or role == "assistant":
            raise ValueError(
                f"Its {role} says a part of type {kind!r}, which is not understood: an assistant's are text, others' "
                "text, image, image_url or video."
            )
        parts.append({"type": "image"})
        key = next((key for key in PART_KEYS if not says_nothing(part.get(key))), None)
        if key is not None:
            image = base64.b64decode(part[key]) if key == "base64" else part[key]
            if kind in IMAGE_PARTS and isinstance(image, (list, tuple)):
                raise ValueError(
                    f"Its {role} says a part of type {kind!r} with {len(image)} images: one part for each."
                )
            images.append(as_video(image) if kind in VIDEO_PARTS else image)
    return parts, images


def _split_at_places(text: str) -> list[dict[str, Any]]:
    """Text to parts; a line break beside a place belongs to it, as people ask without one."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(PLACE.split(text)):
        parts += [{"type": "image"}] if number else []
        parts += _as_parts(piece) if piece else []
    return parts
