"""One row of any layout to a record: images, and conversations about them."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from vora.model.image_processing_vora import read_image

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_COLUMNS = ("image", "images", "frames", "video")
TEXT_COLUMNS = (
    "messages", "conversations", "question", "answer", "questions", "answers", "caption", "captions",
    "instruction", "input", "output", "texts", "text", "id",
)  # fmt: skip
COLUMNS = IMAGE_COLUMNS + TEXT_COLUMNS
PLACE = re.compile(r"\n?<(?:image|video)>\n?")


@dataclass
class Record:
    """Images (or none) and independent conversations about them.

    Args:
        name: says where the record stands, for messages about bad ones.
        images: each a path, URL, PIL image or encoded bytes; a list of those is a video, frame by frame.
        conversations: lists of messages. Content is text, or parts of `{"type": "text", "text": ...}` and places
            `{"type": "image"}`, which the images fill in order; without places they go before the first user's text.
    """

    name: str
    images: list
    conversations: list

    def open_images(self):
        """The images as RGB pictures; a video as a list of them.

        Raises:
            ValueError: one cannot be read.
        """
        return [[read_image(f) for f in i] if isinstance(i, list) else read_image(i) for i in self.images]

    def messages(self, opened, conversation):
        """A conversation with the opened images in it, as the processor takes it.

        Raises:
            ValueError: it has another number of places than there are images; both are named.
        """
        num_places = sum(part["type"] == "image" for message in conversation for part in _parts(message))
        if num_places == 0 and opened:
            conversation = _with_places_first(conversation, len(opened))
        elif num_places != len(opened):
            raise ValueError(f"It has {num_places} places for images, but {len(opened)} images.")
        opened = iter(opened)
        return [{**message, "content": _filled(message["content"], opened)} for message in conversation]


def _parts(message):
    return [] if isinstance(message["content"], str) else message["content"]


def _with_places_first(conversation, count):
    first = next((i for i, message in enumerate(conversation) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("It has images, but no message of a user to stand in.")
    content = conversation[first]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    message = {**conversation[first], "content": [{"type": "image"}] * count + parts}
    return [*conversation[:first], message, *conversation[first + 1 :]]


def _filled(content, opened):
    if isinstance(content, str):
        return content
    return [_image_part(next(opened)) if part["type"] == "image" else part for part in content]


def _image_part(image):
    return {"type": "video", "video": image} if isinstance(image, list) else {"type": "image", "image": image}


def question_and_answer(question, answer):
    """Two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def record_of_row(row, name, image_folder, caption_prompts):
    """A row of a file as a `Record`.

    Layouts: `messages`; `conversations` (LLaVA, VoRA: `from` and `value`, `<image>` in the text); `question(s)` and
    `answer(s)`; `caption(s)`; `instruction`, `input` and `output` (Alpaca); `text`: a caption beside an image, plain
    text to go on alone. Each with `image`, `images`, `frames` or none; several frames for one place are a video.

    Args:
        row: dict of columns.
        image_folder: where paths of images start.
        caption_prompts: one is drawn for each caption, always the same.

    Raises:
        ValueError: the row fits no layout, or what it holds is not as the layout says.
    """
    row = {key: value for key, value in row.items() if value is not None and (value or key not in IMAGE_COLUMNS)}
    images = [_located(image, image_folder) for image in _images_of(row)]
    conversations, inline = _conversations_of(row, name, caption_prompts)
    if inline and images:
        raise ValueError("It has images both in its messages and in a column of their own.")
    images = images or [_located(image, image_folder) for image in inline]
    if "frames" in row or "video" in row:
        places = sum(part["type"] == "image" for message in conversations[0] for part in _parts(message))
        if len(images) > 1 and places < 2:
            images = [images]
    return Record(name, images, conversations)


def _images_of(row):
    for column in IMAGE_COLUMNS:
        if column in row:
            value = row[column]
            return list(value) if isinstance(value, (list, tuple)) else [value]
    return []


def _located(image, folder):
    if isinstance(image, dict):  # the Image feature of datasets
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, str) and len(image) < 1000 and not Path(image).is_absolute():
        path = Path(folder) / image
        return str(path) if path.exists() or not image.startswith(("http://", "https://", "data:")) else image
    if image is None:
        raise ValueError("One of its images is empty.")
    return image


def _conversations_of(row, name, prompts):
    """(conversations, images found inside messages)."""
    if "messages" in row or "conversations" in row:
        turns = row.get("messages", row.get("conversations"))
        return _from_turns(json.loads(turns) if isinstance(turns, str) else turns)
    if "texts" in row:
        turns = [question_and_answer(turn["user"], turn["assistant"]) for turn in row["texts"]]
        return [_checked(sum(turns, []))], []
    for questions, answers in (("questions", "answers"), ("question", "answer")):
        if questions in row and answers in row:
            asked, told = _as_list(row[questions]), _as_list(row[answers])
            if len(asked) != len(told):
                raise ValueError(f"It has {len(asked)} questions, but {len(told)} answers.")
            return [_checked(question_and_answer(str(q), str(a))) for q, a in zip(asked, told)], []
    has_image = any(column in row for column in IMAGE_COLUMNS)
    captions = row.get("captions", row.get("caption", row.get("text") if has_image else None))
    if captions is not None:
        draw = random.Random(name)
        return [_checked(question_and_answer(draw.choice(prompts), text)) for text in _as_list(captions)], []
    if "instruction" in row and "output" in row:
        asked = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        return [_checked(question_and_answer(asked, row["output"]))], []
    if "text" in row:
        return [_checked([{"role": "text", "content": row["text"]}])], []
    raise ValueError(
        f"Its columns {sorted(map(str, row))} fit none of the layouts messages, conversations, question and answer, "
        "caption, instruction and output, texts, text: name them in the source's `columns`."
    )


def _as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checked(conversation):
    for message in conversation:
        if not isinstance(message["content"], str):
            raise ValueError(f"Its {message['role']} says {type(message['content']).__name__}, not text.")
        if message["role"] in ("assistant", "text") and not message["content"].strip():
            raise ValueError("Its answer is empty: there is nothing to learn.")
    return conversation


def _from_turns(turns):
    messages, images = [], []
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        if role not in ROLES:
            raise ValueError(f"Who is {role!r}? Known are {', '.join(ROLES)}.")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        split = []
        for part in parts:
            if part["type"] == "text":
                split += _split_at_places(part["text"])
            else:
                split.append({"type": "image"})
                given = [part[key] for key in ("image", "video", "path", "url", "base64") if part.get(key) is not None]
                images += given[:1]
        only_text = all(part["type"] == "text" for part in split)
        content = "".join(part["text"] for part in split) if only_text else split
        messages.append({"role": ROLES[role], "content": content})
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ValueError("It has no answer of an assistant: there is nothing to learn.")
    return [messages], images


def _split_at_places(text):
    """Text to parts; a line break beside a place belongs to it, as people ask without one."""
    parts = []
    for number, piece in enumerate(PLACE.split(text)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
