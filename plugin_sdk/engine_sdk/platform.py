"""A platform in plain torch, which a vendor's platform starts from."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from engine.errors import UnsupportedCapability
from engine.interfaces import (
    AttentionBackend,
    AttentionFeature,
    AttentionSpec,
    Capabilities,
    Communicator,
    CompilerOptions,
    ConfigPatch,
    Device,
    DeviceInfo,
    ExpertsMethod,
    ExpertsSpec,
    GraphRuntime,
    GroupSpec,
    LinearMethod,
    MemoryManager,
    OpSet,
    Platform,
    Probe,
    QuantScheme,
)
from engine_sdk.attention import TorchAttention
from engine_sdk.communicator import COLLECTIVES, TorchCommunicator
from engine_sdk.deprecation import warn_of_overrides
from engine_sdk.device import TorchDevice
from engine_sdk.experts import TorchExperts
from engine_sdk.graphs import TorchGraphs
from engine_sdk.memory import TorchMemory, host_memory
from engine_sdk.ops import REFERENCE_OPS
from engine_sdk.quantization import QUANT_SCHEMES, TorchQuantized, require_scheme


class TorchPlatform(Platform):
    """Every answer in plain torch: a subclass with `name`, `device_type` and `contract` runs the engine.

        class NpuPlatform(TorchPlatform):
            name = "npu"
            device_type = "npu"
            contract = "1.0"

    It works on any device that torch drives through `torch.accelerator`, and on the host (``"cpu"``). The package that
    registers the device with torch must be imported by the plugin's module.
    """

    _collectives_backend: ClassVar[str | None] = None
    """torch.distributed's name of what carries the collectives; None takes torch's default for the device."""

    _collectives_capturable: ClassVar[bool] = False
    """Whether that may be recorded in a graph; case `captured` of the suite tests it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        warn_of_overrides(cls)

    @classmethod
    def probe(cls) -> Probe:
        """Ask torch's module for the device; a host is always available and no accelerator."""
        if cls.device_type == "cpu":
            return Probe(True, devices=(DeviceInfo(0, "host", host_memory().total),), accelerator=False)
        try:
            module = torch.get_device_module(cls.device_type)
            count = module.device_count() if module.is_available() else 0
        except Exception as error:  # whatever a vendor's module may raise: a probe must not
            return Probe(False, f"torch cannot reach {cls.device_type!r} devices: {error}; install its torch extension")
        if not count:
            return Probe(False, f"torch sees no {cls.device_type!r} device; check the driver and what is made visible")
        return Probe(True, devices=tuple(DeviceInfo(i, f"{cls.device_type}:{i}") for i in range(count)))

    def capabilities(self) -> Capabilities:
        """What the defaults can do, which is everything but captured attention."""
        return Capabilities(
            attention=TorchAttention.features,
            quant_schemes=frozenset(QUANT_SCHEMES),
            collectives=COLLECTIVES if dist.is_available() else frozenset(),
            nan_safe=True,
            asynchronous=self.device_type != "cpu",
        )

    def device(self) -> Device:
        """A `TorchDevice`."""
        return self._device

    @functools.cached_property
    def _device(self) -> Device:
        return TorchDevice(self.device_type, self.device_index)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """A `TorchAttention`, for what the capabilities declare."""
        declared = self.capabilities()
        require_attention(declared, spec)
        if not (verdict := TorchAttention.supports(spec)):
            raise UnsupportedCapability("attention", spec, verdict.reason)
        return TorchAttention(spec, declared=declared)

    def ops(self) -> OpSet:
        """The references."""
        return REFERENCE_OPS

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        """Unquantised layers stay torch's; a `TorchQuantized` for schemes that are declared."""
        if scheme is None:
            return None
        declared = self.capabilities().quant_schemes
        if scheme.name not in declared & set(QUANT_SCHEMES):
            raise UnsupportedCapability("quant_schemes", scheme.name, f"{self.name} declares {sorted(declared)}")
        require_scheme(scheme)
        return TorchQuantized(scheme)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        """A `TorchExperts`."""
        if spec.dtype not in self.capabilities().dtypes:
            raise UnsupportedCapability("dtypes", spec.dtype)
        return TorchExperts(spec)

    def communicator(self, group: GroupSpec) -> Communicator:
        """A `TorchCommunicator`."""
        if not self.capabilities().collectives:
            raise UnsupportedCapability("collectives", group.role, f"{self.name} runs on one device")
        device, capturable = self.device().torch_device, self._collectives_capturable
        return TorchCommunicator(group, device, self._collectives_backend, capturable=capturable)

    def graphs(self) -> GraphRuntime | None:
        """Torch's own, where this torch has them for the device."""
        if self.device_type == "cpu" or not TorchGraphs.available():
            return None
        return TorchGraphs(self.device())

    def compiler(self) -> CompilerOptions | None:
        """None: run eagerly, since a device has no compiler unless its platform says so."""
        return None

    def memory(self) -> MemoryManager:
        """A `TorchMemory`."""
        return self._memory

    @functools.cached_property
    def _memory(self) -> MemoryManager:
        return TorchMemory(self.device())

    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """A KV cache that leaves a host its memory: a quarter of what is free, at most 4 GiB. Else the engine's own.

        Ranks on one host share the quarter: whoever starts them says in ``LOCAL_WORLD_SIZE`` how many there are.
        """
        if self.device_type != "cpu":
            return ConfigPatch()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return ConfigPatch(defaults={"kv_cache_memory_bytes": min(host_memory().free // (4 * ranks), 4 << 30)})


def require_attention(declared: Capabilities, spec: AttentionSpec) -> None:
    """Raise `UnsupportedCapability` unless `spec` lies within `declared`; the reason says what would do instead."""
    for field, dtype, dtypes, option in (
        ("dtypes", spec.dtype, declared.dtypes, "--dtype"),
        ("kv_dtypes", spec.kv_dtype, declared.kv_dtypes, "--kv-cache-dtype"),
    ):
        if dtype not in dtypes:
            names = sorted(map(_choice, dtypes))
            raise UnsupportedCapability(field, dtype, f"use {' or '.join(f'{option} {name}' for name in names)}")
    if spec.head_dim not in declared.head_dims:
        raise UnsupportedCapability("head_dims", spec.head_dim, f"declared: {declared.head_dims}")
    asked: dict[AttentionFeature, object] = {
        "sliding_window": spec.window,
        "chunked": spec.chunk,
        "softcap": spec.softcap,
        "v_head_dim": spec.v_head_dim,
    }
    for feature in sorted(spec.features() - declared.attention):
        raise UnsupportedCapability(feature, asked.get(feature, True), f"declared: {sorted(declared.attention)}")
    if spec.v_head_dim != spec.head_dim and spec.v_head_dim not in declared.v_head_dims:
        raise UnsupportedCapability("v_head_dims", spec.v_head_dim, f"declared: {declared.v_head_dims}")


def _choice(dtype: torch.dtype) -> str:
    """What the options call a dtype: ``"fp8_e4m3"`` and ``"fp8_e5m2"`` for 8-bit floats, of whichever flavour."""
    return re.sub(r"^float8_(e\dm\d).*", r"fp8_\1", str(dtype).removeprefix("torch."))
