"""Storage for a model's weights: allocated once, in its final form, and filled by whoever reads the load format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Cut:
    """What a parameter, whose attribute ``cut`` this is, keeps of a tensor `shape`: along `dim`, `spans` in order.

    What lies beyond the tensor's size is padding. A load format reads nothing else of it.
    """

    shape: tuple[int, ...]
    dim: int
    spans: tuple[tuple[int, int], ...]


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained, of `tensor`."""
    return nn.Parameter(tensor, requires_grad=False)


def allocate(model: PreTrainedModel, parts: Iterable[Any], device: torch.device) -> None:
    """Give the parameters of `model`, all on `meta`, storage on `device`, and its buffers their values.

    Parameters are not initialised. Those that are tied stay so; `parts` allocate what is theirs (`engine_swaps`).
    """
    _compute_buffers(model, device)
    for part in parts:
        part.allocate(device)
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta and not hasattr(old, "sink"):
                if old not in made:
                    made[old] = frozen(torch.empty_like(old, device=device))
                module._parameters[name] = made[old]


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fill buffers by Transformers' own initialisation, which every model has; on the host, as Transformers does."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name, buffer in buffers:
        module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    model.initialize_weights()
    for module, name, _ in buffers:
        module.register_buffer(name, module.get_buffer(name).to(device), name not in module._non_persistent_buffers_set)
