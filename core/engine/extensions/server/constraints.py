"""What a request says of its answer's form, as `SamplingParams.structured_outputs` has it.

response_format, structured_outputs, guided_*, text.format, tool_choice -> one form, and the field that asked for it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.extensions.server.errors import APIError
from engine.extensions.server.parsers.base import ReasoningParser, ToolParser
from engine.extensions.server.protocol import Completing, ResponsesRequest, Sampling, Tool

Part = dict[str, Any]
"""A part of a structural tag."""

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
_OPTIONAL_SPACE: Part = {"type": "regex", "pattern": "[ \\n]{0,4}"}


@dataclass(frozen=True)
class Constraint:
    """The form of an answer.

    Attributes:
        field: the request's, which errors name.
        form: as `SamplingParams.structured_outputs` has it. Schemas are text: JSON has numbers that no socket takes.
    """

    field: str
    form: dict[str, Any]

    def given(self) -> dict[str, Any]:
        """As a parameter of `SamplingParams`."""
        return {"structured_outputs": self.form}

    def behind(self, reasoning: type[ReasoningParser] | None, prompt: str) -> Constraint:
        """The same, where an answer to `prompt` may begin with reasoning."""
        if reasoning is None:
            return self
        inside = reasoning.inside_after(prompt)
        begin = "" if inside else reasoning.begin
        thought = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": reasoning.end}
        head: Part = {"type": "sequence", "elements": [thought, _OPTIONAL_SPACE]}
        if not inside:
            head = {"type": "or", "elements": [head, {"type": "const_string", "value": ""}]}
        return self._tag({"type": "sequence", "elements": [head, self._part()]})

    def or_calls(self, parser: type[ToolParser], tools: Sequence[Tool], parallel: bool) -> Constraint:
        """The same, or calls of tools in its place."""
        found = _calls(parser, tools, parallel)
        if found is None:
            return self
        calls = {"type": "sequence", "elements": [{"type": "const_string", "value": parser.opening(None)}, found]}
        return self._tag({"type": "or", "elements": [self._part(), calls]})

    def _tag(self, part: Part) -> Constraint:
        options = {name: self.form[name] for name in _OPTIONS if name in self.form}
        return replace(self, form={"structural_tag": json.dumps({"format": part}), **options})

    def _part(self) -> Part:
        """The form as a part of a structural tag; what cannot be read is told by the engine."""
        form = self.form
        if "json" in form:
            return {"type": "json_schema", "json_schema": _loaded(form["json"], self.field)}
        if "json_object" in form:
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        if "regex" in form:
            return {"type": "regex", "pattern": form["regex"]}
        if "choice" in form:
            return {"type": "or", "elements": [{"type": "const_string", "value": c} for c in form["choice"]]}
        if "grammar" in form:
            return {"type": "grammar", "grammar": form["grammar"]}
        given = _loaded(form["structural_tag"], self.field)
        if isinstance(given, Mapping) and isinstance(given.get("format"), dict):
            return dict(given["format"])
        raise APIError(400, f"{self.field}: with reasoning or tools, a structural tag needs 'format'", self.field)


def asked(body: Sampling) -> Constraint | None:
    """The form that a request asks for; raises `APIError` where it asks for several, or for none that there is."""
    found: list[Constraint] = []
    if isinstance(body, Completing) and body.response_format is not None:
        found += _formatted(body.response_format, "response_format")
    if isinstance(body, ResponsesRequest) and body.text is not None and body.text.format is not None:
        found += _formatted(body.text.format, "text.format")
    if body.structured_outputs is not None:
        given = {k: v for k, v in body.structured_outputs.items() if v is not None}
        for name in ("json", "structural_tag"):
            if name in given and not isinstance(given[name], str):
                given[name] = json.dumps(given[name])
        found.append(_checked(Constraint("structured_outputs", given)))
    for field, kind in _GUIDED.items():
        if (value := getattr(body, field)) is not None:
            form = {kind: json.dumps(value) if kind == "json" and not isinstance(value, str) else value}
            if body.guided_whitespace_pattern is not None:
                form["whitespace_pattern"] = body.guided_whitespace_pattern
            found.append(Constraint(field, form))
    if len(found) > 1:
        fields = " and ".join(c.field for c in found)
        raise APIError(400, f"{fields} ask for a form each; give one of them", found[1].field)
    return found[0] if found else None


def forced(parser: type[ToolParser], tools: Sequence[Tool], name: str | None, parallel: bool) -> Constraint | None:
    """The form of an answer whose prompt ends with `ToolParser.opening`; None where the format does not tell."""
    if name is None:
        part = _calls(parser, tools, parallel)
    elif parser.closing is not None:
        tool = next(t for t in tools if t.function.name == name)
        part = {"type": "tag", "begin": "", "content": _arguments(tool), "end": parser.closing}
    else:
        part = None
    return None if part is None else Constraint("tools", {"structural_tag": json.dumps({"format": part})})


def _calls(parser: type[ToolParser], tools: Sequence[Tool], parallel: bool) -> Part | None:
    """One or several calls, from the first one's name on."""
    if parser.closing is None:
        return None
    known = len(parser.opening(None))
    tags = [
        {
            "begin": parser.opening(tool.function.name)[known:],
            "content": _arguments(tool),
            "end": parser.closing,
        }
        for tool in tools
    ]
    calls: Part = {"type": "tags_with_separator", "tags": tags, "at_least_one": True}
    calls |= {"separator": parser.joining or "", "stop_after_first": not parallel or parser.joining is None}
    return {"type": "sequence", "elements": [calls, {"type": "const_string", "value": parser.ending}]}


