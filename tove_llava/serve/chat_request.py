"""Read the body of a chat request: its types, ranges and images."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from tove_llava.core.errors import DataError
from tove_llava.core.json_text import JsonError, loads
from tove_llava.data import IMAGE_PLACEHOLDER
from tove_llava.data.images import count_pixels
from tove_llava.inference.engine import Message, Sampling

MAX_IMAGES = 16
MAX_PIXELS = 40_000_000  # of an image; decoded, it takes 120 MB
MAX_ALL_PIXELS = 100_000_000  # of a request: two or three seconds of decoding
MAX_STOPS = 16
SEEDS = 2**63


class RequestError(DataError):
    """A request that cannot be answered; ``param`` is the key at fault, ``code`` OpenAI's name for the fault."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class _Object(BaseModel):
    """An object whose keys are known; null is as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


class Text(_Object):
    type: Literal["text"]
    text: str

    @field_validator("text")
    @classmethod
    def _checked(cls, text: str) -> str:
        if IMAGE_PLACEHOLDER in text:
            raise ValueError(f"contains {IMAGE_PLACEHOLDER}, which stands for an image; take it out")
        return text


class Link(_Object):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Picture(_Object):
    type: Literal["image_url"]
    image_url: Link

    @field_validator("image_url", mode="before")
    @classmethod
    def _as_object(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class Turn(_Object):
    """A message; clients send back what they received, with its empty keys."""

    role: str
    content: list[Annotated[Text | Picture, Field(discriminator="type")]]
    name: str = ""
    tool_calls: list[Any] = Field([], max_length=0)
    annotations: list[Any] = []
    reasoning_content: str = ""

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, value: Any) -> Any:
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, Text))


class StreamOptions(_Object):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(_Object):
    type: Literal["text"]


class Unsupported(_Object):
    """The keys that may hold only the value that asks for nothing."""

    n: int = Field(1, ge=1, le=1)
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    logit_bias: dict[str, Any] = Field({}, max_length=0)
    logprobs: Literal[False] = False
    top_logprobs: int = Field(0, ge=0, le=0)
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "auto"
    functions: list[Any] = Field([], max_length=0)
    function_call: Literal["none", "auto"] = "auto"
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] = ["text"]
    store: Literal[False] = False


class ChatRequest(Unsupported):
    """The body of a request, with all keys that are taken; the last group has no effect."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0, ge=0, le=2)
    top_p: float = Field(1, gt=0, le=1)
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    include_reasoning: bool = False

    user: str = ""
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    metadata: dict[str, Any] = {}
    service_tier: str = "auto"
    parallel_tool_calls: bool = True

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @classmethod
    def read(cls, body: bytes) -> "ChatRequest":
        """Read a body; RequestError names the key that is wrong."""
        try:
            content = loads(body, finite=False)  # the key of a number that is not finite is named below
        except JsonError as error:
            raise RequestError(f"the request is not valid JSON ({error}, line {error.line})") from error
        if not isinstance(content, dict):
            raise RequestError("the request is not a JSON object with a model and messages")
        try:
            request = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = _path(first["loc"]) or None
            raise RequestError(f"{param or 'the request'}{_reason(first)}", param) from None
        both = {request.max_tokens, request.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        return request

    def sampling(self, longest: int) -> Sampling:
        """Return how to answer; without a number of tokens, up to ``longest``.

        Raises:
            RequestError: a temperature that is too close to 0.
        """
        tokens = self.max_completion_tokens or self.max_tokens or longest
        try:
            return Sampling(tokens, self.temperature, self.top_p, seed=self.seed, stop=tuple(self.stop))
        except DataError as error:
            raise RequestError(str(error), "temperature") from error

    def conversation(self) -> list[Message]:
        """Return the messages, with the content of their image files.

        Raises:
            RequestError: too many images or pixels, or one that is no image. Nothing is decoded.
        """
        images = [
            (f"messages[{index}].content[{place}].image_url", part.image_url.url)
            for index, turn in enumerate(self.messages)
            for place, part in enumerate(turn.content)
            if isinstance(part, Picture)
        ]
        if len(images) > MAX_IMAGES:
            raise RequestError(f"the conversation has {len(images)} images; at most {MAX_IMAGES} are taken", "messages")
        contents, pixels = [], 0
        for param, url in images:
            contents.append(_content(url, param))
            try:
                pixels += count_pixels(contents[-1], MAX_PIXELS, param)
            except DataError as error:
                raise RequestError(str(error), param) from error
        if pixels > MAX_ALL_PIXELS:
            raise RequestError(
                f"the images have {pixels} pixels in all, more than the limit of {MAX_ALL_PIXELS}; shrink them",
                "messages",
            )
        left = iter(contents)
        return [
            Message(turn.role, turn.text, [next(left) for part in turn.content if isinstance(part, Picture)])
            for turn in self.messages
        ]


def _content(url: str, param: str) -> bytes:
    """Return the file in a data URL; paths and addresses are never opened."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise RequestError(f"{param}: an image comes with the request, as data:image/...;base64,...", param)
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise RequestError(f"{param} is not valid base64: {error}", param) from error


def _path(keys: Sequence[int | str]) -> str:
    """Write the path of a key as ``messages[0].content[1].text``."""
    path = ""
    for index, key in enumerate(keys):
        if isinstance(key, int):
            path += f"[{key}]"
        elif not (index > 1 and keys[index - 2] == "content"):  # there pydantic names the type of the part
            path += f".{key}" if path else key
    return path


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return " is not a key that is taken here; leave it out"
    if error["type"] == "missing":
        return " is missing"
    if error["loc"] and error["loc"][0] in Unsupported.model_fields:
        return " is not supported here; leave it out"
    reason = str(error["msg"]).removeprefix("Value error, ")
    return f": {reason[:1].lower()}{reason[1:]}"
