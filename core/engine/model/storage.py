"""Storage: where parameters and buffers live before anything is read into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.model.linear import Projection
from engine.model.load import Entry

_BLOCK = (1 << 20) + 7  # odd, so that rows of a matrix do not repeat


def allocate(model: PreTrainedModel, projections: Iterable[Projection], device: torch.device) -> None:
    """Give the parameters of `model`, all on `meta`, storage on `device`, and its buffers their values.

    Parameters are not initialised. Those that are tied stay so; members of a projection view its storage.
    """
    _compute_buffers(model, device)
    for projection in projections:
        weight, bias = projection.weight, projection.bias
        rows = sum(projection.sizes)
        projection.store(
            torch.empty(rows, weight.shape[1], dtype=weight.dtype, device=device),
            None if bias is None else torch.empty(rows, dtype=bias.dtype, device=device),
        )
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    storage = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(storage, requires_grad=False)
                module._parameters[name] = made[id(parameter)]


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Fill buffers by Transformers' own initialisation, which every model has, on the host as Transformers does."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name, buffer in buffers:
        module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    model.initialize_weights()
    for module, name, _ in buffers:
        module._buffers[name] = module._buffers[name].to(device)


def fill_dummy(model: PreTrainedModel, seed: int) -> None:
    """Random weights that keep activations finite: the same for the same seed, on any device."""
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.dim() < 2:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        noise = (block * parameter.shape[-1] ** -0.5).to(parameter.device, parameter.dtype)
        for piece in parameter.data.view(-1).split(_BLOCK):
            piece.copy_(noise[: piece.numel()])
