"""``/v1/responses``: OpenAI's newer API, of items in place of messages and of named events in its streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine.extensions.server import constraints, context, history
from engine.extensions.server.chat import Format, Turn, check_tools, no_parser
from engine.extensions.server.errors import as_api_error
from engine.extensions.server.history import Item, Kept
from engine.extensions.server.parsers.base import Arguments, Call, EndOfCall, Event, Reasoning, Text
from engine.extensions.server.protocol import (
    Conversation,
    Function,
    Message,
    Named,
    NamedChoice,
    ResponseNamedChoice,
    ResponsesRequest,
    Tool,
)
from engine.extensions.server.service import Call as Calling
from engine.extensions.server.service import Job, Service
from engine.extensions.server.streams import JSON, EventStream, answer, event
from engine.request import RequestOutput

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request, body: ResponsesRequest) -> Response:
    """Answer items with items."""
    service, chat, store = context.service(request), context.chat(request), context.store(request)
    calling = context.call(request, body, "resp")
    service.check_room(1)
    before = store.get(body.previous_response_id, "previous_response_id").items if body.previous_response_id else []
    given = [{"type": "message", "role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    items = [*before, *given]
    tools = [
        Tool(function=Function(name=t.name, description=t.description, parameters=t.parameters))
        for t in body.tools or ()
    ]
    wanted = body.tool_choice
    if isinstance(wanted, ResponseNamedChoice):
        choice = check_tools(tools, NamedChoice(function=Named(name=wanted.name)))
    else:
        choice = check_tools(tools, wanted)
    tool_parser, reasoning = chat.parsers(service)
    if choice != "none" and tool_parser is None:
        raise no_parser()
    params = body.params() | {"max_tokens": body.max_output_tokens}
    if choice != "none" or reasoning is not None:
        params.setdefault("skip_special_tokens", False)
    conversation = Conversation(
        messages=[Message.model_validate(m) for m in history.messages(body.instructions, items)],
        tools=tools or None,
        chat_template=None,
        chat_template_kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
    prompt, form = await chat.prompt(service, conversation, choice, body.parallel_tool_calls)
    job = form.job(service, constraints.asked(body), prompt, params)
    making = _Making(body, service, form, f"resp_{secrets.token_hex(16)}")

    def keep() -> None:
        if body.store:
            store.put(Kept(making.response, [*items, *making.response["output"]]))

    if body.stream:
        events = _stream(service, calling, job, making, keep)
        return EventStream(events, service.args.sse_keep_alive_interval, last=b"")

    async def whole() -> dict[str, Any]:
        async for _ in _events(service, calling, job, making):
            pass
        keep()
        return making.response

    return await answer(request, whole())


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request, response_id: str) -> JSON:
    """A response that was kept."""
    return JSON(context.store(request).get(response_id).response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> JSON:
    """Forget a response."""
    context.store(request).delete(response_id)
    return JSON({"id": response_id, "object": "response", "deleted": True})


class _Making:
    """A response while it is made; each change is an event of its stream."""

    def __init__(self, body: ResponsesRequest, service: Service, form: Format, response_id: str) -> None:
        self.turn = Turn(form)
        self._form = form
        self._tokenizer = service.llm.get_tokenizer()
        self._number = 0
        self._item: Item | None = None  # the one that grows, the last of the output
        self.response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": service.names[0],
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": (body.reasoning.model_dump() if body.reasoning else {"effort": None, "summary": None}),
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"] or "auto",
            "tools": [t.model_dump() for t in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def event(self, name: str, /, **fields: Any) -> bytes:
        """An event, numbered."""
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **fields}, name)

    def read(self, found: list[Event]) -> Iterator[bytes]:
        """Take in what the model said."""
        for e in found:
            match e:
                case Text(text):
                    yield from self._part("message", "output_text", text)
                case Reasoning(text):
                    yield from self._part("reasoning", "reasoning_text", text)
                case Call(name):
                    yield from self._close()
                    call_id = self._form.new_call_id()
                    yield from self._open("function_call", "fc", call_id=call_id, name=name, arguments="")
                case Arguments(text) if self._item is not None:
                    self._item["arguments"] += text
                    yield self._delta("response.function_call_arguments.delta", delta=text)
                case EndOfCall():
                    yield from self._close()

    def finish(self, output: RequestOutput) -> Iterator[bytes]:
        """The model has ended, or is not wanted any more."""
        (c,) = output.outputs
        cut = c.finish_reason == "length" and not self.turn.over
        yield from self._close("incomplete" if cut else "completed")
        reasoning = "".join(
            part["text"] for i in self.response["output"] if i["type"] == "reasoning" for part in i["content"]
        )
        read, made = len(output.prompt_token_ids), len(c.token_ids)
        thought = len(self._tokenizer.encode(reasoning, add_special_tokens=False)) if reasoning else 0
        self.response["usage"] = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": min(made, thought)},
            "total_tokens": read + made,
        }
        self.response["status"] = "incomplete" if cut else "completed"
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self.event(f"response.{self.response['status']}", response=self.response)

    def fail(self, error: Exception) -> Iterator[bytes]:
        """The engine could not go on."""
        told = as_api_error(error).body().error
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": told.message}
        yield self.event("response.failed", response=self.response)

    def _part(self, kind: str, part: str, text: str) -> Iterator[bytes]:
        """A piece of text or of reasoning, which both are parts of an item's content."""
        if self._item is None or self._item["type"] != kind:
            yield from self._close()
            if kind == "message":
                yield from self._open(kind, "msg", role="assistant", content=[])
            else:
                yield from self._open(kind, "rs", summary=[], content=[])
            assert self._item is not None
            new: dict[str, Any] = {"type": part, "text": ""} | (
                {"annotations": [], "logprobs": []} if kind == "message" else {}
            )
            yield self._delta("response.content_part.added", content_index=0, part=new)
            self._item["content"].append(dict(new))
        assert self._item is not None
        self._item["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._delta(f"response.{part}.delta", content_index=0, delta=text, **more)

    def _open(self, kind: str, prefix: str, **fields: Any) -> Iterator[bytes]:
        self._item = {"id": f"{prefix}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress", **fields}
        output = self.response["output"]
        output.append(self._item)
        yield self.event("response.output_item.added", output_index=len(output) - 1, item=self._item)

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        """The item that grows is done."""
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._delta("response.function_call_arguments.done", **done)
        else:
            (part,) = item["content"]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            yield self._delta(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._delta("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        index = len(self.response["output"]) - 1
        yield self.event("response.output_item.done", output_index=index, item=item)
        self._item = None

    def _delta(self, kind: str, /, **fields: Any) -> bytes:
        assert self._item is not None
        index = len(self.response["output"]) - 1
        return self.event(kind, item_id=self._item["id"], output_index=index, **fields)


async def _events(service: Service, calling: Calling, job: Job, making: _Making) -> AsyncGenerator[bytes, None]:
    """All events of a response; at the end `making` has the whole."""
    turn, num_chars, begun = making.turn, 0, False
    async with aclosing(service.stream(calling, [job])) as outputs:
        async for _, output in outputs:
            (c,) = output.outputs
            if not begun:
                begun = True
                yield making.event("response.created", response=making.response)
                yield making.event("response.in_progress", response=making.response)
            found = turn.push(c.text[num_chars:])
            num_chars = len(c.text)
            if c.finished() and not turn.over:
                found += turn.finish()
            for data in making.read(found):
                yield data
            if turn.over:
                break
    for data in making.finish(output):
        yield data


async def _stream(
    service: Service, calling: Calling, job: Job, making: _Making, keep: Any
) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async with aclosing(_events(service, calling, job, making)) as events:
            async for data in events:
                begun = True
                yield data
        keep()
    except Exception as error:
        if not begun:  # it still has a proper status
            raise
        for data in making.fail(error):
            yield data
