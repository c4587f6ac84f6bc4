"""What one request, and all of them together, may take of a server: the one place of such numbers."""

from dataclasses import dataclass, replace

from vora.model.fetch_image import POLICY, ImagePolicy


@dataclass(frozen=True)
class Limits:
    """Of `vora serve`; each can be set on its command line or here."""

    max_body_bytes: int = 20_000_000  # of a request, images in base64 included
    max_image_bytes: int = 10_000_000  # of one image as it is sent
    max_image_pixels: int = 25_000_000
    max_images: int = 8  # of a request
    max_messages: int = 256
    max_prompt_tokens: int = 8192
    max_tokens: int = 1024  # of an answer; more are refused, and an answer without a wish has these
    max_stops: int = 4  # texts that end an answer, as OpenAI has it
    max_batch_size: int = 16  # answers that are generated together
    max_waiting: int = 64  # requests beyond those; more are refused
    request_seconds: float = 300.0  # from the first byte to the last, waiting included
    body_seconds: float = 30.0  # for the body to arrive
    stop_seconds: float = 30.0  # for running answers when the server is told to stop
    retry_seconds: int = 2  # what a refused client is told to wait

    @property
    def max_requests(self) -> int:
        """Taken at once."""
        return self.max_batch_size + self.max_waiting

    @property
    def max_characters(self) -> int:
        """Of all texts of a request, checked before they are read as tokens."""
        return 64 * self.max_prompt_tokens

    @property
    def images(self) -> ImagePolicy:
        return replace(
            POLICY, max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels, max_decode_seconds=5.0,
            max_seconds=min(10.0, self.request_seconds),
        )  # fmt: skip
