"""DeepSeek V3, R1 and V3.1: calls between special tokens of their own."""

from typing import ClassVar

from engine.extensions.server.parsers.base import Parse, ToolParser

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeekV3(ToolParser):
    """V3 and R1 write ``function<sep>name``, a line break, and the arguments in a fenced block of JSON."""

    signature: ClassVar[tuple[str, ...]] = (_SEP, "```json")
    string_arguments = True
    closing: ClassVar[str | None] = f"\n```{_CALL_END}"
    joining: ClassVar[str | None] = f"\n{_CALL}function{_SEP}"
    ending = _END

    @classmethod
    def opening(cls, name: str | None) -> str:
        """As the base has it."""
        return f"{_BEGIN}{_CALL}function{_SEP}" + ("" if name is None else f"{name}\n```json\n")

    def parse(self) -> Parse[None]:
        """As the base has it."""
        while (yield from self.until(_BEGIN)):
            while (yield from self.until(_CALL, _END, emit=None)) == _CALL:
                kind, found = yield from self.text_before(_SEP, _CALL_END)
                if found != _SEP:
                    continue
                if kind.strip() == "function":
                    name, _ = yield from self.text_before("\n")
                    yield from self.space()
                    yield from self.starts("```json")
                else:
                    name = kind  # as V3.1 writes it
                if not (yield from self.call_arguments(name.strip())):
                    return
                yield from self.until(_CALL_END, emit=None)


class DeepSeekV31(DeepSeekV3):
    """V3.1 writes ``name<sep>`` and the arguments right behind it."""

    signature = (_SEP,)
    closing, joining = _CALL_END, _CALL

    @classmethod
    def opening(cls, name: str | None) -> str:
        """As the base has it."""
        return f"{_BEGIN}{_CALL}" + ("" if name is None else f"{name}{_SEP}")
