"""``/v1/chat/completions``: a conversation in, the assistant's next message out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET, UnsetType

from engine.extensions.server import answers, constraints, context
from engine.extensions.server.answers import ChatChoice, ChatChunk, ChatCompletion, ChatDelta, Delta, Usage
from engine.extensions.server.chat import Format, Turn, check_tools, no_parser
from engine.extensions.server.errors import APIError
from engine.extensions.server.logprobs import chat_logprobs, namer
from engine.extensions.server.parsers.base import Arguments, Call, Event, Reasoning, Text
from engine.extensions.server.protocol import ChatRequest
from engine.extensions.server.service import Call as Calling
from engine.extensions.server.service import Job, Service
from engine.extensions.server.streams import EventStream, answer, event
from engine.request import CompletionOutput, RequestOutput

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation."""
    service, chat = context.service(request), context.chat(request)
    calling = context.call(request, body, "chatcmpl")
    service.check_room(body.n)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    choice = check_tools(body.tools, body.tool_choice)
    tools, reasoning = chat.parsers(service)
    if choice != "none" and tools is None:
        raise no_parser()
    given = body.params()
    given["max_tokens"] = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    if choice != "none" or reasoning is not None:
        given.setdefault("skip_special_tokens", False)  # some formats are made of them
    prompt, form = await chat.prompt(service, body, choice, body.parallel_tool_calls)
    job = form.job(service, constraints.asked(body), prompt, given)
    view = _View(service, body, calling.id, form)
    if body.stream:
        return EventStream(_stream(service, calling, job, view), service.args.sse_keep_alive_interval)
    return await answer(request, _complete(service, calling, job, view))


class _Choice:
    """One answer while it comes."""

    def __init__(self, form: Format) -> None:
        self.turn = Turn(form)
        self.begun = False
        self.ended = False
        self.num_chars = 0
        self.num_tokens = 0
        self._form = form
        self._ids: list[str] = []

    def read(self, c: CompletionOutput) -> list[Event]:
        """What is new in the text."""
        events = self.turn.push(c.text[self.num_chars :])
        self.num_chars = len(c.text)
        if c.finished() and not self.turn.over:
            events += self.turn.finish()
        self.ended = c.finished() or self.turn.over
        return events

    def finish_reason(self, c: CompletionOutput) -> str | None:
        """OpenAI's word for why it ended."""
        if not self.ended:
            return None
        reason = c.finish_reason or "stop"
        return "tool_calls" if reason == "stop" and self.turn.num_calls and not self._form.only else reason

    def calls(self, events: Iterable[Event]) -> list[answers.Call]:
        """Those events that belong to calls, the pieces of one call joined."""
        found: list[answers.Call] = []
        for e in events:
            if isinstance(e, Call):
                self._ids.append(self._form.new_call_id())
                index, function = len(self._ids) - 1, answers.Called(e.name, "")
                found.append(answers.Call(index=index, id=self._ids[-1], type="function", function=function))
            elif isinstance(e, Arguments):
                if not found:
                    found.append(answers.Call(index=len(self._ids) - 1, function=answers.Called(arguments="")))
                function = found[-1].function
                function.arguments = (function.arguments or "") + e.text
        return found


def _joined(events: Iterable[Event], kind: type[Text] | type[Reasoning]) -> str:
    return "".join(e.text for e in events if isinstance(e, kind))


