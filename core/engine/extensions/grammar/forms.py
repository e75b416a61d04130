"""From `StructuredOutputsParams` to a grammar of llguidance. Nothing is compiled here."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import RequestError
from engine.extensions.grammar.tags import Literal, TagError, Writer, modern

WHITE_SPACE = r"(?: |\n {0,32})?"
"""Between the parts of JSON: what printers write, and not without an end, which small models would never find."""

OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
"""What may stand beside a kind."""


def wrong(message: str) -> RequestError:
    """What the user is told."""
    return RequestError(f"structured_outputs: {message}")


def grammar(wanted: Mapping[str, Any], literal: Literal) -> str:
    """The grammar that `wanted` asks for.

    Args:
        wanted: as `StructuredOutputsParams` describes it.
        literal: knows the tokenizer's special tokens, which no text can match.

    Raises:
        RequestError: naming the field that is wrong.
    """
    return _Form(wanted, literal).grammar()


class _Form:
    """One form that is asked for."""

    def __init__(self, wanted: Mapping[str, Any], literal: Literal) -> None:
        self._wanted, self._literal = wanted, literal
        pattern = wanted.get("whitespace_pattern")
        if pattern is not None and not isinstance(pattern, str):
            raise wrong("whitespace_pattern is a regular expression")
        self._space: dict[str, Any] = {"whitespace_pattern": WHITE_SPACE if pattern is None else pattern}
        if wanted.get("disable_any_whitespace"):
            self._space = {"whitespace_flexible": False}

    def grammar(self) -> str:
        """See `grammar`."""
        for name in self._wanted:
            if name not in _KINDS and name not in OPTIONS:
                close = difflib.get_close_matches(name, (*_KINDS, *OPTIONS), 1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join((*_KINDS, *OPTIONS))}"
                raise wrong(f"there is no {name!r}; {hint}")
        kinds = [name for name in _KINDS if self._wanted.get(name) not in (None, False)]
        if len(kinds) != 1:
            raise wrong(f"needs one of {', '.join(_KINDS)}, and has {' and '.join(kinds) or 'none'}")
        return _KINDS[kinds[0]](self, self._wanted[kinds[0]])

    def json(self, given: Any) -> str:
        return json.dumps({"grammars": [{"json_schema": self._schema(_parsed(given, "json"))}]})

    def json_object(self, given: Any) -> str:
        return self.json({"type": "object"})

    def regex(self, given: Any) -> str:
        if not isinstance(given, str):
            raise wrong("regex is a text")
        from llguidance import LLMatcher

        return str(LLMatcher.grammar_from_regex(given))

    def choice(self, given: Any) -> str:
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(c, str) and c for c in given):
            raise wrong("choice is a list of texts, none of them empty")
        return "start: " + " | ".join(map(json.dumps, given)) + "\n"

    def lark(self, given: Any) -> str:
        if not isinstance(given, str):
            raise wrong("grammar is a text")
        if re.search(r"^\s*start\s*:", given, re.MULTILINE):
            return given
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            return str(gbnf_to_lark(given))
        except Exception as error:  # a parser's, of any class
            raise wrong(f"grammar has no rule 'start:', and is no GBNF: {error}") from None

    def structural_tag(self, given: Any) -> str:
        try:
            return Writer(self._literal, self._schema, self.lark).write(modern(_parsed(given, "structural_tag")))
        except TagError as error:
            raise wrong(f"structural_tag: {error}") from None

    def _schema(self, schema: Any) -> dict[str, Any]:
        """A schema with the white space that JSON may have."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, dict):
            raise wrong(f"a JSON schema is an object, not {json.dumps(schema, default=repr)[:40]}")
        if self._wanted.get("disable_additional_properties"):
            schema = _closed(schema)
        return {**schema, "x-guidance": {**self._space, **(schema.get("x-guidance") or {})}}


_KINDS: dict[str, Callable[[_Form, Any], str]] = {
    "json": _Form.json,
    "json_object": _Form.json_object,
    "regex": _Form.regex,
    "choice": _Form.choice,
    "grammar": _Form.lark,
    "structural_tag": _Form.structural_tag,
}


def _parsed(given: Any, name: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise wrong(f"{name} is not JSON: {error}") from None


def _closed(schema: Any) -> Any:
    """The schema, with no properties beyond those that its objects name."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            found[key] = {name: _closed(part) for name, part in value.items()}
        else:
            found[key] = value if key in ("enum", "const", "default", "examples") else _closed(value)
    if isinstance(found.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found
