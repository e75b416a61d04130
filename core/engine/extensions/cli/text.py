"""Tables and paragraphs for the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart; an empty cell shows as ``-``."""
    cells = [list(header), *([cell or "-" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def fields(values: Mapping[str, object], indent: str = "  ") -> str:
    """Names and values, a line each, values aligned and wrapped to the terminal; lists are joined by commas."""
    width = max(map(len, values), default=0)
    return "\n".join(paragraph(_show(v), f"{indent}{name:{width}}  ") for name, v in values.items())


def paragraph(text: str, opening: str = "") -> str:
    """Text wrapped to the terminal (at most 100 columns) behind `opening`; its own line breaks are kept."""
    columns = min(shutil.get_terminal_size((80, 24)).columns, 100)
    blank = " " * len(opening)
    wrapped = [
        textwrap.fill(
            line,
            columns,
            initial_indent=blank,
            subsequent_indent=blank,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.splitlines()
    ]
    return (opening + "\n".join(wrapped)[len(opening) :]).rstrip()


def size(num_bytes: int | None) -> str:
    """Bytes for people, ``"1.5 GiB"``; empty for None."""
    if num_bytes is None:
        return ""
    power = min((max(num_bytes, 1).bit_length() - 1) // 10, 4)
    return f"{num_bytes / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