@dataclass
class _View:
    """How outputs become answers."""

    service: Service
    body: ChatRequest
    id: str
    form: Format
    created: int = field(default_factory=lambda: int(time.time()))

    def message(self, output: RequestOutput, c: CompletionOutput) -> ChatChoice:
        """A whole answer."""
        choice = _Choice(self.form)
        events = choice.read(c)
        calls = [answers.Call(id=call.id, type="function", function=call.function) for call in choice.calls(events)]
        content, reasoning = _joined(events, Text), _joined(events, Reasoning)
        message = answers.ChatMessage(
            content=None if calls and not content else content,
            reasoning_content=reasoning if reasoning and self.body.include_reasoning else UNSET,
            tool_calls=calls or UNSET,
        )
        return ChatChoice(
            index=c.index,
            message=message,
            logprobs=self.logprobs(c, 0),
            finish_reason=choice.finish_reason(c),
            stop_reason=c.stop_reason,
            token_ids=c.token_ids if self.body.return_token_ids else UNSET,
        )

    def piece(self, c: CompletionOutput, choice: _Choice) -> ChatDelta | None:
        """What is new of an answer, if it is worth an event."""
        body = self.body
        if choice.ended:
            return None
        events = choice.read(c)
        content, reasoning = _joined(events, Text), _joined(events, Reasoning)
        calls = choice.calls(events)
        new_tokens = len(c.token_ids) > choice.num_tokens and (body.logprobs or body.return_token_ids)
        if not (content or calls or choice.ended or new_tokens or (reasoning and body.include_reasoning)):
            return None
        piece = ChatDelta(
            index=c.index,
            delta=Delta(
                content=content or UNSET,
                reasoning_content=reasoning if reasoning and body.include_reasoning else UNSET,
                tool_calls=calls or UNSET,
            ),
            logprobs=self.logprobs(c, choice.num_tokens),
            finish_reason=choice.finish_reason(c),
            stop_reason=c.stop_reason if choice.ended else UNSET,
            token_ids=c.token_ids[choice.num_tokens :] if body.return_token_ids else UNSET,
        )
        choice.num_tokens = len(c.token_ids)
        return piece

    def logprobs(self, c: CompletionOutput, begin: int) -> answers.ChatLogprobs | None:
        """Of the tokens from `begin` on."""
        if not self.body.logprobs:
            return None
        name = namer(self.body.return_tokens_as_token_ids)
        tokenizer = self.service.llm.get_tokenizer()
        return chat_logprobs((c.logprobs or [])[begin:], name, self.body.top_logprobs or 0, tokenizer)

    def chunk(self, choices: list[ChatDelta], usage: Usage | UnsetType | None) -> bytes:
        """An event."""
        service = self.service
        return event(ChatChunk(id=self.id, created=self.created, model=service.names[0], choices=choices, usage=usage))


async def _complete(service: Service, calling: Calling, job: Job, view: _View) -> ChatCompletion:
    body = view.body
    if view.form.only or not body.parallel_tool_calls:  # may be over before the model ends
        output = await _until_over(service, calling, job, view)
    else:
        (output,) = await service.complete(calling, [job])
    return ChatCompletion(
        id=view.id,
        created=view.created,
        model=service.names[0],
        choices=[view.message(output, c) for c in output.outputs],
        usage=Usage.of([output]),
        prompt_logprobs=(output.prompt_logprobs or []) if body.prompt_logprobs is not None else UNSET,
        prompt_token_ids=output.prompt_token_ids if body.return_token_ids else UNSET,
    )


async def _until_over(service: Service, calling: Calling, job: Job, view: _View) -> RequestOutput:
    """The first output in which every answer has ended, or has all that is wanted."""
    choices = [_Choice(view.form) for _ in range(view.body.n)]
    async with aclosing(service.stream(calling, [job])) as outputs:
        async for _, output in outputs:
            for c, choice in zip(output.outputs, choices, strict=True):
                if not choice.ended:
                    choice.read(c)
            if all(choice.ended for choice in choices):
                break
    return output


async def _stream(service: Service, calling: Calling, job: Job, view: _View) -> AsyncGenerator[bytes, None]:
    options = view.body.stream_options
    wants_usage = service.args.enable_force_include_usage or (options is not None and options.include_usage)
    running_usage = options is not None and options.continuous_usage_stats
    choices = [_Choice(view.form) for _ in range(view.body.n)]
    async with aclosing(service.stream(calling, [job])) as outputs:
        async for _, output in outputs:
            usage = Usage.of([output]) if running_usage else None if wants_usage else UNSET
            for c, choice in zip(output.outputs, choices, strict=True):
                if not choice.begun:
                    choice.begun = True
                    yield view.chunk([ChatDelta(index=c.index, delta=Delta(role="assistant", content=""))], usage)
                if piece := view.piece(c, choice):
                    yield view.chunk([piece], usage)
            if all(choice.ended for choice in choices):
                break
    if wants_usage:
        yield view.chunk([], Usage.of([output]))
