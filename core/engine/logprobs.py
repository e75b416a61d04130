"""Log probabilities, computed on the device now and read by the host once the step is done."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.interfaces import Device
from engine.request import TokenLogprobs


@dataclass
class DeviceLogprobs:
    """Log probabilities at L positions, of the model's own distribution: fp32, before penalties and temperature.

    Attributes:
        packed: int32 [L, 2K + 3], as `OpSet.logprobs` gives them.
        counts: for each position, how many of the K likeliest were asked for.
        index: for each position, which of `size` results it is.
        size: how many results there are; those without a position are None.
    """

    packed: Tensor
    counts: list[int]
    index: list[int]
    size: int

    def start_copy(self, device: Device) -> None:
        """Start the copy to page-locked memory; `to_host` may follow once an event recorded after this has passed."""
        self.packed = device.host_buffer(tuple(self.packed.shape), torch.int32).copy_(self.packed, non_blocking=True)

    def to_host(self) -> list[TokenLogprobs | None]:
        """The results. Waits for the device unless `start_copy` was called."""
        packed = self.packed.cpu().numpy()
        width = packed.shape[1] // 2
        ids, logprobs, ranks = packed[:, :width], packed[:, width:-1].view(np.float32), packed[:, -1].tolist()
        result: list[TokenLogprobs | None] = [None] * self.size
        for i, (at, count, rank) in enumerate(zip(self.index, self.counts, ranks, strict=True)):
            result[at] = TokenLogprobs(ids[i, : count + 1].tolist(), logprobs[i, : count + 1].tolist(), rank)
        return result
