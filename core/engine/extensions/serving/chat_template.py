"""Chat templates as Transformers renders them, without importing it: sandboxed Jinja over plain data.

A template comes with the checkpoint, so it is treated as foreign code: the sandbox forbids attributes that begin with
an underscore and calls that change their arguments, and all that a template sees is JSON data.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_END = "END_OF_THE_MESSAGE_TO_CONTINUE "  # the space shows whether the template trims
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that clients and templates give it


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation, as `apply_chat_template` of Transformers makes it.

    Args:
        template: Jinja source.
        messages: plain data; keys whose value is None are left out.
        continue_final_message: cut the text behind the last message's content.
        variables: what else the template sees.

    Raises:
        jinja2.TemplateError: the template is wrong, or refuses the messages.
        ValueError: there is no final message that could be continued.
    """
    chat = [_with_reasoning({k: v for k, v in m.items() if v is not None}) for m in messages]
    if continue_final_message:
        _mark_end(chat[-1])
    text = _compile(template).render(messages=chat, **variables)
    if not continue_final_message:
        return text
    end = text.rfind(_END.strip())
    if end < 0:
        raise ValueError("the template leaves the final message out, so it cannot be continued")
    return text[:end] if text.startswith(_END, end) else text[:end].rstrip()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[key] for key in _REASONING if key in message), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END
        return
    for part in reversed(content or []):
        if isinstance(part, dict) and "text" in part:
            part["text"] += _END
            return
    raise ValueError("the final message has no text that could be continued")


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_make_dict,
        namespace=_Namespace,
    )
    return environment.from_string(template)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore: they would reach Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **values)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: names do not begin with _")


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's tokens for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body's nodes."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _make_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def select(templates: str | dict[str, str] | None, tools: object) -> str:
    """Of a tokenizer's templates the one to use; raises `ValueError` where none fits."""
    if isinstance(templates, str):
        return templates
    found = (templates or {}).get("tool_use") if tools else None
    found = found or (templates or {}).get("default")
    if found is None:
        raise ValueError("the tokenizer has several chat templates and no default; name the source with chat_template")
    return found
