"""Quantised linear layers, a plugin like any other's: rounded while they are loaded, or stored so by the checkpoint.

Registered in the entry-point group ``engine.plugins``; nothing of torch is imported before a model is loaded. What
reads and keeps the weights is the checkpoints', the projections' and the platform's: this says which are how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.hooks import hookimpl


@hookimpl
def engine_quantization() -> Mapping[str, Callable[..., Any]]:
    """Words of ``--quantization``, and what checkpoints call their methods."""
    return {"int8": _round, "int4": _round, "awq": _read, "compressed-tensors": _read, "gptq": _read}


@hookimpl
def engine_swaps() -> Mapping[str, Callable[..., Any]]:
    """A rounded head that shares its weight with the embedding; other layers are the projections'."""
    return {"quantization": _share}


def _round(model: Any, args: Any, seen: Any) -> None:
    from engine.extensions.quantization.rounded import mark

    mark(model, args, seen)


def _read(model: Any, args: Any, seen: Any) -> None:
    from engine.extensions.quantization.stored import mark

    mark(model, args, seen)


def _share(model: Any, seen: Any, linear: Any) -> Any:
    from engine.extensions.quantization.shared import share

    return share(model, linear)
