"""What a request may say, and what is answered, as OpenAI describes it.

A parameter that would change an answer and that no engine here follows is refused unless its value is the one that
changes nothing. Those that change no answer are taken and left alone.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)  # fmt: skip

NEUTRAL: dict[str, tuple[Any, ...]] = {  # the values that change nothing
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
}  # fmt: skip


def _neutral(name: str) -> Any:
    """A parameter that may say nothing: its values stand in the description."""
    return Field(None, json_schema_extra={"enum": [*NEUTRAL[name], None]})


def _is_unicode(text: str) -> str:
    """JSON may spell half a letter, which nothing that reads texts takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("the text holds half of a surrogate pair, which is no letter.")
    return text


def _form(value: Any) -> str:
    """Of what may be a text or a list, so that errors are about the one that is given."""
    return LIST if isinstance(value, list) else TEXT


def _kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return next((tag for tag in (TEXT, IMAGE) if kind == tag.strip("<>")), None)


TEXT, LIST, IMAGE = TAGS = ("<text>", "<list>", "<image_url>")  # stand in an error's place, and are no keys of a body
Text = Annotated[str, AfterValidator(_is_unicode)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(_Strict):
    url: Text = Field(description="data:image/png;base64,... and, where the server allows it, http(s)://...")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Taken and left alone.")


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[Annotated[TextPart, Tag(TEXT)] | Annotated[ImagePart, Tag(IMAGE)], Discriminator(_kind)]
Parts = Annotated[list[Part], Field(min_length=1)]
Content = Annotated[Annotated[Text, Tag(TEXT)] | Annotated[Parts, Tag(LIST)], Discriminator(_form)]
Stops = list[Annotated[str, StringConstraints(min_length=1), AfterValidator(_is_unicode)]]
Stop = Annotated[Annotated[Text, Tag(TEXT)] | Annotated[Stops, Tag(LIST)], Discriminator(_form)]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = Field(None, description="Taken and left alone: chat templates write no names.")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """What an answer holds besides and says nothing, as a client sends it back: refusal, tool_calls, audio."""
        if not isinstance(values, dict):
            return values
        empty: list[Any] = [None, [], {}]
        return {name: value for name, value in values.items() if value not in empty or name in ("role", "content")}


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Taken and left alone.")


class ChatRequest(_Strict):
    """A question to a model; what is not listed is refused."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # refused unless they say nothing: see NEUTRAL
    n: int | None = _neutral("n")
    frequency_penalty: float | None = _neutral("frequency_penalty")
    presence_penalty: float | None = _neutral("presence_penalty")
    logprobs: bool | None = _neutral("logprobs")
    top_logprobs: int | None = _neutral("top_logprobs")
    logit_bias: dict[str, float] | None = _neutral("logit_bias")
    response_format: dict[str, Any] | None = _neutral("response_format")
    modalities: list[str] | None = _neutral("modalities")
    tools: list[Any] | None = _neutral("tools")
    tool_choice: Any = _neutral("tool_choice")
    functions: list[Any] | None = _neutral("functions")
    function_call: Any = _neutral("function_call")

    # taken and left alone, as they change no answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator(*NEUTRAL)
    @classmethod
    def _says_nothing(cls, value: Any, info: Any) -> Any:
        allowed = NEUTRAL[info.field_name]
        if value is not None and value not in allowed:
            raise ValueError(f"not supported; leave it out, or give {' or '.join(map(repr, allowed))}.")
        return value

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: leave it out, or set stream.")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_tokens(self) -> int | None:
        """That the answer may have."""
        return self.max_completion_tokens or self.max_tokens


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vora"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    engine: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
