"""The catalogue: what a mutant is, how one is entered, and the platform that is made of it.

A mutant is a class that replaces one part of a platform: the attention backend, a cache layout, the communicator, the
operations, the experts, the graphs, the device, its memory; or it is the whole platform, or a patch of our own core.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from engine_mutation.host import HostPlatform
from engine_mutation.loop import LoopAttention
from engine_sdk import (
    AttentionBackend,
    AttentionSpec,
    BlockLayout,
    Capabilities,
    Communicator,
    Device,
    ExpertsMethod,
    ExpertsSpec,
    GraphRuntime,
    GroupSpec,
    MemoryManager,
    OpSet,
    Platform,
    TorchCommunicator,
    TorchDevice,
    TorchExperts,
    TorchMemory,
    UnsupportedCapability,
    require_attention,
)

FAMILY = "mutant"
"""Mutants are the platforms ``mutant:NAME``."""

_MODULES = (
    "attention_faults",
    "kernel_faults",
    "cache_faults",
    "collective_faults",
    "op_faults",
    "sampling_faults",
    "graph_faults",
    "device_faults",
    "late_faults",
    "manifest_faults",
    "core_faults",
    "variants",
)

Part = TypeVar("Part", bound=type)


class Ops:
    """Operations as static methods of the names of `OpSet`; those that a mutant does not have stay the reference's."""


_OPS = tuple(field.name for field in dataclasses.fields(OpSet))


class CoreFault:
    """A fault of ours: `patch` changes the engine's own code in this process, and the platform stays the host's."""

    @classmethod
    def patch(cls) -> None:
        """Break the engine."""


class Late:
    """A part of the simulated accelerator, whose streams really run late."""

    _device_class: ClassVar[type[TorchDevice]] = TorchDevice

    @classmethod
    def _change(cls, backend: Any) -> Any:
        """Change an attention backend."""
        return backend


@dataclass(frozen=True)
class Mutant:
    """One entry.

    Attributes:
        name: as ``--platform mutant:NAME`` selects it.
        says: what is wrong, or how a right variant differs, in a sentence.
        part: the class that takes a part's place.
        tier: where it is to be seen; ``""`` for right variants.
        killer: the case that must fail, ``file.py::test`` with its parameters but the platform's; of our own core a
            path below ``tests`` may stand there.
        modules: right variants only, the modules of the suite that the difference can show in.
        declares: what the platform declares other than the host's.
    """

    name: str
    says: str
    part: type
    tier: str = ""
    killer: str = ""
    modules: tuple[str, ...] = ()
    declares: tuple[tuple[str, Any], ...] = ()

    @property
    def faulty(self) -> bool:
        """Whether the suite must fail it."""
        return bool(self.tier)


_entries: dict[str, Mutant] = {}


def fault(tier: str, killer: str, **declares: Any) -> Callable[[Part], Part]:
    """Enter a class as a faulty platform; its docstring says what is wrong."""
    return lambda part: _enter(part, tier=tier, killer=killer, declares=tuple(declares.items()))


def variant(*modules: str, **declares: Any) -> Callable[[Part], Part]:
    """Enter a class as a right platform that differs; `modules` of the suite are those that it must pass."""
    return lambda part: _enter(part, modules=modules, declares=tuple(declares.items()))


def _enter(part: Part, **entry: Any) -> Part:
    name = re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[a-z])(?<!Bf)(?<!Fp)(?<!Tf)(?=\d)|(?<=[A-Z])(?=[A-Z][a-z])", "_", part.__name__
    ).lower()
    assert name not in _entries, name
    assert part.__doc__, name
    _entries[name] = Mutant(name, " ".join(part.__doc__.split()), part, **entry)
    return part


@functools.cache
def catalogue() -> dict[str, Mutant]:
    """All mutants by name, in the order of the tiers."""
    for module in _MODULES:
        importlib.import_module(f"engine_mutation.{module}")
    return _entries


def mutant_platform(name: str) -> type[Platform]:
    """The platform ``mutant:NAME``: what the entry point of the family names."""
    mutant = catalogue()[name]
    base: Any = mutant.part if issubclass(mutant.part, Platform) else _Mutated
    if issubclass(mutant.part, Late):
        from engine_mutation.late import LatePlatform

        base = LatePlatform
    attributes: dict[str, Any] = {"name": f"{FAMILY}:{name}", "_part": mutant.part, "_declares": dict(mutant.declares)}
    return type(mutant.part.__name__, (base,), {**attributes, "__doc__": mutant.says})


class _Mutated(HostPlatform):
    """The host's platform with one part replaced."""

    _part: ClassVar[type]
    _declares: ClassVar[dict[str, Any]]

    def __init__(self, device_index: int = 0) -> None:
        super().__init__(device_index)
        if issubclass(self._part, CoreFault):
            self._part.patch()

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), **self._declares)

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        declared = self.capabilities()
        require_attention(declared, spec)
        backend: Any = self._part
        if issubclass(self._part, BlockLayout):
            backend = type("", (LoopAttention,), {"_layout": self._part})
        elif issubclass(self._part, GraphRuntime):
            backend = getattr(self._part, "_attention", LoopAttention)
        elif not issubclass(self._part, LoopAttention):
            return super().attention(spec)
        if not (verdict := backend.supports(spec)):
            raise UnsupportedCapability("attention", spec, verdict.reason)
        made: AttentionBackend = backend(spec, declared)
        return made

    def ops(self) -> OpSet:
        if not issubclass(self._part, Ops):
            return super().ops()
        return dataclasses.replace(super().ops(), **{n: getattr(self._part, n) for n in _OPS if hasattr(self._part, n)})

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        made = super().experts(spec)
        return self._part(spec) if issubclass(self._part, TorchExperts) else made

    def communicator(self, group: GroupSpec) -> Communicator:
        if not issubclass(self._part, TorchCommunicator) or not self.capabilities().collectives:
            return super().communicator(group)
        return self._part(group, self.device().torch_device)

    def graphs(self) -> GraphRuntime | None:
        return self._part() if issubclass(self._part, GraphRuntime) else super().graphs()

    @functools.cached_property
    def _device(self) -> Device:
        return self._part("cpu") if issubclass(self._part, TorchDevice) else TorchDevice("cpu")

    @functools.cached_property
    def _memory(self) -> MemoryManager:
        return self._part(self.device()) if issubclass(self._part, TorchMemory) else TorchMemory(self.device())
