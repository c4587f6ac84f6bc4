"""A conversation about images: turns are kept, so that a question can refer to what was said."""

from collections.abc import Generator, Sequence
from contextlib import closing

from PIL import Image

from vora.model.fetch_image import fetch_image
from vora.model.image_processing_vora import Video, is_video
from vora.serve.engine import Engine, Message


class Chat:
    """The turns of one conversation; an answer that breaks off leaves them as they were. Temperature 0 is greedy."""

    def __init__(self, engine: Engine, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        self.engine, self.max_new_tokens, self.temperature = engine, max_new_tokens, temperature
        self.messages: list[Message] = []

    @property
    def num_images(self) -> int:
        """Of images and videos, in all turns."""
        parts = [part for message in self.messages if message["role"] == "user" for part in message["content"]]
        return sum(part["type"] != "text" for part in parts)

    def ask(self, text: str, images: Sequence[str | Image.Image | Video] = ()) -> Generator[str, None, None]:
        """Stream the answer to a question, piece by piece. The images (paths, PIL images or videos; fetch those at
        URLs first) come before its text. ValueError if one cannot be read, or the LLM's context is exceeded."""
        content: list[Message] = [
            {"type": "video", "video": image} if is_video(image) else {"type": "image", "image": fetch_image(image)}
            for image in images
        ]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        messages, pieces = [*self.messages, turn], []
        answer = self.engine.submit(messages, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        with closing(answer):
            for piece in answer:
                pieces.append(piece)
                yield piece
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces).strip()}]
