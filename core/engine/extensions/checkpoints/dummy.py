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
        for name, parameter in self._model.named_parameters():
            if parameter.dim() < 2:
                parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            scaled = (noise * parameter.shape[-1] ** -0.5).to(parameter.device, parameter.dtype)
            for _, piece in pieces(parameter.data.view(-1), _NOISE):
                piece.copy_(scaled[: piece.numel()])
