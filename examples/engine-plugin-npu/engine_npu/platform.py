"""The platform: what of the defaults in plain torch this chip replaces."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import npu_sim
import torch
from npu_sim import driver

from engine_npu import collectives
from engine_npu.attention import BLOCK_SIZE, LANES, NpuAttention
from engine_npu.ops import rms_norm
from engine_sdk import (
    COLLECTIVES,
    QUANT_SCHEMES,
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    ConfigPatch,
    DeviceInfo,
    Domain,
    OpSet,
    Probe,
    TorchPlatform,
    require_attention,
)


class NpuPlatform(TorchPlatform):
    """One NPU. Graphs, memory, streams and experts are the defaults, which reach it through `torch.accelerator`."""

    name = "npu"
    device_type = "npu"
    contract = "1.0"

    _collectives_backend = collectives.NAME

    def __init__(self, device_index: int = 0) -> None:
        super().__init__(device_index)
        npu_sim.load()
        collectives.register()

    @classmethod
    def probe(cls) -> Probe:
        """Ask the driver, which needs no device."""
        if not (count := driver.device_count()):
            return Probe(False, "the driver sees no NPU; check that NPU_SIM_DEVICES is not 0")
        if driver.compiler() is None:
            return Probe(
                False, "the device's code is compiled on first use, and there is no g++; install it, or set CXX"
            )
        name = f"NPU-{driver.generation()}"
        return Probe(True, devices=tuple(DeviceInfo(i, name, driver.total_memory()) for i in range(count)))

    def capabilities(self) -> Capabilities:
        """What the chip's generation has."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        dtypes = frozenset((torch.float32, torch.float16, *((torch.bfloat16,) if driver.generation() >= 2 else ())))
        return Capabilities(
            dtypes=dtypes,
            kv_dtypes=dtypes,
            head_dims=Domain.multiples(LANES, high=256),
            block_sizes=Domain.of(BLOCK_SIZE),
            attention=NpuAttention.features,
            quant_schemes=frozenset(QUANT_SCHEMES),
            collectives=COLLECTIVES,
            graphs="uniform",
            nan_safe=True,
            asynchronous=True,
        )

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """An `NpuAttention`."""
        require_attention(self.capabilities(), spec)
        return NpuAttention(spec, self.capabilities())

    def ops(self) -> OpSet:
        """A fused norm; the rest is the reference."""
        return dataclasses.replace(super().ops(), rms_norm=rms_norm)

    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """Blocks as large as the chip's tiles, and no bfloat16 where there is none."""
        refusals = {}
        if options["dtype"] == "bfloat16" and torch.bfloat16 not in self.capabilities().dtypes:
            refusals["dtype"] = f"NPU-{driver.generation()} has no bfloat16; use float16"
        return ConfigPatch(defaults={"block_size": BLOCK_SIZE}, refusals=refusals)
