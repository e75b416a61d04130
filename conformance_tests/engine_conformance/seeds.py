"""Where a run's random inputs begin: 0 draws the same in every run, and any other number others, as repeatable."""

from __future__ import annotations

import secrets

_seed = 0


def parse(text: str) -> int:
    """The seed that a user wrote: a number, or ``"random"`` for one that nobody had yet."""
    number = secrets.randbelow(2**31 - 1) + 1 if text == "random" else int(text)
    if number < 0:
        raise ValueError(text)
    return number


def use(seed: int) -> None:
    """Draw from `seed` in this process from now on; Hypothesis is told apart, by its option."""
    global _seed
    _seed = seed


def is_fixed() -> bool:
    """Whether Hypothesis has to draw what it derives from the case alone, which certification asks for."""
    return _seed == 0
