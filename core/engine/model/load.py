"""Storage for a model's weights: allocated once, in its final form, and filled by whoever reads the load format."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.model.linear import Projection, frozen

_NOISE = (1 << 20) + 7  # odd, so that the rows of a matrix do not repeat


def allocate(model: PreTrainedModel, projections: Iterable[Projection], device: torch.device) -> None:
    """Give the parameters of `model`, all on `meta`, storage on `device`, and its buffers their values.

    Parameters are not initialised. Those that are tied stay so; members of a projection view its storage.
    """
    _compute_buffers(model, device)
    for projection in projections:
        projection.allocate(device)
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
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


def fill_dummy(model: PreTrainedModel, seed: int) -> None:
    """Random weights that keep activations finite: for the same seed the same on every device."""
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scaled = (noise * parameter.shape[-1] ** -0.5).to(parameter.device, parameter.dtype)
        for _, piece in pieces(parameter.data.view(-1), _NOISE):
            piece.copy_(scaled[: piece.numel()])


def pieces(flat: Tensor, step: int) -> Iterable[tuple[int, Tensor]]:
    """Parts of at most `step` elements, each with the index where it begins."""
    return ((begin, flat[begin : begin + step]) for begin in range(0, flat.numel(), step))
