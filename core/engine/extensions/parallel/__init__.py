"""Models on several ranks: a plugin like any other's.

Registered in the entry-point group ``engine.plugins``; nothing of torch is imported before an engine starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_executors() -> Mapping[str, Callable[..., Any]]:
    """A process a rank, on this machine or where Ray starts it; and replicas of whatever runs a model."""
    return {"mp": _processes, "ray": _actors, "replicas": _replicas}


def _processes(args: Any, *, progress: bool) -> Any:
    from engine.extensions.parallel.driver import RanksExecutor
    from engine.extensions.parallel.processes import Processes

    return RanksExecutor(args, Processes, progress=progress)


def _actors(args: Any, *, progress: bool) -> Any:
    from engine.extensions.parallel.actors import Actors
    from engine.extensions.parallel.driver import RanksExecutor

    return RanksExecutor(args, Actors, progress=progress)


def _replicas(args: Any, *, progress: bool) -> Any:
    from engine.extensions.parallel.replicas import Replicas

    return Replicas(args, progress=progress)
