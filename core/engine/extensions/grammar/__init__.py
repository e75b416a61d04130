"""Structured output: what is not allowed by a schema, a regular expression or a grammar is never produced.

    SamplingParams(structured_outputs=StructuredOutputsParams(json=Order.model_json_schema()))

forms.py     what users ask for -> a grammar of the llguidance library, or the reason why not;  tags.py: structural tags
masks.py     grammars compiled and followed, and what they allow as bits for the device

A plugin like any other's, in the entry-point group ``engine.plugins``; llguidance is imported with the first request
that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict
from weakref import WeakValueDictionary

from engine.hooks import hookimpl


class StructuredOutputsParams(TypedDict, total=False):
    """The form of an output: exactly one of the first six, under vLLM's names.

    Attributes:
        json: a JSON schema, as an object or as text; the output is one JSON value.
        json_object: true; the output is any JSON object.
        regex: a regular expression that the whole output matches, in the syntax of Rust's ``regex``.
        choice: the output is one of these texts.
        grammar: a context-free grammar, in Lark's syntax or in GBNF (``root ::= ...``).
        structural_tag: parts of text, some free and some of a form, as `engine.extensions.grammar.tags` has them, or
            ``{"triggers": [...], "structures": [{"begin", "schema", "end"}, ...]}``; as an object or as text.
        whitespace_pattern: regular expression of the white space between JSON's parts; by default nothing, one space,
            or a line break with up to 32 spaces.
        disable_any_whitespace: no white space between JSON's parts.
        disable_additional_properties: objects have no properties beyond those that their schema names.
    """

    json: dict[str, Any] | bool | str
    json_object: bool
    regex: str
    choice: list[str]
    grammar: str
    structural_tag: dict[str, Any] | str
    whitespace_pattern: str
    disable_any_whitespace: bool
    disable_additional_properties: bool


_TOKENIZER = ("model", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code")
_USED: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()


@hookimpl
def engine_grammars(options: Mapping[str, Any], vocab_size: int) -> Mapping[str, Any]:
    """One object for all parts of an engine in this process, since vocabularies are large."""
    from engine.extensions.grammar.masks import Grammars

    key = (*(options[name] for name in _TOKENIZER), vocab_size)
    return {"grammars": _USED.setdefault(key, Grammars(options, vocab_size))}


__all__ = ["StructuredOutputsParams"]
