"""One row of any layout to a record: images, and conversations about them."""

import base64
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from vora.model.fetch_image import fetch_image, is_base64
from vora.model.image_processing_vora import Video

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_COLUMNS = ("image", "images", "frames", "video")
TEXT_COLUMNS = (
    "messages", "conversations", "question", "answer", "questions", "answers", "caption", "captions",
    "instruction", "input", "output", "texts", "text", "label", "sentence", "id", "choices", "options",
)  # fmt: skip
LAYOUTS = (  # the first that a row has is read
    {"messages", "conversations"}, {"texts"}, {"question", "questions", "answer", "answers"},
    {"caption", "captions"}, {"sentence", "label"}, {"instruction", "output", "input"}, {"text"},
)  # fmt: skip
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IMAGE_NAMES = re.compile(r"(img|image|pic|photo|pixel|frame|video|file_?name|jpe?g$|png$)", re.IGNORECASE)
SYNONYMS = (  # of these a row is asked for one
    {*IMAGE_COLUMNS}, {"messages", "conversations"}, {"questions", "question"}, {"answers", "answer"},
    {"captions", "caption", "text"}, {"sentence", "statement"},
)  # fmt: skip
COLUMNS = IMAGE_COLUMNS + TEXT_COLUMNS + ("file_name",)
PLACE = re.compile(r"\n?<(?:image|video)>\n?")
PART_KEYS = ("image", "video", "image_url", "path", "url", "base64")


class VideoPath(str):
    """Where an animated image is of which all frames are meant."""


class VideoBytes(bytes):
    """An animated image of which all frames are meant."""


@dataclass
class Record:
    """Images (or none) and independent conversations about them.

    Args:
        name: says where the record stands, for messages about bad ones.
        images: each a path, URL, PIL image or encoded bytes; a list of those is a video, frame by frame, and so are
            `VideoPath` and `VideoBytes`.
        conversations: lists of messages. Content is text, or parts of `{"type": "text", "text": ...}` and places
            `{"type": "image"}`, which the images fill in order; without places they go before the first user's text.
    """

    name: str
    images: list
    conversations: list

    def open_images(self):
        """The images as RGB images; a video as a list of them.

        Raises:
            ValueError: one cannot be read.
        """
        return [
            Video(image).frames if isinstance(image, (list, VideoPath, VideoBytes)) else fetch_image(image)
            for image in self.images
        ]

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


def without_images(record):
    """A record without its images and their places: only the words are left."""
    conversations = [
        [
            message
            if isinstance(message["content"], str)
            else {**message, "content": "".join(part["text"] for part in message["content"] if part["type"] == "text")}
            for message in conversation
        ]
        for conversation in record.conversations
    ]
    return replace(record, images=[], conversations=conversations)


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


def record_of_row(row, name, image_folder, prompts):
    """A row of a file as a `Record`.

    Layouts: `messages`; `conversations` (LLaVA, VoRA: `from` and `value`, `<image>` in the text); `question(s)` and
    `answer(s)`; `caption(s)`; `sentence` and `label` (true or false, as NLVR); `label`, the name of a class;
    `instruction`, `input` and `output` (Alpaca); `texts` (the Cauldron, FineVision: turns of `user` and `assistant`);
    `text`: a caption beside an image, plain text to go on alone. Each with `image`, `images`, `frames`, `video` or
    none; several frames for one place are a video.

    Args:
        row: dict of columns.
        image_folder: where paths of images start.
        prompts: a `Prompts`; one is drawn for each row that comes without a question, always the same.

    Raises:
        ValueError: the row fits no layout, or what it holds is not as the layout says.
    """
    row = without_empty(row)
    named = _with_named_image(row, image_folder)
    if named is not row and not (
        {"messages", "conversations"} & row.keys() and _conversations_of(row, name, prompts)[1]
    ):
        row = named  # unless its turns have images of their own
    images = [_located(image, image_folder) for image in _images_of(row)]
    conversations, inline = _conversations_of(row, name, prompts)
    if not images and not inline:
        _check_unread_images(row)
    if inline and images:
        raise ValueError("It has images both in its messages and in a column of their own.")
    images = images or [_located(image, image_folder) for image in inline]
    conversations = [_with_places(conversation, bool(images)) for conversation in conversations]
    if "frames" in row or "video" in row:
        places = sum(part["type"] == "image" for message in conversations[0] for part in _parts(message))
        if len(images) > 1 and places < 2:
            images = [images]  # frames of one video
    return Record(name, images, conversations)


def with_columns(row, columns, alone=True):
    """A row whose columns have our names, as {ours: theirs} says; what is named so goes before its `SYNONYMS`.

    Args:
        alone: leave out layouts that would be read before what is named so.
    """
    given = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    overruled = set().union(*(alike for alike in SYNONYMS if alike & given.keys())) | {*columns.values()}
    row = {name: value for name, value in row.items() if name not in overruled} | given
    first = next((number for number, layout in enumerate(LAYOUTS) if layout & {*columns}), 0)
    before = set().union(*LAYOUTS[:first]) if alone else set()
    return {name: value for name, value in row.items() if name not in before}


