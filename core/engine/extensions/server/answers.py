"""Answers, in OpenAI's shapes; what vLLM adds is left out where it was not asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from engine.request import Logprob, RequestOutput


class CachedTokens(msgspec.Struct):
    """Of the prompt."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> Usage:
        """The sum over all prompts and completions, those that were not chosen included."""
        outputs = list(outputs)
        read = sum(len(o.prompt_token_ids) for o in outputs)
        made = sum(len(c.token_ids) for o in outputs for c in o.outputs)
        return cls(read, made, read + made, CachedTokens(sum(o.num_cached_tokens for o in outputs)))


class TextLogprobs(msgspec.Struct):
    """Log probabilities as completions have them: lists with an entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(msgspec.Struct, kw_only=True):
    """A completion, or a piece of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/completions``, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class Top(msgspec.Struct):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """A token with its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Top]


class ChatLogprobs(msgspec.Struct):
    """Log probabilities as chats have them."""

    content: list[TokenLogprob]
    refusal: None = None


class Called(msgspec.Struct):
    """The function of a call; in a stream, the name once and the arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class Call(msgspec.Struct, kw_only=True):
    """A call of a tool."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: Called


class ChatMessage(msgspec.Struct, kw_only=True):
    """The assistant's."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class Delta(msgspec.Struct, kw_only=True):
    """A piece of the assistant's message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | None = None


class Error(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The answer to a request that failed."""

    error: Error


def schemas(*shapes: Any) -> dict[str, Any]:
    """JSON schemas of these answers and of what they are made of, by name, for the OpenAPI document."""
    _, found = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    return found
