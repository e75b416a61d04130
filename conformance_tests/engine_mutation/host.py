"""The platform that faults are put into: the SDK's plain torch on the host, whose parts can be replaced one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from engine_sdk import Capabilities, ConfigPatch, TorchPlatform


class HostPlatform(TorchPlatform):
    """Nothing of it is a kernel of ours, so a fault in one part is not hidden by another's."""

    name = "host"
    device_type = "cpu"
    contract = "1.0"

    def capabilities(self) -> Capabilities:
        """Everything, and caches of 8-bit floats, as the platform of the host has them."""
        declared = super().capabilities()
        floats8 = {torch.float8_e4m3fn, torch.float8_e5m2}
        return dataclasses.replace(declared, kv_dtypes=declared.kv_dtypes | floats8)

    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """Sizes as the platform of the host has them."""
        sizes = {"block_size": 32, "max_num_batched_tokens": 1024, "max_num_seqs": 64, "async_scheduling": False}
        return ConfigPatch(defaults={**super().configure(options).defaults, **sizes})
