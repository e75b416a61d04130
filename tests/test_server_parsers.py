"""Formats of tool calls and of reasoning: what is found depends on the text alone, never on how it was cut."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.extensions.server import parsers
from engine.extensions.server.chat import Format, Turn
from engine.extensions.server.parsers.base import (
    Arguments,
    Call,
    EndOfCall,
    Event,
    Reader,
    Reasoning,
    ReasoningParser,
    Text,
    ToolParser,
)
from engine.extensions.server.parsers.deepseek import DeepSeekV3, DeepSeekV31
from engine.extensions.server.parsers.hermes import Hermes
from engine.extensions.server.parsers.llama3_json import Llama3Json
from engine.extensions.server.parsers.mistral import Mistral
from engine.extensions.server.parsers.reasoning import DeepSeekR1, Think

PARIS = {"city": "Paris", "days": [1, 2, {"x": "}"}], "quote": 'a "b" \\ <tool_call>'}
TEXT = json.dumps(PARIS)
TOOLS = (Hermes, Llama3Json, Mistral, DeepSeekV3, DeepSeekV31)


class Found(NamedTuple):
    """All events of a text, joined."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str = ""
    ended: int = 0


def joined(events: list[Event]) -> Found:
    text = "".join(e.text for e in events if isinstance(e, Text))
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    calls: list[tuple[str, str]] = []
    for e in events:
        if isinstance(e, Call):
            calls.append((e.name, ""))
        elif isinstance(e, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + e.text)
    return Found(text, tuple(calls), reasoning, sum(isinstance(e, EndOfCall) for e in events))


def read(reader: Reader, pieces: list[str]) -> Found:
    events = [e for piece in pieces for e in reader.push(piece)]
    return joined(events + reader.finish())


def call(name: str, key: str = "arguments", text: str = TEXT) -> str:
    return f'{{"name": "{name}", "{key}": {text}}}'


