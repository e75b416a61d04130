"""What parsers are made of: a generator that reads a model's text while it comes, and tells what it finds.

    text in pieces -> push() -> events: Reasoning | Text | Call, Arguments...

A parser is written as if all text were there; where it needs more it yields, and goes on when more has come. So one
machine serves streams and whole answers alike, and no cut of the text into pieces changes what is found.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")
Parse = Generator[None, None, T]
"""A piece of a parser: yields where it needs more text, returns a `T`."""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call begins; what `Arguments` follow are its own."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments, which are JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class EndOfCall:
    """The call is complete."""


Event = Text | Reasoning | Call | Arguments | EndOfCall


class Reader(ABC):
    """Reads text in pieces."""

    def __init__(self) -> None:
        self._buffer = ""
        self._ended = False
        self._events: list[Event] = []
        self._parse = self.parse()
        self._over = False

    @abstractmethod
    def parse(self) -> Parse[None]:
        """The format, from the first character to the last."""

    def push(self, text: str) -> list[Event]:
        """Take in a piece; what it brought."""
        self._buffer += text
        return self._advance()

    def finish(self) -> list[Event]:
        """The text has ended; what was held back."""
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        if not self._over:
            self._over = next(self._parse, _OVER) is _OVER
        if self._over and self._buffer:  # behind the end of the format, all is text
            self.emit(Text(self.take(len(self._buffer))))
        events, self._events = self._events, []
        return events

    def emit(self, event: Event) -> None:
        """Tell of something."""
        self._events.append(event)

    def take(self, count: int) -> str:
        """Remove characters that are there."""
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        return text

    def at_least(self, count: int) -> Parse[bool]:
        """Wait for characters; false where the text ends before."""
        while len(self._buffer) < count:
            if self._ended:
                return False
            yield
        return True

    def space(self) -> Parse[str]:
        """Skip white space, and return it."""
        skipped = ""
        while True:
            skipped += self.take(len(self._buffer) - len(self._buffer.lstrip()))
            if self._buffer or self._ended:
                return skipped
            yield

    def starts(self, *words: str) -> Parse[str | None]:
        """The longest of the words that comes next, which is taken; None where none does."""
        while True:
            may_come = any(len(w) > len(self._buffer) and w.startswith(self._buffer) for w in words)
            if not may_come or self._ended:
                found = max((w for w in words if self._buffer.startswith(w)), key=len, default=None)
                self.take(len(found or ""))
                return found
            yield

    def until(self, *words: str, emit: Callable[[str], Event] | None = Text, trim: bool = True) -> Parse[str | None]:
        """Emit text up to one of the words, which is taken and returned; None where the text ends first.

        Args:
            words: of them the first in the text counts.
            emit: makes events of the text; None drops it.
            trim: leave out the white space right before the word.
        """
        while True:
            found = [(at, -len(w), w) for w in words if (at := self._buffer.find(w)) >= 0]
            if found:
                at, _, word = min(found)
                self._tell(self.take(at), emit, trim)
                self.take(len(word))
                return word
            held = len(self._buffer) if self._ended else self._held(words, trim)
            self._tell(self.take(held), emit, False)
            if self._ended:
                return None
            yield

    def _held(self, words: tuple[str, ...], trim: bool) -> int:
        """Where that part of the buffer begins that may yet turn out to be (before) one of the words."""
        text = self._buffer
        overlap = max(
            (n for w in words for n in range(min(len(w) - 1, len(text)), 0, -1) if text.endswith(w[:n])), default=0
        )
        kept = text[: len(text) - overlap]
        return len(kept.rstrip()) if trim else len(kept)

    def _tell(self, text: str, emit: Callable[[str], Event] | None, trim: bool) -> None:
        text = text.rstrip() if trim else text
        if text and emit is not None:
            self.emit(emit(text))

    def text_before(self, *words: str) -> Parse[tuple[str, str | None]]:
        """The whole text up to one of the words, which is taken, and that word; all the rest and None at the end."""
        while True:
            found = [(at, -len(w), w) for w in words if (at := self._buffer.find(w)) >= 0]
            if found:
                at, _, word = min(found)
                text = self.take(at)
                self.take(len(word))
                return text, word
            if self._ended:
                return self.take(len(self._buffer)), None
            yield

    def json_text(self, sink: Callable[[str], None]) -> Parse[bool]:
        """Hand a JSON value's own text on as it comes; false where the text ends inside it."""
        depth, quoted, begun = 0, False, False
        while True:
            at, end = 0, None
            text = self._buffer
            while at < len(text):
                c = text[at]
                if quoted:
                    if c == "\\" and at + 1 == len(text) and not self._ended:
                        break  # what it escapes is still to come
                    at += 1 + (c == "\\")
                    if c == '"':
                        quoted = False
                        end = at if depth == 0 else None
                else:
                    # behind a number or a word, or where there is no value at all
                    if depth == 0 and (c in "]}" or (begun and c in ", \t\r\n;")):
                        end = at
                        break
                    at += 1
                    quoted = c == '"'
                    depth += (c in "{[") - (c in "}]")
                    if depth == 0 and c in "}]":
                        end = at
                begun = True
                if end is not None:
                    break
            if piece := self.take(at if end is None else end):
                sink(piece)
            if end is not None:
                return True
            if self._ended:
                return False
            yield


_OVER = object()


