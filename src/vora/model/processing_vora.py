"""Where a prompt becomes tokens: messages with images to model inputs. Training, chat and evaluation all pass here."""

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_vora import Video, VoraImageProcessor, VoraImagesKwargs, are_several, flat_images, is_video

# Put before an LLM's own template, this lets it take content that is a list of images and texts.
FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string or message['content'] is not iterable -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set content = namespace(text='') -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set content.text = content.text + 'IMAGE_TOKEN' -%}
      {%- elif part['type'] == 'text' -%}
        {%- set content.text = content.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
TEXT_PARTS = ("text", "input_text", "output_text")  # the latter two of OpenAI's newer schema
SPELT = "\ufdd0"  # no text's character: stands within a control token that a person spelt, where tokenizing is parted


class VoraProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    images_kwargs: VoraImagesKwargs
    # templates write the special tokens themselves
    _defaults = {"text_kwargs": {"padding": True, "add_special_tokens": False}, "images_kwargs": {}}


class VoraProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; `apply_chat_template` makes model inputs from messages.

    Content is text, or a list of texts, images and videos: `{"type": "video", "video": frames}` with all that `Video`
    takes. Special tokens that a message spells (the image token, those of roles and ends) are plain text. In texts
    given by hand one `image_token` stands for a whole image; in messages `image_markers`, two texts, go around each.
    """

    _auto_class = "AutoProcessor"
    attributes = ["image_processor", "tokenizer"]
    tokenizer_class = "AutoTokenizer"
    valid_processor_kwargs = VoraProcessorKwargs

    def __init__(
        self, image_processor: VoraImageProcessor | None = None, tokenizer: Any = None,
        chat_template: str | None = None, image_token: str = "<image>", image_markers: Any = ("", ""), **kwargs: Any,
    ):  # fmt: skip
        self.image_token, self.image_markers = image_token, list(image_markers)
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        # left, so that generation continues right after every prompt of a batch; calls and saving read init_kwargs
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        self._found: dict[tuple, Any] = {}  # see `_once`
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def set_template(self, template: str) -> "VoraProcessor":
        """Write turns by an LLM's Jinja template from now on; gives itself."""
        self.chat_template = self._lead() + template
        return self

    def _lead(self) -> str:
        begin, end = (SPELT + one + SPELT if one else "" for one in self.image_markers)  # tokens by themselves
        return FLATTEN_CONTENT.replace("IMAGE_TOKEN", begin + self.image_token + end)

    def apply_chat_template(self, conversation: Sequence, *args: Any, **kwargs: Any) -> Any:
        """As the library's; ValueError where a part is no text, image or video, so that it would be left out."""
        kwargs |= {name: self._spelt(kwargs[name], "user") for name in ("tools", "documents") if name in kwargs}
        return super().apply_chat_template(self._normalised(conversation, is_batch=True), *args, **kwargs)

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """As the library's: images alone, texts alone, or texts whose image tokens stand for the images in order."""
        if not any(SPELT in one for one in ([text] if isinstance(text, str) else text or [])):
            return super().__call__(images=images, text=text, **kwargs)
        images, texts, *_ = self.prepare_inputs_layout(images=images, text=text)
        self.validate_inputs(images=images, text=texts)
        kwargs = self._merge_kwargs(self.valid_processor_kwargs, self.tokenizer.init_kwargs, **kwargs)
        inputs, lengths = self._process_images(images, **kwargs["images_kwargs"]) if images is not None else ({}, [])
        texts, _ = self.get_text_with_replacements(texts, lengths)
        names, given = ("padding", "max_length", "pad_to_multiple_of", "return_tensors"), kwargs["text_kwargs"]
        options, ids = {name: given.get(name) for name in names}, [self.ids_of(one) for one in texts]
        if given.get("truncation"):  # what is cut of images is named where they are put in
            most = given.get("max_length") or self.tokenizer.model_max_length
            ids = [one[-most:] if self.tokenizer.truncation_side == "left" else one[:most] for one in ids]
        inputs.update(self.tokenizer.pad({"input_ids": ids}, **options))
        return BatchFeature(inputs, tensor_type=options["return_tensors"])

    def prepare_inputs_layout(self, images: Any = None, **kwargs: Any) -> tuple:
        """As the library's, but an empty list is no images."""
        images = None if images is None or not list(flat_images(images)) else images
        return super().prepare_inputs_layout(images=images, **kwargs)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Raise ValueError unless images and their places match; the library's own check knows no `Video`."""
        if videos is not None or audio is not None:
            raise ValueError("Videos go into messages as {'type': 'video', 'video': frames}; audio is not understood.")
        super().validate_inputs(text=None if text is None and images is None else [""], **kwargs)
        if text is None:
            return
        given = [] if images is None else images
        if not (isinstance(given, (list, tuple)) and given and all(map(are_several, given))):
            text, given = ["".join(text)], [given]  # in one list they follow each other through all texts
        if len(given) != len(text):
            raise ValueError(f"{len(text)} texts are given, but lists of images for {len(given)}.")
        for number, (one, row) in enumerate(zip(text, given)):
            num_places, num_images = one.count(self.image_token), sum(1 for _ in flat_images(row))
            if num_places != num_images:
                raise ValueError(
                    f"Row {number}: the text has {num_places} places for images ({self.image_token}), but "
                    f"{num_images} images are given."
                )

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        inputs = self.image_processor(images, **kwargs)
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(inputs["image_grid_thw"]))]

    def replace_image_token(self, image_inputs: Mapping, image_idx: int, **kwargs: Any) -> str:
        num_patches = math.prod(image_inputs["image_grid_thw"][image_idx].tolist())
        return self.image_token * (num_patches // self.image_processor.patch_merge**2)

    def _get_num_multimodal_tokens(self, image_sizes: Iterable | None = None, **kwargs: Any) -> MultiModalData:
        patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes or []]
        tokens = [count // self.image_processor.patch_merge**2 for count in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)

    def training_sample(self, messages: Sequence[dict], *args: Any, **images_kwargs: Any) -> dict[str, np.ndarray]:
        """The only one of `training_samples`; ValueError where there are several."""
        sample, *others = self.training_samples(messages, *args, **images_kwargs)
        if others:
            raise ValueError("The chat template writes earlier turns anew: take all samples, of training_samples.")
        return sample

    def training_samples(
        self, messages: Sequence[dict], image_inputs: Mapping | None = None, **images_kwargs: Any
    ) -> list[dict[str, np.ndarray]]:
        """One conversation as unpadded model inputs: input_ids and labels int[T] (-100 outside the assistant's turns),
        and, if there are images, pixel_values float[P, C*p*p] and image_grid_thw int[N, 3].

        The conversation is rendered up to each assistant turn and past it, so that each turn is learned after the very
        tokens that `apply_chat_template` makes of its prompt: where the template then writes what was before anew, as
        Qwen3's leaves earlier thoughts out, in another sample. A message with `learn: False` is not learned.
        `image_inputs` is what the image processor made of the same images before. ValueError where the template does
        not put an answer after its prompt, no assistant speaks, or places and images do not match.
        """
        messages, done, end = self._normalised(messages), "", 0
        samples = [(ids := list[int](), labels := list[int]())]
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                raise ValueError("The conversation begins with an assistant, who answers nothing.")
            prompt = self.apply_chat_template(messages[:turn], add_generation_prompt=True)
            whole = self.apply_chat_template(messages[: turn + 1])
            if not whole.startswith(prompt):
                raise ValueError(
                    f"The chat template rewrites the prompt of turn {turn} when its answer is added: give from_llm a "
                    "chat_template that only appends."
                )
            if prompt.startswith(done):
                request = self._ids_after(ids, done, prompt)
            else:
                request = self.ids_of(prompt)
                if request[:end] != ids[:end]:
                    end = 0
                    samples.append(([], []))
                # without what closes a conversation, as in Phi-3's template
                ids, labels, request = ids[:end], labels[:end], request[end:]
            answer = self._ids_after(ids + request, prompt, whole)
            # up to its end-of-turn token; what the template puts after it is not learned
            ends = [place + 1 for place, id in enumerate(answer) if id in self.end_ids] or [len(answer)]
            stop = ends[-min(len(ends), self._once(self._ends_of_template)[1])]
            learned = answer[:stop] if message.get("learn", True) else []
            labels += [-100] * len(request) + learned + [-100] * (len(answer) - len(learned))
            ids, done, end = ids + request + answer, whole, len(ids) + len(request) + stop
            samples[-1] = ids, labels
        if not ids:
            raise ValueError("The conversation has no assistant turn, so there is nothing to learn from it.")

        parts = [part for one in messages if isinstance(one.get("content"), list) for part in one["content"]]
        images = [part[key] for part in parts for key in ("image", "url", "path", "base64") if key in part]
        if (count := ids.count(self.image_token_id)) != len(images):
            raise ValueError(
                f"The conversation has {count} places for images ({self.image_token}) but {len(images)} images "
                "up to its last assistant turn: give one image per place, and none after it."
            )
        inputs = image_inputs or self.image_processor(images, return_tensors="np", **images_kwargs) if images else {}
        samples = [one for one in samples if set(one[1]) != {-100}] or samples[-1:]
        return [self._with_image_tokens(np.array(ids), np.array(labels), inputs) for ids, labels in samples]

    def _with_image_tokens(self, ids: np.ndarray, labels: np.ndarray, inputs: Mapping) -> dict[str, np.ndarray]:
        """A sample with the first images, as many as it has places, each of which becomes its image tokens."""
        places = ids == self.image_token_id
        if not places.any():
            return {"input_ids": ids, "labels": labels}
        grids, repeats, labels[places] = inputs["image_grid_thw"][: places.sum()], np.ones(len(ids), int), -100
        repeats[places] = grids.prod(-1) // self.image_processor.patch_merge**2
        found = {"pixel_values": inputs["pixel_values"][: grids.prod(-1).sum()], "image_grid_thw": grids}
        return {**found, "input_ids": ids.repeat(repeats), "labels": labels.repeat(repeats)}

    def text_sample(self, text: str) -> dict[str, np.ndarray]:
        """Plain text as `training_sample`, every token of it to be learned; ValueError where these are below two."""
        ids, end = self.text_ids(text), [self.tokenizer.eos_token_id]
        ids += end if ids[-1:] != end else []  # some tokenizers end texts by themselves
        if len(ids) < 2:
            raise ValueError(f"Its text {text[:50]!r} is empty.")
        return {"input_ids": np.array(ids), "labels": np.array(ids)}

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text as the tokenizer makes them; special tokens that it spells are plain text."""
        if SPELT not in (spelt := self._spelt(text, "user")):
            return self.tokenizer(text)["input_ids"]
        return [id for id in self.tokenizer("")["input_ids"] if id != self.tokenizer.eos_token_id] + self.ids_of(spelt)

    def _ids_after(self, ids: list[int], beginning: str, text: str) -> list[int]:
        """Ids of the rest of a text whose beginning has become `ids`."""
        whole = self.ids_of(text)  # a token of it may reach across the border, where generation starts anew
        return whole[len(ids) :] if whole[: len(ids)] == ids else self.ids_of(text[len(beginning) :])

    def ids_of(self, text: str) -> list[int]:
        """Ids of a text that a template made; what is `SPELT` in it is parted and so no control token."""
        first, *rest = text.split(SPELT)
        ids = list(self.tokenizer(first, add_special_tokens=False)["input_ids"])
        for part in rest:  # after a line break, for some tokenizers put a space before whatever comes first
            ids += self._ids_after(self.ids_of("\n"), "\n", "\n" + part)
        return ids

    def _spelt(self, text: Any, role: str | None) -> Any:
        """What a message says, the control tokens in its texts marked as letters; an assistant may think."""
        if isinstance(text, Mapping):
            return {self._spelt(key, role): self._spelt(value, role) for key, value in text.items()}
        if isinstance(text, (list, tuple)):
            return [self._spelt(one, role) for one in text]
        if not isinstance(text, str):
            return text
        if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
            raise ValueError(f"A message of {role!r} holds {half[0]!a}, half of a surrogate pair: that is no text.")
        tokens = self._once(self._control_tokens)[role == "assistant"]
        return re.sub(tokens, lambda found: found[0][:1] + SPELT + found[0][1:], text.replace(SPELT, ""))

    def _control_tokens(self) -> list[str]:
        """A pattern of all special tokens, and of those that mark roles in the chat template (some tokenizers have
        ChatML's as ordinary ones); and one for an assistant, who may think."""
        tokens = {str(token): token.special for token in self.tokenizer.added_tokens_decoder.values()}
        marks = {one for one in tokens if re.fullmatch(r"[^\w\s].*[^\w\s]", one) and one in (self.chat_template or "")}
        special = {self.image_token, *(one for one in tokens if tokens[one] and len(one.strip()) > 1)}
        unthinking = {one for one in special | marks if "think" not in one.lower()}
        sets = special | unthinking, unthinking
        return ["|".join(map(re.escape, sorted(one, key=len, reverse=True))) for one in sets]

    def _once(self, find: Callable[[], Any]) -> Any:
        """What a method finds, asked once for each chat template."""
        if (key := (find.__name__, self.chat_template)) not in self._found:
            self._found[key] = find()
        return self._found[key]

    def _normalised(self, conversation: Sequence, is_batch: bool = False) -> list:
        """Messages, or a batch of them, as the template and the library take them."""
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"A conversation is a list of messages: this {type(conversation).__name__} has none.")
        if is_batch and isinstance(conversation[0], (list, tuple)):
            return [self._normalised(one) for one in conversation]
        messages = [dict(message) if isinstance(message, Mapping) else {} for message in conversation]
        for number, message in enumerate(messages):
            content, role, parts = message.get("content") or "", message.get("role"), list[dict[str, Any]]()
            is_role = isinstance(role, str) and re.fullmatch(r"[\w -]+", role)  # which spells no control token
            if not (is_role and isinstance(content, (str, list, tuple))):
                raise ValueError(f"Message {number} is no dict with a role and, as content, text or a list of parts.")
            if isinstance(content, (list, tuple)):
                for part in (self._part(one, number) for one in content):
                    if part["type"] == "text":  # joined to that before, as they may spell a token together
                        before = parts.pop()["text"] if parts and parts[-1]["type"] == "text" else ""
                        part = {"type": "text", "text": self._spelt(before + part["text"], role)}
                    parts.append(part)
                message["content"] = parts
            try:
                message |= {k: self._spelt(v, role) for k, v in message.items() if k != "role" and v is not parts}
            except RecursionError:
                raise ValueError(f"Message {number} is nested too deeply.") from None
        return messages

    def _part(self, part: Any, number: int) -> dict[str, Any]:
        """A part of a message's content as text or image: a video is an image of several frames."""
        part = part if isinstance(part, Mapping) else {"type": type(part).__name__}
        kind = part.get("type")
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind == "image":
            return {key: value for key, value in part.items() if value is not None}
        if kind == "image_url" and (url := part.get("image_url")):
            return {"type": "image", "url": url["url"] if isinstance(url, Mapping) else url}
        film = next((part[key] for key in ("video", "path", "url") if part.get(key) is not None), None)
        if kind == "video" and film is not None:
            return {"type": "image", "image": film if is_video(film) else Video(film, self.image_processor.allow_urls)}
        raise ValueError(
            f"Message {number} holds a part of type {kind!r} (with {', '.join(map(repr, part))}) that would be left "
            "out: give parts of type text, image, image_url or video, each with what it is."
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list:
        """As the library's, without how the last call padded and cut, which a tokenizer takes for its own way."""
        self.tokenizer("")
        return super().save_pretrained(*args, **kwargs)

    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as it goes with the language model alone: its chat template knows no images."""
        self.tokenizer("")  # as in `save_pretrained`
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.init_kwargs.pop("processor_class", None)
        tokenizer._processor_class = None
        tokenizer.chat_template = self.chat_template.removeprefix(self._lead())
        return tokenizer

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an assistant's turn, a sorted list: the tokenizer's own, and the special token that the chat
        template writes after an answer, which is another one in base models such as Qwen2.5's."""
        return self._once(self._ends_of_template)[0]

    def _ends_of_template(self) -> tuple[list[int], int]:
        """`end_ids`, and how many of them the template writes after the last answer (at least 1)."""
        tokenizer, known, answer, text = self.tokenizer, self.tokenizer.added_tokens_decoder, "(yes)", ""
        messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}]
        with suppress(Exception):  # a template may raise what it likes, and still render what has no answer yet
            text = self.apply_chat_template(messages)
        after = tokenizer(text.partition(answer)[2], add_special_tokens=False)["input_ids"]
        ends = {tokenizer.eos_token_id, *[id for id in after if id in known and known[id].special][:1]} - {None}
        return sorted(ends), max(1, sum(id in ends for id in after))

    def end_turns_of(self, model: PreTrainedModel) -> None:
        """Let the answers of a model end where this chat template ends a turn."""
        known = model.generation_config.eos_token_id
        ends = sorted({*self.end_ids, *(known if isinstance(known, list) else [known])} - {None})
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
