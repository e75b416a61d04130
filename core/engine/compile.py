"""Regional compilation: one decoder layer is compiled, for any number of tokens, and all of its kind reuse it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from engine.interfaces import CompilerOptions

log = logging.getLogger(__name__)

_KINDS = 64
"""Variants that a model may add of one kind of layer. The limit is the process's, and a step beyond it fails."""


def compile_layers(
    model: nn.Module, attention: Iterable[str], options: CompilerOptions, run: Callable[[], object]
) -> None:
    """Compile the layers of `model` that hold the modules named `attention`, each the child of a module list.

    `run` runs the model; what the compiler cannot take shows there, and then the model stays eager, with a warning that
    says why.
    """
    torch._dynamo.config.recompile_limit += _KINDS
    torch._dynamo.config.accumulated_recompile_limit += 4 * _KINDS
    layers = {id(layer): layer for name in attention if (layer := _layer(model, name)) is not None}.values()
    try:
        for layer in layers:
            layer.compile(**arguments(options), fullgraph=True)
        run()
    except torch._dynamo.exc.TorchDynamoException as error:
        for layer in layers:
            layer._compiled_call_impl = None
        reason = str(error).strip().splitlines()[0]
        log.warning("%s runs uncompiled, and slower: %s", type(model).__name__, reason)


def arguments(options: CompilerOptions) -> dict[str, Any]:
    """What `torch.compile` is called with, for any number of tokens."""
    return {"backend": options.backend, "options": dict(options.options) or None, "dynamic": True}


def _layer(model: nn.Module, name: str) -> nn.Module | None:
    """The innermost ancestor of the module `name` that stands in a module list."""
    path = name.partition("#")[0].split(".")
    for end in range(len(path), 1, -1):
        if isinstance(model.get_submodule(".".join(path[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(path[:end]))
    return None
