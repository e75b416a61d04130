"""Hermes and Qwen: each call is a JSON object between two tags."""

from engine.extensions.server.parsers.base import Parse, ToolParser


class Hermes(ToolParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of times."""

    signature = ("<tool_call>",)
    closing, joining = "}\n</tool_call>", '\n<tool_call>\n{"name": "'

    @classmethod
    def opening(cls, name: str | None) -> str:
        """As the base has it."""
        return '<tool_call>\n{"name": "' + ("" if name is None else f'{name}", "arguments": ')

    def parse(self) -> Parse[None]:
        """As the base has it."""
        while (yield from self.until("<tool_call>")):
            if (yield from self.call_object(("arguments", "parameters"), "<tool_call>")):
                yield from self.space()
                yield from self.starts("</tool_call>")
                yield from self.space()
