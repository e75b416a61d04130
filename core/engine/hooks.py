"""What several plugins may answer at once: pluggy's hook specifications, called through `engine.plugins.get_hooks`.

A plugin names a module, or an instance, in the entry-point group ``engine.plugins`` and marks its functions with
`hookimpl`. A function may leave out arguments that it does not need. Whatever a hook raises ends in a `PluginError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from engine.info import EngineStats

PROJECT = "engine"
"""pluggy's project name: a plugin may make its marker with ``pluggy.HookimplMarker("engine")``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def engine_config_defaults(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Values for options that the user left open.

    Args:
        options: every option by name, None where it was left open.

    Returns:
        Option name to value, ignored for options that are not None. It is an error to name an option that does not
        exist, or to contradict another plugin.
    """


@hookspec
def engine_models() -> Mapping[str, Callable[..., Any]] | None:
    """Adapters of model architectures, for models that need more than the engine's own swaps.

    Returns:
        Name of the model's class to its adapter, which is called as ``adapter(model, context)`` before the model is
        examined, while its parameters are on `meta`: it exchanges methods of the model's parts. `context` is the
        `StepContext` that tells each step's positions. The adapter may return how many of the model's positions no
        token can have. Two plugins that adapt one architecture are an error.
    """


@hookspec
def engine_load_formats() -> Mapping[str, Callable[..., Any]] | None:
    """Load formats, for weights that are stored in a way of their own.

    Returns:
        The word that ``--load-format`` takes to a function, which is called as ``plan = open(model, args)`` with the
        `EngineArgs`, while the model's parameters are on `meta`: it checks what it can, and changes nothing but which
        are tied. Once they have storage, ``plan.fill(device, progress=bool)`` fills them. A parameter with a ``cut``
        (`engine.model.load.Cut`) keeps a part of its tensor. ``open.nbytes(args)``, if it is there, says early how many
        bytes of weights stay as they are stored. Two plugins that read one format are an error.
    """


@hookspec
def engine_swaps() -> Mapping[str, Callable[..., Any]] | None:
    """Swaps of a model's parts, made once a probe has seen it, while its parameters are on `meta`.

    Returns:
        The name to a function, called as ``parts = swap(model, seen, linear)`` with what the probe saw and
        `Platform.linear`. Each part gets ``allocate(device)`` and, once weights are read, ``pack(linear(None))``. A
        parameter with an attribute ``sink`` gets no storage: it is called with the tensor, on the host.
    """


@hookspec
def engine_quantization() -> Mapping[str, Callable[..., Any]] | None:
    """Ways in which weights are quantised.

    Returns:
        The word of ``--quantization``, or a checkpoint's ``quant_method``, to ``mark(model, args, seen)``, called with
        what a probe saw: it gives layers an attribute ``quant``, see `engine.extensions.projections.quantised.Recipe`.
    """


@hookspec
def engine_executors() -> Mapping[str, Callable[..., Any]] | None:
    """What runs a model on several ranks, by the word that ``--distributed-executor-backend`` takes.

    Returns:
        The word to a function, called as ``make(args, progress=bool)``, which gives an `engine.engine.Executor`, its
        model loaded. The word ``replicas`` gives what stands for an `EngineCore` with ``data_parallel_size``.
    """


@hookspec
def engine_grammars(options: Mapping[str, Any], vocab_size: int) -> Mapping[str, Any] | None:
    """What holds outputs to the form that `SamplingParams.structured_outputs` asks for.

    Returns:
        ``"grammars"`` to an object with the methods of `engine.extensions.grammar.masks.Grammars`. Two are an error.
    """


@hookspec
def engine_tokenizers() -> Mapping[str, Callable[..., Any]] | None:
    """Ways to read a tokenizer.

    Returns:
        The word that ``--tokenizer-mode`` takes to a function, called as ``load(folder, trust, vocab_size)``, which
        gives an `engine.text.Tokenizer`; see `engine.text.load_tokenizer`. Two plugins with one word are an error.
    """


@hookspec
def engine_stats(stats: EngineStats) -> None:
    """A snapshot after each step. It runs on the engine's thread, so it must return at once.

    Args:
        stats: frozen; later versions may add fields.
    """
