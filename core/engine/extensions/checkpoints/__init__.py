"""Checkpoints in Hugging Face's format, a plugin like any other's: ``--load-format auto`` reads safetensors files.

Registered in the entry-point group ``engine.plugins``; nothing of Transformers is imported before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_load_formats() -> Mapping[str, Callable[..., Any]]:
    """One format, the default."""
    return {"auto": _open}


def _open(model: Any, folder: Path) -> object:
    from engine.extensions.checkpoints.plan import LoadPlan

    return LoadPlan(model, folder)
