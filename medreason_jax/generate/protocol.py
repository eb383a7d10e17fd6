"""What a client may ask: OpenAI's chat and completion requests, checked field by field.

A field that this server cannot honour is refused by its name; null is as good as left out.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MOST_CHOICES, MOST_STOPS, MOST_TOP = 128, 4, 20
LONGEST_STOP = 1000  # characters
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of a completion; a chat goes on to the end of its room
LARGEST_SEED = 2**31 - 1

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
STRICT = ConfigDict(extra="forbid", strict=True)


class Refusal(Exception):
    """A request that is not answered: an HTTP status and an error body of OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool = False


class ResponseFormat(BaseModel):
    model_config = STRICT
    type: Literal["text"]


class ChatRequest(BaseModel):
    """The body of /v1/chat/completions; `top_k` is not OpenAI's."""

    model_config = STRICT
    model: str
    messages: list[dict[str, Any]]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Seed | None = None
    n: Count = 1
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        _check_stream(self.stream, self.stream_options)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one limit; give one of them")
        if self.top_logprobs > 0 and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} needs logprobs=true")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Alternatives that are told beside each token; None: no log-probs at all."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(BaseModel):
    """The body of /v1/completions; `top_k` is not OpenAI's."""

    model_config = STRICT
    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_COMPLETION_TOKENS
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Seed | None = None
    n: Count = 1
    stop: Stop = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "CompletionRequest":
        _check_stream(self.stream, self.stream_options)
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true: nothing else would be in the answer")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts, all texts or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def most_tokens(self) -> int:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs


def _check_stream(stream: bool, options: StreamOptions | None) -> None:
    if options is not None and not stream:
        raise ValueError("stream_options needs stream=true")


Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


def read_request(kind: type[Asked], body: bytes) -> Asked:
    """The request in a body; a `Refusal` of status 400 names the first thing that is wrong."""
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell half of a character
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise Refusal(400, f"the body holds {half!r}, half of a character") from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body should be a JSON object")
    try:
        return kind.model_validate({name: v for name, v in value.items() if v is not None})
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> Refusal:
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    place = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    name = ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        message = f"{name} is not supported by this server; leave it out"
        return Refusal(400, message, param=name, code="unsupported_parameter")
    if name.startswith("prompt."):  # of several kinds, none fits
        allowed = "a text, token ids, or a list of either"
        message = f"prompt={first['input']!r:.80} is not allowed: it should be {allowed}"
        return Refusal(400, message, param="prompt", code="invalid_value")
    if first["type"] == "missing":
        return Refusal(400, f"{name} is missing", param=name, code="missing_required_parameter")
    if not place:  # of several fields together
        return Refusal(400, first["msg"].removeprefix("Value error, "))
    value = f"{first['input']!r:.80}"
    message = f"{name}={value} is not allowed: {first['msg'].lower()}"
    return Refusal(400, message, param=str(place[0]), code="invalid_value")
