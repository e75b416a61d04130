"""Weights that were never trained, to measure with: for the same seed the same on every device."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from engine.extensions.checkpoints.files import pieces
from engine.interfaces import Device

_NOISE = (1 << 20) + 7  # odd, so that the rows of a matrix do not repeat


class DummyPlan:
    """Fills random weights that keep activations finite. Each rank of a model that is split draws its own share."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._model, self._seed = model, seed

    def fill(self, device: Device, *, progress: bool = False) -> None:
        """See `LoadPlan.fill`."""
        noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(self._seed))
        for name, parameter in list(self._model.named_parameters()):
            sink = getattr(parameter, "sink", None)
            target = parameter.data if sink is None else torch.empty(parameter.shape, dtype=parameter.dtype)
            if target.dim() < 2:
                target.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            scaled = (noise * target.shape[-1] ** -0.5).to(target.device, target.dtype)
            for _, piece in pieces(target.view(-1), _NOISE):
                piece.copy_(scaled[: piece.numel()])
            if sink is not None:
                sink(target)
