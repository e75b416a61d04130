"""Tokenizers in Hugging Face's format, a plugin like any other's: ``--tokenizer-mode auto``.

Registered in the entry-point group ``engine.plugins``; nothing of Transformers is imported before one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_tokenizers() -> Mapping[str, Callable[..., Any]]:
    """The default."""
    return {"auto": _load}


def _load(folder: str, trust_remote_code: bool, vocab_size: int | None) -> object:
    from engine.extensions.tokenizers.hugging_face import load

    return load(folder, trust_remote_code, vocab_size)
