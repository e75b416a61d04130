"""Mistral: calls behind one special token, in the three ways that its tokenizers write them."""

import secrets
import string

from engine.extensions.server.parsers.base import Parse, ToolParser

_MARK = "[TOOL_CALLS]"


class Mistral(ToolParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or since tokenizer v11 ``[TOOL_CALLS]name{...}``.

    The latter may have ``[CALL_ID]...`` and ``[ARGS]`` between name and arguments.
    """

    signature = (_MARK,)
    closing, joining, ending = "}", ', {"name": "', "]"

    @classmethod
    def opening(cls, name: str | None) -> str:
        """As the base has it."""
        return _MARK + '[{"name": "' + ("" if name is None else f'{name}", "arguments": ')

    @staticmethod
    def new_id() -> str:
        """Nine letters or digits, which is what Mistral's templates accept."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def parse(self) -> Parse[None]:
        """As the base has it."""
        while (yield from self.until(_MARK)):
            yield from self.space()
            if (yield from self.starts("[")):
                yield from self._list()
            else:
                yield from self._named()
            yield from self.space()

    def _list(self) -> Parse[None]:
        before = _MARK + "["
        while not (yield from self._closed()):
            if not (yield from self.call_object(("arguments",), before)):
                return
            yield from self.space()
            yield from self.starts(",")
            before = ""

    def _closed(self) -> Parse[bool]:
        yield from self.space()
        if (yield from self.starts("]")):
            return True
        return not (yield from self.at_least(1))

    def _named(self) -> Parse[None]:
        name, word = yield from self.text_before("[CALL_ID]", "[ARGS]", "{")
        if word == "[CALL_ID]":
            _, word = yield from self.text_before("[ARGS]", "{")
        if word == "{":
            self._buffer = "{" + self._buffer
        if word is not None:
            yield from self.call_arguments(name.strip())
