"""One row of any layout to a `Sample`: images, and conversations about them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vora.data import columns, turns
from vora.data.answers import captions_of, class_of, context_of, has_questions, questions_of, statement_of, text_of
from vora.data.columns import IMAGE_COLUMNS, TURN_COLUMNS, Row, RowOptions, first_of, has_any
from vora.data.images import ImageSource, check_unread_media, images_of_row, located, open_source
from vora.data.prompts import TRUE_FALSE, Prompts
from vora.data.turns import NOTHING_TO_LEARN, Conversation, question_and_answer


@dataclass
class Sample:
    """Images (or none) and independent conversations about them, see `vora.data.turns`. Without places, images go
    before the first user's text. Plain text to go on alone is one message of the role `text`."""

    name: str  # says where it stands, for messages about bad ones
    images: Sequence[ImageSource]
    conversations: list[Conversation]
    allow_urls: bool = False  # whether images are fetched from URLs

    def open_images(self) -> list[Image.Image | list[Image.Image]]:
        """The images as RGB images, a video as a list of them; ValueError if one cannot be read."""
        return [open_source(image, self.allow_urls) for image in self.images]

    def messages(self, opened: Sequence[Any], conversation: Conversation) -> Conversation:
        """A conversation with the opened images in it, as the processor takes it; ValueError if it has another number
        of places than there are images."""
        count = turns.num_places(conversation)
        if count == 0 and opened:
            conversation = turns.with_places_first(conversation, len(opened))
        elif count != len(opened):
            raise ValueError(f"It has {count} places for images, but {len(opened)} images.")
        return turns.filled(conversation, opened)


def without_images(sample: Sample) -> Sample:
    """A sample without its images and their places: only the text is left."""
    texts = [[{**turn, "content": turns.text_in(turn)} for turn in said] for said in sample.conversations]
    return replace(sample, images=[], conversations=texts)


def to_sample(row: Row, name: str = "", image_folder: str | Path = ".", options: RowOptions = RowOptions()) -> Sample:
    """A row of a file as a `Sample`; paths of images start at `image_folder`.

    Layouts: `messages`; `conversations` (LLaVA, VoRA: `from` and `value`, `<image>` in the text); `question(s)` and
    `answer(s)`, after a `context` if there is one; `caption(s)`; `sentence` and `label` (true or false, as NLVR);
    `label`, the name of a class; `instruction`, `input` or `context`, and `output` (Alpaca, Dolly); `texts` (the
    Cauldron, FineVision: turns of `user` and `assistant`); `text`: a caption beside an image, plain text to go on
    alone. Each with `image`, `images`, `frames`, `video`, `videos` or none; several frames for one place are a video.
    `system` and `history` go before what is said.
    ValueError if the row fits no layout, or what it holds is not as the layout says.
    """
    row = columns.without_layouts_before(columns.usable(row, options.columns), options.columns.keys())
    inline: list[Any] = []
    if has_turns := has_any(row, *TURN_COLUMNS):
        conversation, inline = turns.conversation_of(first_of(row, *TURN_COLUMNS), row)
        if inline and has_any(row, *IMAGE_COLUMNS):
            raise ValueError("It has images both in its messages and in a column of their own.")
    images = [located(image, image_folder) for image in inline] or images_of_row(row, image_folder)
    if has_turns:
        conversations = [conversation]
    else:
        conversations = _conversations_of(row, bool(images), random.Random(Path(name).name), options.prompts)
    if not images:
        check_unread_media(row)
    _check_is_learned(row, conversations, has_turns)
    lead = turns.lead_of(row)
    conversations = [turns.with_places(turns.with_lead(lead, one), bool(images)) for one in conversations]
    if has_any(row, "frames", "video") and len(images) > 1 and turns.num_places(conversations[0]) < 2:
        images = [images]  # frames of one video
    return Sample(name, images, conversations, options.allow_urls)


def _check_is_learned(row: Row, conversations: list[Conversation], has_turns: bool) -> None:
    """Raise ValueError where columns say that answers are bad ones, or what stands in their places for boxes."""
    if row.get("kto_tag") is False or (has_turns and row.get("label") is False):
        raise ValueError("Its answer is marked as one that is not wanted (label or kto_tag is false).")
    places = ("<bbox>", "<ref-object>")
    texts = [turns.text_in(message) for one in conversations for message in one]
    if "objects" in row and any(place in text for place in places for text in texts):
        raise ValueError("Its texts have places for 'objects', which is not understood: write out what stands there.")


def _conversations_of(row: Row, has_image: bool, draw: random.Random, prompts: Prompts) -> list[Conversation]:
    """The conversations of a row that is not made of turns; `draw` is the same wherever its file lies."""
    if "texts" in row:
        pairs = [question_and_answer(turn["user"], turn["assistant"]) for turn in row["texts"]]
        return [sum(pairs, [])]
    if has_questions(row):
        found = []
        for question in questions_of(row):
            if isinstance(question, ValueError):
                raise question
            if question.answers:
                found.append(question_and_answer(question.text, question.most_frequent))
        if not found:
            raise ValueError(NOTHING_TO_LEARN)
        return found
    if has_any(row, "captions", "caption") or ("text" in row and has_image):
        if not has_image:
            raise ValueError("It has a caption, but no image.")
        prompt = draw.choice(prompts.caption)  # one for all, so that they share it, see `packing.share_prefixes`
        return [question_and_answer(prompt, caption) for caption in captions_of(row)]
    if has_image and "label" in row:
        if not has_any(row, "sentence", "statement"):
            return [question_and_answer(draw.choice(prompts.label), class_of(row, None))]
        statement = statement_of(row)
        prompt = draw.choice(prompts.statement).replace("{}", statement.sentence)
        return [question_and_answer(prompt, TRUE_FALSE[0] if statement.truth else TRUE_FALSE[1])]
    if "instruction" in row and "output" in row:
        asked = [*(text_of(row.get(column), column) for column in ("instruction", "input")), context_of(row)]
        return [question_and_answer("\n".join(filter(None, asked)), row["output"])]
    if "text" in row:
        text = text_of(row["text"], "text")
        if not text.strip():
            raise ValueError(NOTHING_TO_LEARN)
        return [[{"role": "text", "content": text}]]
    raise ValueError(
        f"Its columns {sorted(map(str, row))} fit no layout (caption; question, answer; ...): name them in "
        "the source's `columns`, or with --column image=photo."
    )
