"""The simulated accelerator with a part replaced. Importing this brings the accelerator into torch, for good."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from engine_npu import NpuPlatform  # type: ignore[import-not-found]

from engine_mutation.catalogue import Late
from engine_sdk import AttentionSpec, Device

_DELAY = 200
"""Microseconds that a launch takes longer, so that what should have waited for it shows on a busy host too."""


class LatePlatform(NpuPlatform):  # type: ignore[misc]
    """`engine_npu`'s platform with what its part changes."""

    _part: ClassVar[type[Late]]

    def __init__(self, device_index: int = 0) -> None:
        super().__init__(device_index)
        torch.ops.npu_sim.delay(_DELAY)

    @functools.cached_property
    def _device(self) -> Device:
        return self._part._device_class("npu", self.device_index)

    def attention(self, spec: AttentionSpec) -> Any:
        return self._part._change(super().attention(spec))
