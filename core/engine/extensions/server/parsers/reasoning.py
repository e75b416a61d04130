"""Reasoning before an answer."""

from typing import ClassVar

from engine.extensions.server.parsers.base import ReasoningParser


class Think(ReasoningParser):
    """Qwen 3 and most others: ``<think>...</think>``, in the answer or begun by the prompt; or no reasoning at all."""

    signature: ClassVar[tuple[str, ...]] = ("</think>",)
    begin, end = "<think>", "</think>"


class DeepSeekR1(Think):
    """DeepSeek R1 and QwQ: the answer begins inside of it, even where nothing shows that."""

    signature = ()
    inside = True


class Mistral(ReasoningParser):
    """Magistral: ``[THINK]...[/THINK]``."""

    signature = ("[/THINK]",)
    begin, end = "[THINK]", "[/THINK]"