def looks_like_images(column):
    """Whether a column's name says that images are in it, though it is none of ours."""
    return column not in COLUMNS and IMAGE_NAMES.match(column) is not None


def without_empty(row):
    """A row without the columns that merged schemas fill with nothing."""
    return {key: value for key, value in row.items() if value is not None and not _is_empty(key, value)}


def _is_empty(key, value):
    return not value and (key in IMAGE_COLUMNS or isinstance(value, (list, tuple, dict)))


def _check_unread_images(row):
    """Raise ValueError for an image in a column that is none of ours: the row would be learned blind."""
    for column, value in row.items():
        if looks_like_images(str(column)) and _is_image(value[0] if isinstance(value, list) and value else value):
            raise ValueError(
                f"Its column {column!r} seems to hold an image, but images are looked for in "
                f"{', '.join(IMAGE_COLUMNS)} alone: name it in the source's `columns`, image: {column}."
            )


def _is_image(value):
    if isinstance(value, str):
        return _ends_as_image(value) or value.startswith("data:image")
    return isinstance(value, bytes) or (isinstance(value, dict) and not {"bytes", "path", "url"}.isdisjoint(value))


def _ends_as_image(text):
    return text.partition("?")[0].lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS))


def images_of_row(row, image_folder):
    """What stands in a row's column of images, as `Record` takes it: paths from where they start.

    Raises:
        ValueError: an image is empty.
    """
    return [_located(image, image_folder) for image in _images_of(_with_named_image(row, image_folder))]


def _with_named_image(row, image_folder):
    """A row whose image stands in `file_name`, as in metadata.jsonl of the image folders of `datasets`, has it in
    `image`."""
    name = row.get("file_name")
    if _images_of(row) or not isinstance(name, str) or not _ends_as_image(name):
        return row
    return row | {"image": name} if Path(image_folder, name).is_file() else row


def _images_of(row):
    for column in IMAGE_COLUMNS:
        if column in row:
            value = row[column]
            if column == "video":
                return _frames_of(value)
            return list(value) if isinstance(value, (list, tuple)) else [value]
    return []


def _frames_of(video):
    """One animated image, of which all frames are meant, or a list of frames."""
    if isinstance(video, (list, tuple)) and len(video) != 1:
        return list(video)
    if isinstance(video, (list, tuple)):
        video = video[0]
        if isinstance(video, str) and video.startswith(("http://", "https://", "data:")):
            return [video]  # one frame
    if isinstance(video, dict):
        video = video.get("bytes") or video.get("path") or video.get("url")
    known = {str: VideoPath, bytes: VideoBytes}.get(type(video))
    return [known(video) if known else video]


def _located(image, folder):
    if isinstance(image, (list, tuple)):
        return [_located(frame, folder) for frame in image]
    if isinstance(image, dict):  # the Image feature of datasets, or OpenAI's image_url
        image = image.get("bytes") or image.get("path") or image.get("url")
    if image is None:
        raise ValueError("One of its images is empty.")
    if not isinstance(image, str) or image.startswith(("http://", "https://", "data:")):
        return image
    if len(image) > 250 or is_base64(image):
        return image
    return type(image)(Path(folder) / image.removeprefix("file://"))  # an absolute path stays


def _conversations_of(row, name, prompts):
    """(conversations, images found inside messages)."""
    if "messages" in row or "conversations" in row:
        turns = row.get("messages", row.get("conversations"))
        return _from_turns(as_list(json.loads(turns) if isinstance(turns, str) else turns))
    if "texts" in row:
        turns = [question_and_answer(turn["user"], turn["assistant"]) for turn in row["texts"]]
        return [_checked(sum(turns, []))], []
    if "question" in row and "answers" in row and "questions" not in row:
        # several people's answers to one question, as in VQAv2: the most frequent
        told = [one["answer"] if isinstance(one, dict) else one for one in as_list(row["answers"])]
        if len(told) == 1:  # several people's numbers are what they counted
            check_choice_answers(row, told)
        return [
            _checked(question_and_answer(as_text(row["question"]), Counter(map(as_text, told)).most_common(1)[0][0]))
        ], []
    for questions, answers in (("questions", "answers"), ("question", "answer")):
        if questions in row and answers in row:
            asked, told = as_list(row[questions]), as_list(row[answers])
            if len(asked) != len(told):
                raise ValueError(f"It has {len(asked)} questions, but {len(told)} answers.")
            check_choice_answers(row, told)
            pairs = [(q, a) for q, a in zip(asked, told) if not _says_nothing(a)] or zip(asked, told)
            return [_checked(question_and_answer(as_text(q), as_text(a))) for q, a in pairs], []
    has_image = bool(_images_of(row))
    draw = random.Random(Path(name).name)  # the same wherever the file lies
    captions = row.get("captions", row.get("caption", row.get("text") if has_image else None))
    if captions is not None and not has_image:
        raise ValueError("It has a caption, but no image.")
    if captions is not None:
        prompt = draw.choice(prompts.caption)  # one for all, so that they share it, see `packing.share_prefixes`
        told = as_list(captions)
        told = [text for text in told if not _says_nothing(text)] or told  # one person of five said nothing
        return [_checked(question_and_answer(prompt, text)) for text in told], []
    if has_image and "label" in row:
        return [_checked(_of_label(row, draw, prompts))], []
    if "instruction" in row and "output" in row:
        asked = "\n".join(filter(None, [row["instruction"], row.get("input")]))
        return [_checked(question_and_answer(asked, row["output"]))], []
    if "text" in row:
        return [_checked([{"role": "text", "content": row["text"]}])], []
    raise ValueError(
        f"Its columns {sorted(map(str, row))} fit none of the layouts messages, conversations, question and answer, "
        "caption, sentence and label, label, instruction and output, texts, text: name them in the source's `columns`."
    )