def _arguments(tool: Tool) -> Part:
    # OpenAI's: no parameters means none, not any
    schema = tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "json_schema", "json_schema": schema}


def _formatted(given: Mapping[str, Any], field: str) -> list[Constraint]:
    """What OpenAI's ``response_format`` and ``text.format`` ask for."""
    match given.get("type"):
        case "text":
            return []
        case "json_object":
            return [Constraint(field, {"json_object": True})]
        case "json_schema":
            # chats have the schema within an object with its name, responses beside it
            inner = given.get("json_schema") if field == "response_format" else given
            if not isinstance(inner, dict) or not isinstance(inner.get("schema"), (dict, bool)):
                path = f"{field}.json_schema.schema" if field == "response_format" else f"{field}.schema"
                raise APIError(400, f"{path} is a JSON schema, an object", path)
            return [Constraint(field, {"json": json.dumps(inner["schema"])})]
        case "structural_tag":
            tag = {key: value for key, value in given.items() if key != "type"}
            return [Constraint(field, {"structural_tag": json.dumps(tag)})]
        case other:
            kinds = "text, json_object, json_schema and structural_tag"
            raise APIError(400, f"{field} has the type {other!r}, and there are {kinds}", field)


def _checked(constraint: Constraint) -> Constraint:
    """Raise `APIError` for values that the engine could not be sent."""
    kinds = {
        "regex": str,
        "grammar": str,
        "whitespace_pattern": str,
        "json": str,
        "structural_tag": str,
        "choice": list,
    }
    for name, value in constraint.form.items():
        if name in kinds and not isinstance(value, kinds[name]):
            raise APIError(400, f"{constraint.field}.{name} is a {kinds[name].__name__}", f"{constraint.field}.{name}")
        if name == "choice" and not all(isinstance(choice, str) for choice in value):
            raise APIError(400, f"{constraint.field}.choice is a list of texts", f"{constraint.field}.choice")
        if name not in kinds and not isinstance(value, bool):
            raise APIError(400, f"{constraint.field}.{name} does not exist, or is true or false", constraint.field)
    if not set(constraint.form) - set(_OPTIONS):
        raise APIError(400, f"{constraint.field} names no form", constraint.field)
    return constraint


def _loaded(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise APIError(400, f"{field} is not JSON: {error}", field) from None
