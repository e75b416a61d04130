"""Formats of tool calls and of reasoning, as plugins.

The entry-point groups ``engine.tool_parsers`` and ``engine.reasoning_parsers`` hold subclasses of `ToolParser` and
`ReasoningParser` by name; those of the engine are registered in the same way as anybody's.
"""

from __future__ import annotations

from typing import TypeVar

import importlib_metadata

from engine.errors import ConfigError, PluginError
from engine.extensions.server.parsers.base import ReasoningParser, ToolParser

TOOLS = "engine.tool_parsers"
"""The entry-point group of subclasses of `ToolParser`."""

REASONING = "engine.reasoning_parsers"
"""The entry-point group of subclasses of `ReasoningParser`."""

P = TypeVar("P", ToolParser, ReasoningParser)


def choose(group: str, kind: type[P], name: str | None, template: str) -> tuple[str, type[P]] | None:
    """The parser of a name, or without one the parser whose signature the chat template has.

    Args:
        group: `TOOLS` or `REASONING`.
        kind: what the group's entries are subclasses of.
        name: given by the user; ``"none"`` is none.
        template: source of the chat template.

    Returns:
        Name and class; None for none.

    Raises:
        ConfigError: no parser has the name.
        PluginError: its entry point does not lead to one.
    """
    entries = {entry.name: entry for entry in importlib_metadata.entry_points(group=group)}
    if name == "none":
        return None
    if name is not None:
        if name not in entries:
            raise ConfigError(f"there is no parser {name!r}; there are: {', '.join(sorted(entries))}, none")
        return name, _load(entries[name], kind)
    found = [(n, _load(entry, kind)) for n, entry in sorted(entries.items())]
    matching = [(n, p) for n, p in found if p.signature and all(text in template for text in p.signature)]
    return max(matching, key=lambda item: len(item[1].signature), default=None)  # the most specific one


def _load(entry: importlib_metadata.EntryPoint, kind: type[P]) -> type[P]:
    try:
        found = entry.load()
    except Exception as error:
        raise PluginError(
            f"parser {entry.name!r} ({entry.value}) cannot be imported: {type(error).__name__}: {error}\n"
            f"remedy: install what it needs, or uninstall its distribution"
        ) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise PluginError(
            f"parser {entry.name!r} ({entry.value}) is no subclass of {kind.__name__}\n"
            f"remedy: correct the entry point, or uninstall its distribution"
        )
    return found


__all__ = ["REASONING", "TOOLS", "ReasoningParser", "ToolParser", "choose"]
