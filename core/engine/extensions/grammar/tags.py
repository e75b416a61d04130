"""Structural tags: a description of parts, in the format that XGrammar and vLLM have, as a grammar in Lark's syntax.

    {"type": "sequence", "elements": [...]}     {"type": "or", "elements": [...]}
    {"type": "const_string", "value": "text"}   {"type": "any_text"}
    {"type": "json_schema", "json_schema": {}}  {"type": "regex", "pattern": ""}  {"type": "grammar", "grammar": ""}
    {"type": "tag", "begin": "<a>", "content": {}, "end": "</a>"}
    {"type": "tags_with_separator", "tags": [], "separator": "", "at_least_one": false, "stop_after_first": false}
    {"type": "triggered_tags", "triggers": [], "tags": [], "at_least_one": false, "stop_after_first": false}

Any text of a tag ends with the tag's end; elsewhere it goes on as far as it can. A special token, which no text can
match, is meant by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Literal = Callable[[str], list[str | int]]
"""A text as pieces of text and ids of special tokens."""


class TagError(ValueError):
    """The description cannot be read; the message says what is wrong with it."""


class Writer:
    """Writes one description as a list of grammars, as llguidance reads it.

    Args:
        literal: knows the tokenizer's special tokens.
        schema: brings a JSON schema into the form that the grammar has.
        lark: brings a grammar into Lark's syntax.
    """

    def __init__(self, literal: Literal, schema: Callable[[Any], Any], lark: Callable[[str], str]) -> None:
        self._literal, self._schema, self._lark = literal, schema, lark
        self._rules: list[str] = []
        self._others: list[dict[str, Any]] = []

    def write(self, part: Any) -> str:
        """The grammar; raises `TagError`."""
        try:
            start = self._part(part)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise TagError(f"a part of it cannot be read: {what}") from None
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._rules, r"TEXT: /(.|\n)*/", ""])
        return json.dumps({"grammars": [{"name": "tags", "lark_grammar": lark}, *self._others]})

    def _part(self, part: Mapping[str, Any]) -> str:
        write = _PARTS.get(part["type"])
        if write is None:
            raise TagError(f"there is no type {part['type']!r}; there are {', '.join(_PARTS)}")
        return write(self, part)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"p{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _text(self, text: str) -> str:
        return " ".join(json.dumps(p) if isinstance(p, str) else f"<[{p}]>" for p in self._literal(text))

    def _until(self, end: str) -> str:
        """Any text up to `end`, which is a part of it."""
        pieces = self._literal(end)
        if not pieces:
            return "TEXT"
        if isinstance(pieces[0], int):
            return self._rule(f"TEXT {self._text(end)}")
        head = self._rule(rf"/(.|\n)*{_escaped(pieces[0])}/", "[lazy]")
        return f"{head} {self._text(end[len(pieces[0]) :])}" if len(pieces) > 1 else head

    def _elements(self, part: Mapping[str, Any]) -> list[str]:
        if not isinstance(part["elements"], list) or not part["elements"]:
            raise TagError("elements is a list of parts, and not empty")
        return [self._part(element) for element in part["elements"]]

    def _sequence(self, part: Mapping[str, Any]) -> str:
        return self._rule(" ".join(self._elements(part)))

    def _either(self, part: Mapping[str, Any]) -> str:
        found = self._elements(part)
        filled = [element for element in found if element]
        return self._rule(f"({' | '.join(filled)})" + "?" * (len(filled) < len(found))) if filled else ""

    def _const_string(self, part: Mapping[str, Any]) -> str:
        return self._text(part["value"])

    def _any_text(self, part: Mapping[str, Any]) -> str:
        return "TEXT"

    def _json_schema(self, part: Mapping[str, Any]) -> str:
        return self._rule(f"%json {json.dumps(self._schema(part['json_schema']))}")

    def _regex(self, part: Mapping[str, Any]) -> str:
        return self._rule(f"/{_line(part['pattern'])}/")

    def _grammar(self, part: Mapping[str, Any]) -> str:
        name = f"g{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": self._lark(part["grammar"])})
        return f"@{name}"

    def _tag(self, part: Mapping[str, Any], begin: str | None = None) -> str:
        """One tag, from `begin` on if part of it is there already."""
        opening, content, end = self._text(part["begin"] if begin is None else begin), part["content"], part["end"]
        if content["type"] == "any_text":
            return self._rule(f"{opening} {self._until(end)}")
        return self._rule(f"{opening} {self._part(content)} {self._text(end)}")

    def _tags_with_separator(self, part: Mapping[str, Any]) -> str:
        one = self._rule(" | ".join(self._tags(part)))
        more = "" if part.get("stop_after_first") else f"({self._text(part['separator'])} {one})*"
        return self._rule(f"{one} {more}" if part.get("at_least_one") else f"({one} {more})?")

    def _triggered_tags(self, part: Mapping[str, Any]) -> str:
        found = []
        for tag in self._listed(part, "tags"):
            fitting = [t for t in self._listed(part, "triggers") if t and tag["begin"].startswith(t)]
            if not fitting:
                raise TagError(f"none of the triggers begins {tag['begin']!r}")
            trigger = max(fitting, key=len)
            found.append(self._rule(f"{self._until(trigger)} {self._tag(tag, tag['begin'][len(trigger) :])}"))
        one = self._rule(" | ".join(found))
        if part.get("stop_after_first"):
            return one if part.get("at_least_one") else self._rule(f"{one} | TEXT")
        return self._rule(f"{one}{'+' if part.get('at_least_one') else '*'} TEXT")

    def _tags(self, part: Mapping[str, Any]) -> list[str]:
        return [self._tag(tag) for tag in self._listed(part, "tags")]

    def _listed(self, part: Mapping[str, Any], name: str) -> list[Any]:
        if not isinstance(part[name], list) or not part[name]:
            raise TagError(f"{name} is a list, and not empty")
        found: list[Any] = part[name]
        return found


_PARTS: dict[str, Callable[[Writer, Mapping[str, Any]], str]] = {
    "sequence": Writer._sequence,
    "or": Writer._either,
    "const_string": Writer._const_string,
    "any_text": Writer._any_text,
    "json_schema": Writer._json_schema,
    "regex": Writer._regex,
    "grammar": Writer._grammar,
    "tag": Writer._tag,
    "tags_with_separator": Writer._tags_with_separator,
    "triggered_tags": Writer._triggered_tags,
}


def _escaped(text: str) -> str:
    return _line("".join("\n" if c == "\n" else re.escape(c) for c in text))


def _line(pattern: str) -> str:
    """The same expression as a grammar can have it between slashes: in one line, and without bare slashes."""
    one = pattern.replace("\\\n", r"\n").replace("\n", r"\n").replace("\r", r"\r")
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", one)


def modern(given: Any) -> Any:
    """The older way to write triggered tags, in the newer one; raises `TagError` where it is neither."""
    if isinstance(given, Mapping) and "format" in given:
        return given["format"]
    try:
        tags = [
            {
                "begin": structure["begin"],
                "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
                "end": structure["end"],
            }
            for structure in given["structures"]
        ]
        return {"type": "triggered_tags", "triggers": list(given["triggers"]), "tags": tags}
    except (KeyError, TypeError, AttributeError):
        raise TagError("needs 'format', or 'triggers' and 'structures' of 'begin', 'schema' and 'end'") from None


__all__ = ["Literal", "TagError", "Writer", "modern"]