class ReasoningParser(Reader):
    """Tells reasoning from the answer.

    Attributes:
        signature: texts by which a chat template shows that its model reasons like this; none matches no template.
        begin, end: what encloses reasoning.
        inside: whether answers begin with reasoning, though `begin` is in the prompt or left out.
    """

    signature: ClassVar[tuple[str, ...]] = ()
    begin: ClassVar[str]
    end: ClassVar[str]
    inside: ClassVar[bool] = False

    def __init__(self, prompt: str) -> None:
        self._inside = self.inside_after(prompt)
        super().__init__()

    @classmethod
    def inside_after(cls, prompt: str) -> bool:
        """Whether an answer to `prompt` begins inside of reasoning."""
        return prompt.rstrip().endswith(cls.begin) or (cls.inside and not prompt.rstrip().endswith(cls.end))

    def parse(self) -> Parse[None]:
        """One block of reasoning, at the beginning; all else is text."""
        yield from self.space()
        if (yield from self.starts(self.begin)) or self._inside:
            yield from self.space()
            yield from self.until(self.end, emit=Reasoning)
            yield from self.space()


class ToolParser(Reader):
    """Finds calls of tools.

    Attributes:
        signature: texts by which a chat template shows that its model calls tools like this; none matches no template.
        string_arguments: whether the template takes a call's arguments as JSON text; otherwise as an object.
        closing: what stands behind a call's arguments; None where forced calls are not held to the tools' schemas.
        joining: what stands between two calls, up to the second one's name; None where a forced answer has one.
        ending: what stands behind the last call.
    """

    signature: ClassVar[tuple[str, ...]] = ()
    string_arguments: ClassVar[bool] = False
    closing: ClassVar[str | None] = None
    joining: ClassVar[str | None] = None
    ending: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def opening(cls, name: str | None) -> str:
        """What an answer begins with that must call a tool: up to its arguments, or without `name` up to its name."""

    @staticmethod
    def new_id() -> str:
        """An id for a call."""
        return f"call_{secrets.token_hex(12)}"

    def call_object(self, arguments: tuple[str, ...], before: str = "") -> Parse[bool]:
        """``{"name": ..., "arguments": {...}}``; false where what comes is no call, which is then told as text.

        Args:
            arguments: keys that the arguments may have.
            before: what announced a call, which is text too where none comes.
        """
        return (yield from _CallObject(self, arguments, before).read())

    def call_arguments(self, name: str) -> Parse[bool]:
        """A call whose name is known and whose arguments come next; false where the text ends inside them."""
        self.emit(Call(name))
        yield from self.space()
        if not self._buffer:
            return False
        whole = yield from self.json_text(lambda piece: self.emit(Arguments(piece)))
        if whole:
            self.emit(EndOfCall())
        return whole


class _CallObject:
    """Reads one object that describes a call: arguments are told while they come, once the name is known."""

    _KEYS = frozenset(("name", "type", "id", "function"))

    def __init__(self, reader: ToolParser, arguments: tuple[str, ...], before: str) -> None:
        self._reader = reader
        self._arguments = arguments
        self._raw = [before]  # all so far, until it is known to be a call
        self._name: str | None = None
        self._early: str | None = None  # arguments that came before the name

    def read(self) -> Parse[bool]:
        reader = self._reader
        if not (yield from self._expect("{")):
            return self._no_call()
        while not (yield from self._expect("}")):
            yield from self._expect(",")
            key = yield from self._value()
            if key is None or not (yield from self._expect(":")):
                return self._no_call()
            self._raw.append((yield from reader.space()))
            if key in self._arguments:
                if not (yield from self._read_arguments()):
                    return False
                continue
            value = yield from self._value()
            if key not in self._KEYS or value is None:
                return self._no_call()
            if key == "name" or (key == "function" and isinstance(value, str)):
                self._begin(str(value))
        if self._name is None:
            return self._no_call()
        reader.emit(EndOfCall())
        return True

    def _begin(self, name: str) -> None:
        self._name = name
        self._reader.emit(Call(name))
        if self._early is not None:
            self._reader.emit(Arguments(self._early))

    def _read_arguments(self) -> Parse[bool]:
        """True where they are whole, or nothing else can be said against them."""
        reader = self._reader
        if not (yield from reader.at_least(1)):
            return self._name is not None or self._no_call()
        if self._name is not None and reader._buffer[0] in "{[":
            return (yield from reader.json_text(lambda piece: reader.emit(Arguments(piece))))
        # Before the name, or as JSON inside of a string, they are told at once when they are whole.
        value = yield from self._value()
        if value is None:
            return self._name is not None or self._no_call()
        text = value if isinstance(value, str) else self._last
        if self._name is None:
            self._early = text
        else:
            reader.emit(Arguments(text))
        return True

    def _value(self) -> Parse[Any]:
        """A whole JSON value; None where it is none, or the text ends inside it."""
        self._raw.append((yield from self._reader.space()))
        pieces: list[str] = []
        whole = yield from self._reader.json_text(pieces.append)
        self._last = "".join(pieces)
        self._raw.append(self._last)
        if not whole and not self._last:
            return None
        try:
            return json.loads(self._last)
        except ValueError:
            return None

    def _expect(self, sign: str) -> Parse[bool]:
        self._raw.append((yield from self._reader.space()))
        found = yield from self._reader.starts(sign)
        self._raw.append(found or "")
        return found is not None

    def _no_call(self) -> bool:
        """Tell what was read as text, unless it has been told as a call already."""
        if self._name is None:
            self._reader.emit(Text("".join(self._raw)))
        return False
