"""The platform: about a dozen factory methods, each answering with typed data or an object of an ABC."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engine.interfaces.attention import AttentionBackend, AttentionSpec
from engine.interfaces.capabilities import Capabilities
from engine.interfaces.communicator import Communicator, GroupSpec
from engine.interfaces.device import Device, MemoryManager
from engine.interfaces.graph import CompilerOptions, GraphRuntime
from engine.interfaces.ops import ExpertsMethod, ExpertsSpec, LinearMethod, OpSet, QuantScheme

CONTRACT = "1.0"
"""The contract's version. Minors add; a plugin written for this major's current or previous minor, or older, loads."""


@dataclass(frozen=True)
class DeviceInfo:
    """One device as `probe()` sees it."""

    index: int
    name: str
    memory: int | None = None


@dataclass(frozen=True)
class Probe:
    """Whether a platform can run here.

    Attributes:
        available: it can.
        reason: why not, with the remedy; empty when available.
        devices: what was found.
        accelerator: False for a platform that is only used when there is no accelerator.
    """

    available: bool
    reason: str = ""
    devices: tuple[DeviceInfo, ...] = ()
    accelerator: bool = True


@dataclass(frozen=True)
class ConfigPatch:
    """Defaults that a platform prefers, for options that the user left open, and refusals of options that were set.

    Attributes:
        defaults: option name to value; ignored where the user chose.
        refusals: option name to the reason why its value cannot work here.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)


class Platform(ABC):
    """A kind of hardware. One instance is made per process, after `probe()` said yes.

    A plugin subclasses `engine_sdk.TorchPlatform`, which answers everything in plain torch, and replaces what it does
    better. Overriding a method that is not here is an error at load; helpers of a plugin start with an underscore.

    Attributes:
        name: what ``--platform`` selects; equals the entry point's name.
        device_type: torch's device type.
        contract: the contract version that the plugin was written for.
        cluster_resource: what a cluster's scheduler (Ray) counts its devices as; by default `device_type` in capitals.
    """

    name: ClassVar[str]
    device_type: ClassVar[str]
    contract: ClassVar[str]
    cluster_resource: ClassVar[str] = ""

    def __init__(self, device_index: int = 0) -> None:
        self.device_index = device_index

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Whether the platform can run here. Must not initialise a device, and must not raise."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this platform, on this device, can do."""

    @abstractmethod
    def device(self) -> Device:
        """The device with the instance's index; the same object each time."""

    @abstractmethod
    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """The backend for one kind of attention layer; raises `UnsupportedCapability` outside the capabilities."""

    @abstractmethod
    def ops(self) -> OpSet:
        """Token-wise operations."""

    @abstractmethod
    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        """How linear layers run under `scheme`; None leaves unquantised ones to `torch.nn.functional.linear`."""

    @abstractmethod
    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        """How a layer of experts runs."""

    @abstractmethod
    def communicator(self, group: GroupSpec) -> Communicator:
        """Collectives over `group`; called in the same order on every rank."""

    @abstractmethod
    def graphs(self) -> GraphRuntime | None:
        """Capture and replay, where the platform has them."""

    @abstractmethod
    def compiler(self) -> CompilerOptions | None:
        """How to compile a decoder layer; None runs it eagerly."""

    @abstractmethod
    def memory(self) -> MemoryManager:
        """The device's memory; the same object each time."""

    @abstractmethod
    def configure(self, options: Mapping[str, Any]) -> ConfigPatch:
        """Look at the user's options (None: left open) and answer with defaults and refusals. Pure; logged."""
