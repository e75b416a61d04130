"""Requests: OpenAI's fields, and those that vLLM adds under the same names.

Each model keeps fields that it does not know, so that `check_unknown` can name the nearest one that it does. Ranges
that depend on the model are checked by the engine; here are those without which a number could not be sent to it.
"""

from __future__ import annotations

import difflib
import json
import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.extensions.server.errors import APIError

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Request(BaseModel):
    """What every request may have."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = Field(None, description="a served name; none is the model that is there")

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        """Refuse halves of surrogate pairs, which JSON can write and no encoding can send on."""
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise ValueError(f"the body has text that is no Unicode, or is nested too deeply: {error}") from None
        return data

    def check_unknown(self, allow: bool) -> None:
        """Refuse fields that do not exist, as OpenAI does, or ignore them with a line in the log."""
        for name in self.model_extra or ():
            known = type(self).model_fields
            close = difflib.get_close_matches(name, known, 1)
            if not allow:
                hint = f": did you mean {close[0]!r}?" if close else "; --allow-unknown-fields ignores such fields"
                raise APIError(400, f"there is no field {name!r}{hint}", name, "unknown_parameter")
            log.warning("a request's field is not known and ignored", extra={"facts": {"field": name[:64]}})


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool = Field(False, description="a last event with the usage of all choices")
    continuous_usage_stats: bool = Field(False, description="the usage so far in each event (vLLM)")


class Sampling(Request):
    """How tokens are chosen: the parameters of `SamplingParams` that a request may set."""

    temperature: Number | None = None
    top_p: Number | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool = False
    user: str | None = Field(None, description="accepted for OpenAI's clients; changes nothing")

    # vLLM's
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[TokenId] | None = None
    add_special_tokens: bool | None = Field(None, description="put the tokenizer's special tokens around the prompt")
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = Field(0, description="lower runs first")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="only requests of equal salt share cached prompts"
    )
    timeout: Annotated[float, Field(gt=0, le=1e9)] | None = Field(None, description="seconds until it ends with 408")
    structured_outputs: dict[str, Any] | None = Field(None, description="the answer's form: json, regex, choice, ...")
    guided_json: dict[str, Any] | bool | str | None = Field(None, description="older name of structured_outputs.json")
    guided_regex: str | None = Field(None, description="older name of structured_outputs.regex")
    guided_choice: list[str] | None = Field(None, description="older name of structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="older name of structured_outputs.grammar")
    guided_whitespace_pattern: str | None = Field(None, description="with the others")

    def params(self) -> dict[str, Any]:
        """The fields that were given, by their names in `SamplingParams`."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name, None)) is not None}
        if "seed" in given:  # OpenAI's may be negative
            given["seed"] %= 2**62
        return given

    def check(self, allow_unknown: bool) -> None:
        """Refuse what this server does not have; raises `APIError` with the field."""
        self.check_unknown(allow_unknown)


class Completing(Sampling):
    """What both kinds of completions have."""

    n: Annotated[int, Field(ge=1, le=2**16)] = 1
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    # vLLM's
    prompt_logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    return_token_ids: bool = Field(False, description="token ids of prompt and output in the answer")
    return_tokens_as_token_ids: bool = Field(False, description="log probabilities name tokens as 'token_id:N'")

    def check(self, allow_unknown: bool) -> None:
        """As the base does."""
        super().check(allow_unknown)
        if self.stream and self.prompt_logprobs is not None:
            raise APIError(400, "prompt_logprobs are not streamed; set stream to false", "prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options need stream to be true", "stream_options")


_SAMPLING = (
    *("temperature", "top_p", "n", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "top_k"),
    *("min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words"),
    *("include_stop_str_in_output", "skip_special_tokens", "allowed_token_ids", "prompt_logprobs"),
)


class CompletionRequest(Completing):
    """``POST /v1/completions``."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    suffix: str | None = Field(None, description="text behind the gap, for models that fill in the middle")
    max_tokens: Count | None = 16
    logprobs: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=2**16)] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or many, as a list of many."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)  # type: ignore[arg-type]


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class FunctionCall(BaseModel):
    """What a message of the assistant called."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    """A call in a message of the assistant."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A message of a conversation. Further keys go to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None


class Function(BaseModel):
    """What a model may call."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A function, as chat completions describe it."""

    type: Literal["function"] = "function"
    function: Function


class Named(BaseModel):
    """The name of a function."""

    name: str


class NamedChoice(BaseModel):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    function: Named


class Conversation(BaseModel):
    """What shapes a conversation's prompt."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template: str | None = Field(None, description="Jinja source; only with --trust-request-chat-template")
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, description="a variable of the chat template")


class ChatRequest(Conversation, Completing):
    """``POST /v1/chat/completions``."""

    max_completion_tokens: Count | None = None
    max_tokens: Count | None = Field(None, description="the older name of max_completion_tokens")
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = Field(True, description="reasoning in the answer")

    # accepted for OpenAI's clients; they change nothing here
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: list[Literal["text"]] | None = None


class TokenizeRequest(Request):
    """``POST /tokenize``: a prompt, or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(None, description="true for prompts, false for conversations")
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    def conversation(self) -> Conversation:
        """The part that makes a prompt of messages."""
        return Conversation.model_validate(self.model_dump(include=set(Conversation.model_fields), exclude_unset=True))


class DetokenizeRequest(Request):
    """``POST /detokenize``."""

    tokens: list[TokenId]


class ResponseText(BaseModel):
    """How a response's text looks."""

    model_config = ConfigDict(extra="allow")

    format: dict[str, Any] | None = None


class ResponseReasoning(BaseModel):
    """How a response is reasoned about."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None
    summary: str | None = None


class ResponseTool(BaseModel):
    """A function, as responses describe it."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedChoice(BaseModel):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    name: str


class ResponsesRequest(Sampling):
    """``POST /v1/responses``."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedChoice | None = None
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    store: bool = True
    reasoning: ResponseReasoning | None = None
    text: ResponseText | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    background: Literal[False] = False
    truncation: Literal["disabled"] | None = None

    # accepted for OpenAI's clients; they change nothing here
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: list[str] | None = None
