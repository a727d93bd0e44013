"""What a client of the chat completions may ask, checked on its way in; and OpenAI's shape of an error."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..engines.base import Sampling

# The most answers to one request, and the most stop strings.
MOST_CHOICES = 16
MOST_STOPS = 16


class ApiError(Exception):
    """An error in OpenAI's shape.

    Args:
        status: of HTTP.
        kind: OpenAI's `type`. param: the field that is wrong. code: what a program tells errors apart by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    type: str
    text: str = ""


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it. Raises ApiError if it holds more than text."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        for part in self.content:
            if part.type != "text":
                raise ApiError(
                    400, f"content of type {part.type[:50]!r} is not supported, only text is", param="messages"
                )
        return {"role": role, "content": "".join(part.text for part in self.content)}


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a chat completion. Unknown fields are ignored; known ones that are not supported are refused."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    def tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def sampling(self) -> Sampling:
        """OpenAI's defaults: temperature 1, and all tokens."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, self.top_k or 0)

    def seeds(self) -> list[int]:
        """One for each answer; without a `seed`, other ones every time."""
        first = secrets.randbits(31) if self.seed is None else self.seed
        return [(first + i) % 2**63 for i in range(self.n or 1)]

    def stops(self) -> tuple[str, ...]:
        """Raises ApiError if a stop string is empty, or there are too many."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not all(stop) or len(stop) > MOST_STOPS:
            raise ApiError(400, f"stop takes up to {MOST_STOPS} strings, none of them empty", param="stop")
        return tuple(stop)


# Fields of OpenAI's that would change the answer, and the values at which they don't.
_UNSUPPORTED: dict[str, Sequence[Any]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


def parsed(body: bytes) -> ChatRequest:
    """A request's body. Raises ApiError with what is wrong."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _NAMES)
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise ApiError(400, message, param=place.split(".")[0] or None) from None
    for name, value in (request.model_extra or {}).items():
        if name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
            raise ApiError(400, f"{name} is not supported here: leave it out", param=name, code="unsupported_parameter")
    return request


_NAMES = {*ChatRequest.model_fields, *_Message.model_fields, *_Part.model_fields, *_StreamOptions.model_fields}
