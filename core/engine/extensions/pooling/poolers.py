"""From a text's states to a vector: sentence-transformers' ways to pool, and the layers that it puts behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import CheckpointError, UnsupportedModelError
from engine.extensions.pooling.checkpoint import Layer


def pool(states: Tensor, ways: Sequence[str], skip: int = 0) -> Tensor:
    """The vectors of all `ways`, joined: [ways * E] of the states, float32 [n, E].

    The first `skip` tokens, of a prompt that does not count, are left out, but for the way ``"cls"``.
    """
    return torch.cat([_pool(states, way, skip) for way in ways])


def _pool(states: Tensor, way: str, skip: int) -> Tensor:
    counted = states[skip:]
    match way:
        case "cls":
            return states[0]
        case "lasttoken":
            return states[-1]
        case "max":
            return counted.max(0).values
        case "mean":
            return counted.mean(0)
        case "mean_sqrt_len":
            return counted.sum(0) / math.sqrt(len(counted))
    weights = torch.arange(1 + skip, 1 + len(states), dtype=states.dtype, device=states.device)
    return weights @ counted / weights.sum()


class After:
    """A layer behind the pooling, in float32, of vectors [..., E]; it moves to where it is used.

    Raises `CheckpointError` for missing weights and `UnsupportedModelError` for an activation that torch does not have.
    """

    def __init__(self, layer: Layer) -> None:
        path, part = layer.folder / "model.safetensors", "norm" if layer.kind == "LayerNorm" else "linear"
        try:
            weights = load_file(path)
            self._weight: Tensor = weights[f"{part}.weight"].float()
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}; download it again, as safetensors") from error
        bias = weights.get(f"{part}.bias")
        self._bias = None if bias is None else bias.float()
        self._norm = layer.kind == "LayerNorm"
        named = "Identity" if self._norm else layer.options.get("activation_function") or "Identity"
        self._activation = named_activation(named)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] to [..., out]."""
        if self._weight.device != x.device:
            self._weight = self._weight.to(x.device)
            self._bias = None if self._bias is None else self._bias.to(x.device)
        if self._norm:
            return F.layer_norm(x, self._weight.shape, self._weight, self._bias)
        return self._activation(F.linear(x, self._weight, self._bias))


def named_activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation without parameters of torch's, by the name or the path of its class."""
    package, _, word = name.rpartition(".")
    kind = getattr(torch.nn, word, None)
    ours = package == "" or package == "torch.nn" or package.startswith("torch.nn.")
    if not (ours and isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise UnsupportedModelError(f"the checkpoint has the activation {name}, which is none of torch's")
    found: Callable[[Tensor], Tensor] = kind()
    return found
