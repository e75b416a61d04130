"""``--quantization int8`` and ``int4``: float weights are rounded as they are read."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.config import EngineArgs
from engine.errors import ConfigError, UnsupportedModelError
from engine.interfaces import QuantScheme
from engine.model.probe import Observations

log = logging.getLogger(__name__)

GROUP = 32
"""Inputs that share a scale of 4 bits: rounding to the nearest needs small groups. The same as in llama.cpp's Q4_0."""

_LEAST_OUTPUTS = 32
"""Narrower layers are gates and routers, which weigh nothing and decide much."""

_INT8 = QuantScheme("int8", 8)
_INT4 = QuantScheme("int4", 4, GROUP)


@dataclass(frozen=True)
class Rounding:
    """See `engine.extensions.projections.quantised.Recipe`."""

    scheme: QuantScheme
    dtype: torch.dtype
    decode: None = None


def mark(model: PreTrainedModel, args: EngineArgs, seen: Observations | None) -> None:
    """Mark the linear layers that a probe saw. The head gets 8 bits in any case, since its errors are the logits'.

    Raises `ConfigError` for a checkpoint that is quantised already, `UnsupportedModelError` where nothing is marked.
    """
    word = args.quantization
    if getattr(model.config, "quantization_config", None):
        raise ConfigError(f"quantization {word!r}: {args.folder} has quantised weights already; leave the option out")
    head, marked = model.get_output_embeddings(), 0
    for linear in [] if seen is None else seen.linears:
        assert isinstance(linear, nn.Linear)
        whole: tuple[int, ...] = getattr(linear.weight, "cut", linear.weight).shape  # of all ranks
        if whole[0] < _LEAST_OUTPUTS or not linear.weight.numel():
            continue
        finer = word == "int8" or linear is head or linear.weight.shape[1] % GROUP
        linear.quant = Rounding(_INT8 if finer else _INT4, linear.weight.dtype)  # type: ignore[assignment]
        marked += 1
    if not marked:
        raise UnsupportedModelError(
            f"quantization {word!r}: {type(model).__name__} has no linear layer that a probe saw; leave the option out"
        )
    if seen is not None and seen.experts:
        log.warning(
            "quantization %r: %d layers of experts stay as they are, in %s", word, len(seen.experts), args.dtype
        )