def _of_label(row, draw, prompts):
    """The question and the answer of a row with a label."""
    label = row["label"]
    if "sentence" in row:
        truth = {"true": "true", "false": "false"}.get(str(label).lower())
        if truth is None:
            raise ValueError(f"Its sentence has the label {label!r}, which is neither true nor false.")
        return question_and_answer(draw.choice(prompts.statement).replace("{}", row["sentence"]), truth)
    if not isinstance(label, str):
        raise ValueError(f"Its label {label!r} is no name of a class: give names, not numbers.")
    return question_and_answer(draw.choice(prompts.label), label)


def as_list(value):
    """A list; of one thing, a list of it; of a list of dicts that is stored by columns, the dicts."""
    if isinstance(value, dict) and value and all(isinstance(column, (list, tuple)) for column in value.values()):
        return [dict(zip(value, values)) for values in zip(*value.values())]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _says_nothing(answer):
    return answer is None or (isinstance(answer, str) and not answer.strip())


def check_choice_answers(row, answers):
    """Raise ValueError where an answer is the number or the letter of a choice, and the choices are not shown."""
    choices = row.get("choices", row.get("options"))
    choices = choices.get("text") if isinstance(choices, dict) else choices
    choices = [_plain(choice) for choice in choices] if isinstance(choices, (list, tuple)) else []
    asked = _plain(" ".join(str(question) for question in as_list(row.get("question", row.get("questions", "")))))
    if all(choice in asked for choice in choices):
        return
    for answer in answers:
        is_number = isinstance(answer, (int, float)) or (isinstance(answer, str) and len(answer.strip(" ().")) == 1)
        if is_number and _plain(answer) not in choices:
            raise ValueError(
                f"Its answer {answer!r} is none of its {len(choices)} choices: give the text of the right one, and "
                "put the choices into the question if they are to be chosen from."
            )


def _plain(value):
    return str(as_text(value)).strip().casefold()


def as_text(value):
    """Text, a number or a truth value as text; anything else stays, and is refused later."""
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers of which some are missing
        value = int(value)
    return str(value) if isinstance(value, (bool, int, float)) else value


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
        if not isinstance(content, str):
            content, given = _parts_and_images(content or [])
            images += given
        messages.append({"role": ROLES[role], "content": content})
    spoken = [message["role"] for message in messages]
    if spoken and spoken[0] == "assistant":  # an answer to nothing, as in ShareGPT: left out, as LLaVA does
        messages = messages[next((i for i, role in enumerate(spoken) if role != "assistant"), len(spoken)) :]
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ValueError("It has no answer of an assistant: there is nothing to learn.")
    return [messages], images


def _parts_and_images(content):
    """Parts with places for images, and the images that stand in them."""
    parts, images = [], []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
            continue
        parts.append({"type": "image"})
        key = next((key for key in PART_KEYS if part.get(key) is not None), None)
        if key is not None:
            image = base64.b64decode(part[key]) if key == "base64" else part[key]
            images.append(VideoPath(image) if part["type"] == "video" and isinstance(image, str) else image)
    return parts, images


def _with_places(conversation, has_images):
    """A conversation whose users' `<image>` (and, beside images, `<video>`) have become places."""
    found = []
    for message in conversation:
        parts = message["content"]
        if message["role"] == "user":
            parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
            if has_images or any("<image>" in part.get("text", "") for part in parts):
                parts = [one for p in parts for one in (_split_at_places(p["text"]) if p["type"] == "text" else [p])]
        if not isinstance(parts, str) and all(part["type"] == "text" for part in parts):
            parts = "".join(part["text"] for part in parts)
        found.append({**message, "content": parts})
    return found


def _split_at_places(text):
    """Text to parts; a line break beside a place belongs to it, as people ask without one."""
    parts = []
    for number, piece in enumerate(PLACE.split(text)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