F, G = ("f", TEXT), ("g", "{}")
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V3 = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{TEXT}\n```<｜tool▁call▁end｜>"
V31 = f"<｜tool▁call▁begin｜>f<｜tool▁sep｜>{TEXT}<｜tool▁call▁end｜>"
G3, G31 = V3.replace(TEXT, "{}").replace(">f\n", ">g\n"), V31.replace(TEXT, "{}").replace(">f<", ">g<")

CASES: list[tuple[type[ToolParser], str, Found]] = [
    (Hermes, "no call: a < b, <tool", Found("no call: a < b, <tool")),
    (Hermes, f"<tool_call>\n{call('f')}\n</tool_call>", Found("", (F,), ended=1)),
    (
        Hermes,
        f"Let me see.\n\n<tool_call>{call('f')}</tool_call>\n<tool_call>\n{call('g', text='{}')}</tool_call> ok",
        Found("Let me see.ok", (F, G), ended=2),
    ),
    (Hermes, f'<tool_call>{{"arguments": {TEXT}, "name": "f"}}</tool_call>', Found("", (F,), ended=1)),
    (Hermes, f"<tool_call>{call('f', text=json.dumps(TEXT))}</tool_call>", Found("", (F,), ended=1)),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a": "b', Found("", (("f", '{"a": "b'),))),
    (Hermes, "<tool_call>[1]</tool_call>", Found("<tool_call>[1]</tool_call>")),
    (Hermes, '<tool_call>{"nam', Found('<tool_call>{"nam')),
    (Llama3Json, call("f", "parameters"), Found("", (F,), ended=1)),
    (Llama3Json, "<|python_tag|>" + call("f", "parameters"), Found("", (F,), ended=1)),
    (
        Llama3Json,
        f'{{"type": "function", "name": "f", "parameters": {TEXT}}}; {call("g", "parameters", "{}")}',
        Found("", (F, G), ended=2),
    ),
    (Llama3Json, "Hello {x}", Found("Hello {x}")),
    (Llama3Json, '{"answer": 42}', Found('{"answer": 42}')),
    (Mistral, f"[TOOL_CALLS][{call('f')}, {call('g', text='{}')}]", Found("", (F, G), ended=2)),
    (Mistral, f"One moment. [TOOL_CALLS] [{call('f')}]", Found("One moment.", (F,), ended=1)),
    (Mistral, f"[TOOL_CALLS]f{TEXT}[TOOL_CALLS]g[ARGS]{{}}", Found("", (F, G), ended=2)),
    (Mistral, f"[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{TEXT}", Found("", (F,), ended=1)),
    (DeepSeekV3, f"Well.{BEGIN}{V3}\n{G3}{END}", Found("Well.", (F, G), ended=2)),
    (DeepSeekV31, f"{BEGIN}{V31}{G31}{END}", Found("", (F, G), ended=2)),
]


@pytest.mark.parametrize(("kind", "text", "found"), CASES)
def test_every_cut_finds_the_same(kind: type[ToolParser], text: str, found: Found) -> None:
    assert read(kind(), [text]) == found
    assert read(kind(), list(text)) == found
    for i in range(len(text)):
        assert read(kind(), [text[:i], text[i:]]) == found, text[:i]


@pytest.mark.parametrize("kind", TOOLS)
def test_arguments_come_while_they_are_written(kind: type[ToolParser]) -> None:
    text = {Hermes: "<tool_call>" + call("f"), Llama3Json: call("f", "parameters")}.get(kind, kind.opening("f") + TEXT)
    reader, pieces = kind(), 0
    for c in text:
        pieces += sum(isinstance(e, Arguments) for e in reader.push(c))
    assert pieces >= len(TEXT) - TEXT.count("\\")  # an escape comes with what it escapes


@pytest.mark.parametrize("kind", TOOLS)
def test_what_a_forced_call_begins_with_is_read_back(kind: type[ToolParser]) -> None:
    assert read(kind(), [kind.opening("f"), TEXT]).calls == (F,)
    begun = kind.opening(None)
    assert kind.opening("f").startswith(begun) or kind is DeepSeekV31


@given(st.sampled_from(TOOLS), st.lists(st.sampled_from([*'{}[]",:;\\ nul1', *(w for _, t, _ in CASES for w in (t,))])))
@example(Hermes, ["<tool_call>", "]", "}"])
def test_no_text_breaks_a_parser(kind: type[ToolParser], words: list[str]) -> None:
    """Nor makes it wait for ever; and a text is found alike in one piece and in many."""
    text = "".join(words)
    assert read(kind(), [text]) == read(kind(), list(text))


@pytest.mark.parametrize(
    ("kind", "prompt", "text", "found"),
    [
        (Think, "", "<think>\nhm\n</think>\n\nyes", Found("yes", reasoning="hm")),
        (Think, "<think>\n", "hm\n</think>\n\nyes", Found("yes", reasoning="hm")),
        (Think, "", "yes, no </think>", Found("yes, no </think>")),
        (Think, "", "<think>for ever", Found(reasoning="for ever")),
        (DeepSeekR1, "", "hm</think>yes", Found("yes", reasoning="hm")),
    ],
)
def test_reasoning(kind: type[ReasoningParser], prompt: str, text: str, found: Found) -> None:
    assert read(kind(prompt), [text]) == read(kind(prompt), list(text)) == found


def turn(text: str, **form: Any) -> tuple[Found, Turn]:
    fields: dict[str, Any] = {
        "prompt": "",
        "opening": "",
        "tools": Hermes,
        "reasoning": Think,
        "parallel": True,
    }
    made = Turn(Format(**fields | form))
    events: list[Event] = []
    for c in text:
        events += made.push(c)
    return joined(events + made.finish()), made


TWO = f"<tool_call>{call('f')}</tool_call><tool_call>{call('g', text='{}')}</tool_call>"


def test_reasoning_comes_before_calls() -> None:
    found, made = turn(f"<think><tool_call> or not</think>{TWO}")
    assert found == Found("", (F, G), "<tool_call> or not", 2)
    assert made.num_calls == 2


def test_one_call_where_several_are_not_wanted() -> None:
    found, made = turn(TWO, parallel=False)
    assert found.calls == (F,)
    assert made.over


def test_a_named_call_ends_the_answer() -> None:
    found, made = turn(TEXT + "}\n</tool_call> and more", opening=Hermes.opening("f"), only="f", reasoning=None)
    assert (found.text, found.calls) == ("", (F,))
    assert made.over


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert turn('<tool_call>{"name": "f"}</tool_call>')[0].calls == (("f", "{}"),)


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("{{ '<tool_call>' }} {{ content.split('</think>') }}", "hermes", "think"),
        ("{{ '<|python_tag|>' }}", "llama3_json", None),
        ("[TOOL_CALLS]", "mistral", None),
        ("<｜tool▁sep｜> ```json", "deepseek_v3", None),
        ("<｜tool▁sep｜>", "deepseek_v31", None),
        ("{{ content }}", None, None),
    ],
)
def test_the_template_tells_the_format(template: str, tools: str | None, reasoning: str | None) -> None:
    found = parsers.choose(parsers.TOOLS, ToolParser, None, template)  # type: ignore[type-abstract]
    assert (found and found[0]) == tools
    thought = parsers.choose(parsers.REASONING, ReasoningParser, None, template)
    assert (thought and thought[0]) == reasoning


def test_a_parser_that_does_not_exist_is_an_error() -> None:
    assert parsers.choose(parsers.REASONING, ReasoningParser, "none", "</think>") is None
    with pytest.raises(ConfigError, match="there are: deepseek_r1"):
        parsers.choose(parsers.REASONING, ReasoningParser, "thinker", "")
