"""The host's processor as a platform: runs wherever torch does, and is chosen when there is no accelerator."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine_cpu import linear, native, threads
from engine_cpu.attention import CpuAttention
from engine_cpu.memory import HostMemory
from engine_cpu.operations import Operations
from engine_cpu.quantised import CpuQuantized
from engine_sdk import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    ConfigPatch,
    LinearMethod,
    MemoryManager,
    OpSet,
    Probe,
    QuantScheme,
    TorchPlatform,
    require_attention,
)

_FLOATS8 = frozenset((torch.float8_e4m3fn, torch.float8_e5m2))


class CpuPlatform(TorchPlatform):
    """The host. Every step is done when it returns, and memory is shared with everything else that runs there."""

    name = "cpu"
    device_type = "cpu"
    contract = "1.0"

    def __init__(self, device_index: int = 0) -> None:
        super().__init__(device_index)
        threads.choose()

    @classmethod
    def probe(cls) -> Probe:
        """Always available, and never before an accelerator."""
        found = super().probe()
        return dataclasses.replace(found, devices=tuple(dataclasses.replace(d, name=_name()) for d in found.devices))

    def capabilities(self) -> Capabilities:
        """Everything, and caches of 8-bit floats, which torch converts on a host."""
        declared = super().capabilities()
        return dataclasses.replace(declared, kv_dtypes=declared.kv_dtypes | _FLOATS8)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """A `CpuAttention`; a `TorchAttention` for caches of 8 bits, and where it cannot be built, with a warning."""
        declared = self.capabilities()
        require_attention(declared, spec)
        if not CpuAttention.supports(spec) or (kernels := native.library()) is None:
            return super().attention(spec)
        return CpuAttention(spec, kernels, declared)

    def ops(self) -> OpSet:
        """Norm, gated activation, rotary embedding and greedy sampling as kernels, where they are built."""
        if (kernels := native.library()) is None:
            return super().ops()
        mine = Operations(kernels)
        return dataclasses.replace(
            super().ops(),
            rms_norm=mine.rms_norm,
            add_rms_norm=mine.add_rms_norm,
            silu_and_mul=mine.silu_and_mul,
            rotary=mine.rotary,
            draw=mine.draw,
        )

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        """A `PackedLinear`, where kernels are built or this torch has oneDNN; a `CpuQuantized`, where they are."""
        kernels = native.library()
        if scheme is None and (kernels is not None or linear.available()):
            return linear.PackedLinear(self._host_memory, kernels)
        method = super().linear(scheme)
        if scheme is None or kernels is None:
            return method
        return CpuQuantized(scheme, self._host_memory, kernels)

    def memory(self) -> MemoryManager:
        """A `HostMemory`."""
        return self._host_memory

    @functools.cached_property
    def _host_memory(self) -> HostMemory:
        return HostMemory(self.device())

    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """Sizes for a host.

        Small steps keep the wait for the next token short: a few hundred tokens already keep the matrix products busy.
        """
        return ConfigPatch(
            defaults={
                **super().configure(options).defaults,
                "block_size": 32,
                "max_num_batched_tokens": 1024,
                "max_num_seqs": 64,
                "async_scheduling": False,
            }
        )


def _name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
