"""Checkpoints in Hugging Face's format, a plugin like any other's: ``--load-format auto`` reads safetensors files,
or uses them where they lie; ``copy`` reads all of them.

Registered in the entry-point group ``engine.plugins``; nothing of Transformers is imported before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_load_formats() -> Mapping[str, Callable[..., Any]]:
    """The default, the same with nothing used in place, and weights that need no files."""
    return {"auto": _open, "copy": _open, "dummy": _dummy}


def _open(model: Any, args: Any) -> object:
    from engine.extensions.checkpoints.plan import LoadPlan

    return LoadPlan(model, args.folder, in_place=args.load_format == "auto")


def _dummy(model: Any, args: Any) -> object:
    from engine.extensions.checkpoints.dummy import DummyPlan

    return DummyPlan(model, args.seed)
