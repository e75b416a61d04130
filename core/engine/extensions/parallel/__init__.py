"""Models on several ranks: a plugin like any other's.

Registered in the entry-point group ``engine.plugins``; nothing of torch is imported before an engine starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_executors() -> Mapping[str, Callable[..., Any]]:
    """One process a rank on this machine; and replicas of whatever runs a model."""
    return {"mp": _processes, "replicas": _replicas}


def _processes(args: Any, *, progress: bool) -> Any:
    from engine.extensions.parallel.driver import ProcessExecutor

    return ProcessExecutor(args, progress=progress)


def _replicas(args: Any, *, progress: bool) -> Any:
    from engine.extensions.parallel.replicas import Replicas

    return Replicas(args, progress=progress)
