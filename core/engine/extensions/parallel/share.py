"""One rank's share of a model: what is cut, and which ranks it speaks with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.extensions.parallel.collectives import Group
from engine.extensions.parallel.pipeline import Pipeline
from engine.extensions.parallel.tensor import TensorParallel
from engine.interfaces import Device
from engine.model.adapt import AdaptedModel


class RankShare:
    """See `engine.model.share.Share`.

    Args:
        everyone: all ranks, those of a stage side by side.
        device: of the tensors.
        tensor: the ranks of this one's stage, which split every layer.
        stages: a rank of each stage; None where there is one.
        context: so many of these have a part of each sequence's tokens each.
        experts: whole experts are dealt out to the ranks of a stage, in place of a part of each.
        wait: returns once all ranks have called it, however long their weights take to read.
    """

    def __init__(
        self,
        everyone: Group,
        device: Device,
        *,
        tensor: Group,
        stages: Group | None = None,
        context: int = 1,
        experts: bool = False,
        wait: Callable[[], None],
    ) -> None:
        self._everyone, self._device, self._wait = everyone, device, wait
        self._tensor = TensorParallel(tensor, experts=experts, context=context) if tensor.size > 1 else None
        self._pipeline = Pipeline(stages) if stages is not None else None
        self._alike = tensor if tensor.size > 1 and (stages is None or stages.rank == stages.size - 1) else None
        self.capturable = everyone.communicator.capturable and not experts and stages is None

    def cut(self, adapted: AdaptedModel) -> None:
        """See `Share.cut`."""
        for part in (self._tensor, self._pipeline):
            if part is not None:
                part.cut(adapted)

    def loaded(self, adapted: AdaptedModel) -> None:
        """See `Share.loaded`."""
        if self._tensor is not None:
            self._tensor.settle(adapted.model)
        self._wait()

    def least(self, value: int) -> int:
        """See `Share.least`."""
        mine = torch.tensor([value], dtype=torch.int64, device=self._device.torch_device)
        return int(self._everyone.communicator.all_gather(mine).min())

    def same(self, token_ids: Tensor) -> Tensor:
        """See `Share.same`: those of the first rank of the last stage, where others of it draw too."""
        if self._alike is None:
            return token_ids
        self._alike.entered()
        return self._alike.communicator.broadcast(token_ids)
