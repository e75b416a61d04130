"""Responses as conversations: their items to messages and back, and the latest ones kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.extensions.server.errors import APIError

Item = dict[str, Any]
"""Of a response's input or output: a message, a call, a call's output, or reasoning."""

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")


@dataclass(frozen=True)
class Kept:
    """A response with the conversation that it ends."""

    response: dict[str, Any]
    items: list[Item]


class Store:
    """The latest responses, for `previous_response_id`; in memory, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def put(self, kept: Kept) -> None:
        """Keep a response; the oldest one goes where there are too many."""
        if self._size:
            self._kept[kept.response["id"]] = kept
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)

    def get(self, response_id: str, param: str | None = None) -> Kept:
        """A response that was kept; raises 404 otherwise."""
        if (kept := self._kept.get(response_id)) is None:
            raise APIError(
                404,
                f"there is no response {response_id!r}; this server keeps the latest {self._size} (store: true)",
                param,
                "response_not_found",
            )
        self._kept.move_to_end(response_id)
        return kept

    def delete(self, response_id: str) -> None:
        """Forget a response; raises 404 where there is none."""
        self.get(response_id)
        del self._kept[response_id]


def messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as the messages of a chat: what the assistant thought, said and called in a row is one message.

    Raises:
        APIError: an item is of a kind that this server does not have, named by its place.
    """
    found: list[dict[str, Any]] = []
    if instructions is not None:
        found.append({"role": "system", "content": instructions})
    for i, item in enumerate(items):
        where = f"input.{i}"
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            role = item.get("role")
            if not isinstance(role, str):
                raise APIError(400, "a message needs a role", f"{where}.role")
            text = _text(item.get("content"), f"{where}.content")
            if role == "assistant":
                _assistant(found)["content"] = text
            else:
                found.append({"role": role, "content": text})
        elif kind == "reasoning":
            _assistant(found)["reasoning_content"] = _text(item.get("content") or item.get("summary") or [], where)
        elif kind == "function_call":
            call = {"name": _word(item, "name", where), "arguments": _word(item, "arguments", where)}
            call_id = _word(item, "call_id", where)
            _assistant(found).setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": call})
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "tool_call_id": _word(item, "call_id", where), "content": output})
        else:
            raise APIError(400, f"an item of type {kind!r} is not offered here", f"{where}.type", "unsupported_item")
    return found


def _assistant(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that goes on, or a new one."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise APIError(400, "content is text, or a list of parts", where)
    texts = []
    for i, part in enumerate(content):
        text = (part.get("text") or part.get("refusal")) if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part.get("type") not in _TEXTS or not isinstance(text or "", str):
            raise APIError(400, "this model takes parts of text only", f"{where}.{i}", "unsupported_content")
        texts.append(text or "")
    return "\n".join(texts)


def _word(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise APIError(400, f"an item of type {item.get('type')} needs {name}, a string", f"{where}.{name}")
    return value
