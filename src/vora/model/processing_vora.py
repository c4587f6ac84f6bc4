"""Where a prompt becomes tokens: messages with images to model inputs. Training, chat and evaluation all pass here."""

import copy
import math

import numpy as np
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_vora import Video, VoraImagesKwargs, flat_images, is_video

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


class VoraProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: VoraImagesKwargs
    # templates write the special tokens themselves
    _defaults = {"text_kwargs": {"padding": True, "add_special_tokens": False}, "images_kwargs": {}}


class VoraProcessor(ProcessorMixin):
    """Image processor and tokenizer in one; `apply_chat_template` makes model inputs from messages.

    Content is text, or a list of texts, images and videos: `{"type": "video", "video": frames}` with all that `Video`
    takes. A video is an image of several frames; no second processor is needed for it.

    Args:
        image_processor: a `VoraImageProcessor`.
        tokenizer: the LLM's.
        chat_template: Jinja template that takes content as strings or as lists of images and texts.
        image_token: the token that stands for one patch; one stands for a whole image in text given by hand.
    """

    _auto_class = "AutoProcessor"
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    valid_processor_kwargs = VoraProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_token="<image>", **kwargs):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        # left, so that generation continues right after every prompt of a batch; calls and saving read init_kwargs
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        self._ends = None, []  # of which template, see `end_ids`
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def set_template(self, template):
        """Write turns by this Jinja template from now on; content may be a list of images and texts.

        Returns:
            This processor.
        """
        self.chat_template = FLATTEN_CONTENT.replace("IMAGE_TOKEN", self.image_token) + template
        return self

    def apply_chat_template(self, conversation, *args, **kwargs):
        return super().apply_chat_template(_videos_as_images(conversation), *args, **kwargs)

    def prepare_inputs_layout(self, images=None, **kwargs):
        """As the library's, but an empty list is no images."""
        images = None if images is None or not list(flat_images(images)) else images
        return super().prepare_inputs_layout(images=images, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Images and their places must match; the library's own check knows no `Video`.

        Raises:
            ValueError: they do not, or videos or audio come outside messages.
        """
        if videos is not None or audio is not None:
            raise ValueError("Videos go into messages as {'type': 'video', 'video': frames}; audio is not understood.")
        super().validate_inputs(text=None if text is None and images is None else [""], **kwargs)
        num_places = sum(one.count(self.image_token) for one in text or [])
        num_images = 0 if images is None else sum(1 for _ in flat_images(images))
        if text is not None and num_places != num_images:
            raise ValueError(
                f"The text has {num_places} places for images ({self.image_token}), but {num_images} images are given."
            )

    def _process_images(self, images, **kwargs):
        inputs = self.image_processor(images, **kwargs)
        return inputs, [self.replace_image_token(inputs, index) for index in range(len(inputs["image_grid_thw"]))]

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """One placeholder to as many image tokens as the image makes."""
        num_patches = math.prod(image_inputs["image_grid_thw"][image_idx].tolist())
        return self.image_token * (num_patches // self.image_processor.patch_merge**2)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Image tokens for images of (height, width) pixels, without reading them."""
        patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes or []]
        tokens = [count // self.image_processor.patch_merge**2 for count in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)

    def training_sample(self, messages, image_inputs=None, **images_kwargs):
        """One conversation as unpadded model inputs with labels on the assistant's tokens.

        The conversation is rendered up to each assistant turn and past it, so that labels are exact for any template
        that renders a conversation's beginning as the beginning of the whole, and so that each turn is learned after
        the very tokens that `apply_chat_template` makes of its prompt.

        Args:
            image_inputs: what the image processor made of the same images before, to spare it the work.

        Returns:
            input_ids int[T], labels int[T] (-100 outside the assistant's turns), and, if there are images,
            pixel_values float[P, C*p*p] and image_grid_thw int[N, 3], as numpy arrays.

        Raises:
            ValueError: the template does not render turns one after the other, no assistant speaks, or placeholders
                and images do not match.
        """
        messages, ids, labels, done, ends = _videos_as_images(messages), [], [], "", self.end_ids
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if turn == 0:
                raise ValueError("The conversation begins with an assistant, who answers nothing.")
            prompt = self.apply_chat_template(messages[:turn], add_generation_prompt=True)
            whole = self.apply_chat_template(messages[: turn + 1])
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(
                    f"The chat template rewrites earlier text when turn {turn} is added, so the assistant's tokens "
                    "cannot be told apart: give from_llm a chat_template that only appends."
                )
            asked = self._ids_after(ids, done, prompt)
            spoken = self._ids_after(ids + asked, prompt, whole)
            ids += asked + spoken
            labels += [-100] * len(asked) + self._labels_of(spoken, ends)
            done = whole
        if not ids:
            raise ValueError("The conversation has no assistant turn, so there is nothing to learn from it.")

        images, counts = [source for message in messages for source in self._images_of(message)], []
        sample = {}
        if images:
            sample = image_inputs or self.image_processor(images, return_tensors="np", **images_kwargs)
        if images:
            counts = sample["image_grid_thw"].prod(-1) // self.image_processor.patch_merge**2
        ids, labels = np.array(ids), np.array(labels)
        places = ids == self.image_token_id
        if places.sum() != len(images):
            raise ValueError(
                f"The conversation has {places.sum()} places for images ({self.image_token}) but {len(images)} images "
                "up to its last assistant turn: give one image per place, and none after it."
            )
        repeats = np.ones(len(ids), int)
        repeats[places] = counts  # an image's place becomes its image tokens
        labels[places] = -100
        return {**sample, "input_ids": ids.repeat(repeats), "labels": labels.repeat(repeats)}

    def text_sample(self, text):
        """Plain text as `training_sample`, every token of it to be learned.

        Raises:
            ValueError: it has fewer than two tokens.
        """
        tokenizer = self.tokenizer
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if ids[-2:-1] == [tokenizer.eos_token_id]:
            ids.pop()  # the tokenizer ends texts by itself
        if len(ids) < 2 or self.image_token_id in ids:
            raise ValueError(f"Its text {text[:50]!r} is empty, or holds the image token {self.image_token}.")
        return {"input_ids": np.array(ids), "labels": np.array(ids)}

    def _ids_after(self, ids, beginning, text):
        """Ids of the rest of a text whose beginning has become `ids`."""
        whole = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        # a token would reach across the border, where generation starts anew
        return self.tokenizer(text[len(beginning) :], add_special_tokens=False)["input_ids"]

    def text_tokenizer(self):
        """The tokenizer as it goes with the language model alone: its chat template knows no images."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.init_kwargs.pop("processor_class", None)
        tokenizer._processor_class = None
        lead = FLATTEN_CONTENT.replace("IMAGE_TOKEN", self.image_token)
        tokenizer.chat_template = self.chat_template.removeprefix(lead)
        return tokenizer

    @property
    def end_ids(self):
        """Tokens that end an assistant's turn, a sorted list: the tokenizer's own, and the special token that the chat
        template writes after an answer, which is another one in base models such as Qwen2.5's."""
        if self._ends[0] != self.chat_template:
            self._ends = self.chat_template, self._ends_of_template()
        return self._ends[1]

    def _ends_of_template(self):
        tokenizer, answer = self.tokenizer, "yes"
        ends = {tokenizer.eos_token_id} - {None}
        messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}]
        try:
            told = self.apply_chat_template(messages)
        except Exception:  # a template may raise what it likes, and still render what has no answer yet
            return sorted(ends)
        if answer in told:
            after = tokenizer(told.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
            known = tokenizer.added_tokens_decoder
            ends |= set([id for id in after if id in known and known[id].special][:1])
        return sorted(ends)

    def end_turns_of(self, model):
        """Let the answers of a model end where this chat template ends a turn."""
        known = model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [known]
        ends = sorted({*self.end_ids, *known} - {None})
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends

    @staticmethod
    def _labels_of(ids, ends):
        """An assistant's turn up to its end-of-turn token; what the template puts after it is not spoken."""
        last = max((place for place, id in enumerate(ids) if id in ends), default=len(ids) - 1)
        return ids[: last + 1] + [-100] * (len(ids) - last - 1)

    @staticmethod
    def _images_of(message):
        if not isinstance(message["content"], (list, tuple)):
            return []
        keys = ("image", "url", "path", "base64")
        parts = [part for part in message["content"] if part["type"] == "image"]
        return [part[key] for part in parts for key in keys if key in part]


def _videos_as_images(conversation):
    """Messages, or a batch of them, in which each video is an image of several frames."""

    def part_of(part):
        key = next((key for key in ("video", "path", "url") if part.get(key) is not None), None)
        if part["type"] != "video" or key is None:
            return part
        given = part[key]
        return {"type": "image", "image": given if is_video(given) else Video(given)}

    if conversation and isinstance(conversation[0], (list, tuple)):
        return [_videos_as_images(one) for one in conversation]
    return [
        message
        if not isinstance(message.get("content"), (list, tuple))
        else {**message, "content": [part_of(part) for part in message["content"]]}
        for message in conversation
    ]
