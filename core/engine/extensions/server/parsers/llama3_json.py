"""Llama 3.1 to 3.3: an answer that is a JSON object is a call."""

from engine.extensions.server.parsers.base import Parse, Text, ToolParser


class Llama3Json(ToolParser):
    """``{"name": ..., "parameters": {...}}``, behind ``<|python_tag|>`` or not; several are separated by ``;``."""

    signature = ("<|python_tag|>",)
    closing, joining = "}", '; {"name": "'

    @classmethod
    def opening(cls, name: str | None) -> str:
        """As the base has it."""
        return '{"name": "' + ("" if name is None else f'{name}", "parameters": ')

    def parse(self) -> Parse[None]:
        """As the base has it."""
        yield from self.space()
        while True:
            tag = yield from self.starts("<|python_tag|>")
            yield from self.space()
            if not (yield from self.at_least(1)):
                return
            if not self._buffer.startswith("{"):
                if tag:
                    self.emit(Text(tag))
                return  # text to the end
            if not (yield from self.call_object(("parameters", "arguments"), tag or "")):
                return
            yield from self.space()
            yield from self.starts(";", ",")
            yield from self.space()
