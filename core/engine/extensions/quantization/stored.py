"""Checkpoints whose linear layers are stored as integers: each layer gets the format's tensors as its parameters.

So the load plan reads them as it reads any others: names, shapes and dtypes are checked, ranks read their cut. Once
they are there, a layer's `decode` makes one canonical form of them (`QuantWeight`), which the platform packs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.config import EngineArgs
from engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from engine.extensions.checkpoints.files import Entry, read_index
from engine.extensions.quantization.formats import FORMATS, Format, Stored
from engine.interfaces import QuantScheme, QuantWeight
from engine.model.load import Cut, frozen
from engine.model.probe import Observations


@dataclass(frozen=True)
class Reading:
    """See `engine.extensions.projections.quantised.Recipe`."""

    scheme: QuantScheme
    dtype: torch.dtype
    decode: Callable[[nn.Module], QuantWeight]


def mark(model: PreTrainedModel, args: EngineArgs, seen: Observations | None) -> None:
    """Give the layers that the checkpoint has as integers their parameters, on `meta`.

    Raises `UnsupportedModelError` for a format, or a model, that cannot be read so, and `ConfigError` for options that
    contradict the checkpoint.
    """
    config: Mapping[str, Any] = getattr(model.config, "quantization_config", None) or {}
    method = config.get("quant_method")
    if args.quantization not in (None, method):
        raise ConfigError(
            f"quantization {args.quantization!r}: {args.folder} is "
            + (f"quantised with {method!r}; leave the option out" if method else "not quantised; use int8 or int4")
        )
    if args.load_format not in ("auto", "copy"):
        raise ConfigError(
            f"load_format {args.load_format!r} reads no weights that are stored quantised; use 'auto' or 'copy', or "
            'hf_overrides={"quantization_config": null} for float ones'
        )
    formats = FORMATS[str(method)](config, str(args.folder))
    if seen is not None and seen.experts:
        raise UnsupportedModelError(
            f"{args.folder} has quantised weights and {type(model).__name__} has experts, which is not built together; "
            "use the original, unquantised checkpoint"
        )
    entries, found = read_index(args.folder), 0
    for name, linear in model.named_modules():
        if type(linear) is nn.Linear:
            stems = ((format, format.covers(name, entries)) for format in formats)
            format, stem = next(((f, stem) for f, stem in stems if stem is not None), (None, ""))
            if format is not None:
                if linear.weight.numel():  # else it is of another stage
                    _check(model, name, linear, seen)
                _prepare(linear, name, format, stem, entries)
                found += 1
    if not found:
        raise CheckpointError(
            f"{args.folder / 'config.json'} says that weights are quantised with {method!r}, and none is; download the "
            "model again, or take quantization_config out"
        )


def _check(model: PreTrainedModel, name: str, linear: nn.Linear, seen: Observations | None) -> None:
    if seen is None or linear not in seen.linears:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not call {name} as a linear layer, so its quantised weights have no use; use "
            "the original, unquantised checkpoint"
        )


def _prepare(linear: nn.Linear, name: str, format: Format, stem: str, entries: Mapping[str, Entry]) -> None:
    cut: Cut | None = getattr(linear.weight, "cut", None)
    outputs, inputs = linear.weight.shape if cut is None else cut.shape
    found = format.tensors(
        outputs, inputs, {n.removeprefix(f"{stem}."): e for n, e in entries.items() if n.startswith(f"{stem}.")}
    )
    dtype = linear.weight.dtype
    placeholder = linear.weight.data
    del linear._parameters["weight"]
    linear.__dict__["weight"] = placeholder
    for key, stored in found.items():
        linear.__dict__.pop(key, None)
        linear.register_parameter(key, _parameter(stored, cut, f"{name}.{key}"))
    linear.quant = Reading(format.scheme, dtype, lambda module: _decode(module, format, name))  # type: ignore[assignment]


def _parameter(stored: Stored, cut: Cut | None, name: str) -> nn.Parameter:
    """A tensor as it is stored, or the part of it that belongs to a cut of the weight."""
    axis = None if cut is None else (stored.outputs, stored.inputs)[cut.dim]
    if cut is None or axis is None:
        return frozen(torch.empty(stored.shape, dtype=stored.dtype, device="meta"))
    dim, unit = axis
    spans = tuple(_units(span, unit, stored.shape[dim], name) for span in cut.spans)
    shape = list(stored.shape)
    shape[dim] = sum(end - begin for begin, end in spans)
    made: Any = frozen(torch.empty(shape, dtype=stored.dtype, device="meta"))
    made.cut = Cut(stored.shape, dim, spans)
    return made  # type: ignore[no-any-return]


def _units(span: tuple[int, int], unit: int, size: int, name: str) -> tuple[int, int]:
    begin, end = span
    last = size * unit
    if begin % unit or (end % unit and end < last):
        raise ConfigError(
            f"{name} cannot be split at {begin}:{end}, since {unit} of them are stored as one; choose another "
            "tensor_parallel_size"
        )
    return begin // unit, -(-end // unit)


def _decode(module: nn.Module, format: Format, name: str) -> QuantWeight:
    try:
        weight = format.decode(
            {key: p.data for key, p in module._parameters.items() if p is not None and key != "bias"}
        )
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return weight
