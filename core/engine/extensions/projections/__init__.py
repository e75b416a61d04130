"""Linear layers that read the same tensor become one product: a plugin like any other's.

Registered in the entry-point group ``engine.plugins``; nothing of torch is imported before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_swaps() -> Mapping[str, Callable[..., Any]]:
    """One swap."""
    return {"projections": _fuse}


def _fuse(model: Any, seen: Any, linear: Any) -> Any:
    from engine.extensions.projections.fuse import fuse

    return fuse(model, seen, linear)
