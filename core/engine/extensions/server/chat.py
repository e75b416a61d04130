"""Conversations: messages to a prompt by the chat template, and a model's text to reasoning, answer and tool calls."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RequestError
from engine.extensions.server import constraints, parsers
from engine.extensions.server.args import ServerArgs
from engine.extensions.server.constraints import Constraint
from engine.extensions.server.errors import APIError
from engine.extensions.server.parsers.base import (
    Arguments,
    Call,
    EndOfCall,
    Event,
    Reasoning,
    ReasoningParser,
    Text,
    ToolParser,
)
from engine.extensions.server.protocol import Conversation, Message, NamedChoice, Tool
from engine.extensions.server.service import Job, Service

log = logging.getLogger(__name__)

ToolChoice = str | NamedChoice
"""``"none"``, ``"auto"``, ``"required"``, or the function that must be called."""


class Chat:
    """How this server's model is talked with.

    Args:
        args: the server's options.
    """

    def __init__(self, args: ServerArgs) -> None:
        self._args = args
        self._template = Path(args.chat_template).read_text() if args.chat_template else None
        self._chosen: tuple[str, type[ToolParser] | None, type[ReasoningParser] | None] | None = None
        self._choose("")  # a name that does not exist is told before the model loads

    def available(self, service: Service) -> bool:
        """Whether there is a chat template."""
        if service.llm.args.skip_tokenizer_init:
            return False
        return bool(self._template or service.llm.get_tokenizer().hf.chat_template)

    def parsers(self, service: Service) -> tuple[type[ToolParser] | None, type[ReasoningParser] | None]:
        """The formats of tool calls and of reasoning, as the options or the template tell; None where there is none."""
        templates = self._template or service.llm.get_tokenizer().hf.chat_template or ""
        source = "\n".join(templates.values()) if isinstance(templates, dict) else templates
        if self._chosen is None or self._chosen[0] != source:
            tools, reasoning = self._choose(source)
            names = [found[0] if found else "none" for found in (tools, reasoning)]
            log.info("tool calls: %s, reasoning: %s", *names)
            self._chosen = (source, tools and tools[1], reasoning and reasoning[1])
        return self._chosen[1:]

    def _choose(
        self, source: str
    ) -> tuple[tuple[str, type[ToolParser]] | None, tuple[str, type[ReasoningParser]] | None]:
        return (
            parsers.choose(parsers.TOOLS, ToolParser, self._args.tool_call_parser, source),  # type: ignore[type-abstract]
            parsers.choose(parsers.REASONING, ReasoningParser, self._args.reasoning_parser, source),
        )

    async def prompt(
        self, service: Service, body: Conversation, choice: ToolChoice = "auto", parallel: bool = True
    ) -> tuple[dict[str, Any], Format]:
        """A conversation's text and token ids, and how to read an answer to it.

        Args:
            service: has the tokenizer.
            body: the request.
            choice: with ``"none"`` the tools are not told; where a call is forced, the prompt ends with its beginning.
            parallel: whether an answer may have several calls.

        Raises:
            RequestError: the template refuses the messages.
            APIError: there is something in them that no template of this server takes.
        """
        if body.chat_template is not None and not self._args.trust_request_chat_template:
            raise APIError(
                400,
                "this server takes no chat template from requests (--trust-request-chat-template)",
                "chat_template",
                "unsupported_parameter",
            )
        tool_parser, reasoning = self.parsers(service)
        as_text = tool_parser is not None and tool_parser.string_arguments
        messages = [_plain(i, m, as_text) for i, m in enumerate(body.messages)]
        tools = [t.model_dump(exclude_none=True) for t in body.tools or ()] if choice != "none" else []
        variables = self._args.default_chat_template_kwargs | (body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        tokenizer = service.llm.get_tokenizer()
        opening = ""
        if tool_parser is not None and choice not in ("none", "auto"):
            opening = tool_parser.opening(choice.function.name if isinstance(choice, NamedChoice) else None)

        def render() -> tuple[str, list[int]]:
            try:
                text = tokenizer.render_chat(
                    messages,
                    tools or None,
                    add_generation_prompt=body.add_generation_prompt,
                    chat_template=body.chat_template or self._template,
                    continue_final_message=body.continue_final_message,
                    **variables,
                )
                if opening:
                    inside = reasoning is not None and reasoning.inside_after(text)
                    text += (f"\n{reasoning.end}\n\n" if reasoning is not None and inside else "") + opening
                return text, tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))
            except TypeError as error:  # a variable that has the name of an argument, or text that is no Unicode
                raise RequestError(f"the conversation cannot be rendered: {error}") from error

        size = sum(len(str(m.get("content"))) for m in messages)
        text, ids = await service.offload(size, render)
        form = Format(
            text,
            opening,
            tool_parser if choice != "none" else None,
            None if opening else reasoning,
            parallel,
            choice.function.name if isinstance(choice, NamedChoice) else None,
            body.tools or (),
        )
        return {"prompt": text, "prompt_token_ids": ids}, form


@dataclass(frozen=True)
class Format:
    """How to read the answers to one prompt.

    Attributes:
        prompt: its text.
        opening: the end of the prompt that belongs to the answer, where a call is forced.
        tools, reasoning: the formats; None finds none.
        parallel: whether more than one call is told.
        only: the one function that is called, and after its arguments the answer ends.
        functions: what may be called.
    """

    prompt: str
    opening: str
    tools: type[ToolParser] | None
    reasoning: type[ReasoningParser] | None
    parallel: bool
    only: str | None = None
    functions: Sequence[Tool] = ()

    def new_call_id(self) -> str:
        """An id for a call, as the model's template likes it."""
        return (self.tools or ToolParser).new_id()

    def job(self, service: Service, asked: Constraint | None, prompt: dict[str, Any], given: dict[str, Any]) -> Job:
        """The request to the engine: `given` are parameters, and `asked` is the form that the client wants.

        Calls that are forced have the form of the tools; where calls are free, the answer may have them in its place.
        """
        if self.opening and self.tools is not None:
            if asked is not None:
                raise APIError(400, f"{asked.field} and tool_choice ask for a form each; give one of them", asked.field)
            asked = constraints.forced(self.tools, self.functions, self.only, self.parallel)
        elif asked is not None:
            if self.tools is not None:
                asked = asked.or_calls(self.tools, self.functions, self.parallel)
            asked = asked.behind(self.reasoning, self.prompt)
        params = service.sampling_params(given | (asked.given() if asked else {}))
        return Job(prompt, params, asked.field if asked else "")


def no_parser() -> APIError:
    """Tools were given, and nobody knows how this model calls them."""
    return APIError(
        400,
        "the chat template does not show how this model calls tools; start the server with --tool-call-parser",
        "tools",
        "unsupported_parameter",
    )


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> ToolChoice:
    """The choice that counts; raises `APIError` where it names a tool that is not there."""
    names = [t.function.name for t in tools or ()]
    if not names:
        if choice not in (None, "none", "auto"):
            raise APIError(400, "tool_choice needs tools", "tool_choice")
        return "none"
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise APIError(
            400, f"tool_choice names {choice.function.name!r}, and the tools are {', '.join(names)}", "tool_choice"
        )
    return choice or "auto"


def _plain(index: int, message: Message, arguments_as_text: bool) -> dict[str, Any]:
    """A message as chat templates take it: content as one text, arguments as the template wants them."""
    found = message.model_dump(exclude_none=True)
    if found["role"] == "developer":  # OpenAI's newer name, which few templates know
        found["role"] = "system"
    if isinstance(message.content, list):
        for i, part in enumerate(message.content):
            if part.text is None:
                raise APIError(
                    400,
                    f"this model takes text only, and this part is of type {part.type!r}",
                    f"messages.{index}.content.{i}",
                    "unsupported_content",
                )
        found["content"] = "\n".join(part.text or "" for part in message.content)
    elif "content" not in found:
        found["content"] = ""
    for call in found.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"].get("arguments"), arguments_as_text)
    return found


def _arguments(given: str | Mapping[str, Any] | None, as_text: bool) -> Any:
    if as_text:
        return given if isinstance(given, str) else json.dumps(given or {})
    if not isinstance(given, str):
        return given or {}
    try:
        return json.loads(given or "{}")
    except ValueError:  # a model wrote it, and may be told what it wrote
        return given


class Turn:
    """Takes one answer apart while it comes.

    Attributes:
        num_calls: so far.
        over: nothing more is wanted of the model.
    """

    def __init__(self, form: Format) -> None:
        self._reasoning = form.reasoning(form.prompt) if form.reasoning is not None else None
        self._tools = form.tools() if form.tools is not None else None
        self._most = None if form.parallel and form.only is None else 1
        self._only = form.only is not None
        self._given = False  # whether the call has arguments
        self.num_calls = 0
        self.over = False
        self._begun: list[Event] = []
        if form.opening and self._tools is not None:
            self._begun = self._count(self._tools.push(form.opening))

    def push(self, text: str) -> list[Event]:
        """What a piece of text brought."""
        events = self._begun + self._count(self._through_tools(self._through_reasoning(text)))
        self._begun = []
        return events

    def finish(self) -> list[Event]:
        """What was held back when the text ended."""
        events = self._begun
        if self._reasoning is not None:
            events += self._count(self._through_tools(self._reasoning.finish()))
        if self._tools is not None:
            events += self._count(self._tools.finish())
        return events

    def _through_reasoning(self, text: str) -> list[Event]:
        return [Text(text)] if self._reasoning is None else self._reasoning.push(text)

    def _through_tools(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            found += self._tools.push(event.text) if isinstance(event, Text) else [event]
        return found

    def _count(self, events: list[Event]) -> list[Event]:
        """Without what is not wanted: empty pieces, and calls beyond the most."""
        wanted: list[Event] = []
        for event in events:
            if self.over:
                break
            match event:
                case Call():
                    if self.num_calls == self._most:
                        self.over = True
                        break
                    self.num_calls += 1
                    self._given = False
                case Arguments(text):
                    self._given = self._given or bool(text)
                case EndOfCall():
                    if not self._given:
                        wanted.append(Arguments("{}"))
                    self.over = self._only
                case Text(text) | Reasoning(text) if not text:
                    continue
            wanted.append(event)
        return wanted
