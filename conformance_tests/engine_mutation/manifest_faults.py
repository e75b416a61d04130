"""Platforms that declare what they do not do, do what they do not declare, or refuse in a way that nobody can use."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine_mutation.catalogue import fault
from engine_mutation.host import HostPlatform
from engine_mutation.loop import LoopAttention
from engine_sdk import (
    ATTENTION_FEATURES,
    AttentionBackend,
    AttentionBatch,
    AttentionFeature,
    AttentionSpec,
    Capabilities,
    Domain,
    KVLayout,
    TokenMajor,
    TorchAttention,
    UnsupportedCapability,
)

_DECLARES = "test_device.py::test_declares_what_it_must"
_REFUSES = "test_attention.py::test_refuses_what_is_not_declared"
_AGREES = "test_attention.py::test_agrees_with_reference"
_CAUSAL = f"{_AGREES}[causal]"
_NONE: frozenset[AttentionFeature] = frozenset()


class _Nothing(AttentionBackend):
    """Attends to nothing: every call returns at once."""

    features = ATTENTION_FEATURES

    def layout(self, block_size: int) -> KVLayout:
        return TokenMajor(
            block_size, self.spec.num_kv_heads, self.spec.head_dim, self.spec.v_head_dim, self.spec.kv_dtype
        )

    def plan(self, batch: AttentionBatch) -> None:
        return None

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        return None


class _Declaring(HostPlatform):
    """Declares something else than the host does, and stays the host in everything else."""

    _declares: ClassVar[Mapping[str, Any]]

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), **self._declares)


@fault("L2", _CAUSAL, attention=_NONE, collectives=frozenset(), nan_safe=False, deterministic=False)
class Null(_Declaring):
    """Declares nothing, and does nothing."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return _Nothing(spec)


@fault(
    "L2",
    f"{_AGREES}[sliding_window]",
    attention=ATTENTION_FEATURES,
    kv_dtypes=frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)),
    graphs="full",
    batch_invariant=True,
    nan_safe=True,
)
class Liar(_Declaring):
    """Declares everything that there is, whether or not it can do it."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        plain = dataclasses.replace(spec, window=None, chunk=None, softcap=None, alibi=False, sinks=False)
        return TorchAttention(plain, declared=self.capabilities())


@fault("L2", _CAUSAL)
class RejectsEverything(HostPlatform):
    """Declares as much as the host, and refuses every layer."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        raise UnsupportedCapability("attention", spec, "not today")


@fault("L0", _DECLARES, dtypes=frozenset({torch.bfloat16}), kv_dtypes=frozenset({torch.bfloat16}))
class NoFp32(_Declaring):
    """fp32 is not declared."""


@fault("L0", _DECLARES, dtypes=frozenset({torch.float32}))
class NoSixteenBits(_Declaring):
    """No dtype of 16 bits is declared."""


@fault("L0", _DECLARES, head_dims=Domain.of())
class NoHeadSize(_Declaring):
    """The domain of head sizes is empty."""


@fault("L0", _DECLARES, graphs=object())
class NotData(_Declaring):
    """A capability is an object that no report can hold."""


@fault("L0", "test_device.py::test_declares_the_same")
class ChangesItsMind(HostPlatform):
    """What is declared differs from call to call."""

    _calls = itertools.count()

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), batch_invariant=bool(next(self._calls) % 2))


# Doing what was not declared.


class _Partial(_Declaring):
    """Declares little, and takes everything."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return TorchAttention(spec)


@fault("L2", f"{_AGREES}[softcap]", attention=ATTENTION_FEATURES - {"softcap"})
class UndeclaredSoftcapIgnored(_Declaring):
    """A softcap is not declared, and a layer that has one is computed without it."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return super().attention(dataclasses.replace(spec, softcap=None))


@fault("L2", f"{_AGREES}[sinks]", attention=ATTENTION_FEATURES - {"sinks"})
class UndeclaredSinksComputed(_Partial):
    """Sinks are not declared, and a layer that has them is computed all the same: by what nobody has checked."""


@fault("L2", f"{_AGREES}[lse]", attention=ATTENTION_FEATURES - {"lse"})
class UndeclaredLseComputed(_Partial):
    """The log-sum-exp is not declared, and is returned."""


@fault("L2", _REFUSES, head_dims=Domain.of(64, 128))
class UndeclaredHeadSizeTaken(_Partial):
    """A head size outside the domain is computed."""


@fault("L2", _REFUSES, block_sizes=Domain.of(16, 32))
class UndeclaredBlockSizeTaken(_Partial):
    """A block size outside the domain is laid out."""


@fault("L2", _REFUSES, head_dims=Domain.multiples(16, high=256))
class UndeclaredHeadSizeRoundedUp(_Declaring):
    """The upper end of the head sizes is checked, and not that they are multiples of 16."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        if spec.head_dim > 256:
            raise UnsupportedCapability("head_dims", spec.head_dim)
        return TorchAttention(spec)


@fault("L2", "test_attention.py::test_refuses_on_every_side", head_dims=Domain.multiples(16, high=256))
class UndeclaredLargeHeadTaken(_Declaring):
    """Head sizes are checked to be multiples of 16, and not against their upper end."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        if spec.head_dim % 16:
            raise UnsupportedCapability("head_dims", spec.head_dim)
        return TorchAttention(spec)


@fault("L2", _REFUSES)
class UndeclaredCacheDtypeTaken(_Declaring):
    """A cache of a dtype that is not declared is accepted, and kept in the activations" dtype."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        if spec.kv_dtype not in self.capabilities().kv_dtypes:
            spec = dataclasses.replace(spec, kv_dtype=spec.dtype)
        return super().attention(spec)


# Refusing badly.


@fault("L2", _REFUSES, head_dims=Domain.of(64, 128))
class RefusesWithAnyError(_Declaring):
    """A refusal is a `ValueError`, from which nobody can tell what was missing."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        try:
            return super().attention(spec)
        except UnsupportedCapability as error:
            raise ValueError(str(error)) from error


@fault("L2", f"{_AGREES}[softcap]", attention=ATTENTION_FEATURES - {"softcap"})
class BrokenAfterARefusal(_Declaring):
    """Once it has refused a layer, it refuses every other."""

    _refused = False

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        try:
            if self._refused:
                raise UnsupportedCapability("softcap", spec.softcap)
            return super().attention(spec)
        except UnsupportedCapability:
            self._refused = True
            raise


class _Late(LoopAttention):
    """Refuses a softcap when it is called, after it has written the cache."""

    def _cap(self, scores: Tensor) -> Tensor:
        if self.spec.softcap is not None:
            raise UnsupportedCapability("softcap", self.spec.softcap)
        return scores


@fault("L2", f"{_AGREES}[softcap]", attention=ATTENTION_FEATURES - {"softcap"})
class RefusesAfterTheWrite(_Declaring):
    """A layer that is not supported is built, and refused in the middle of its first step."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return _Late(spec, self.capabilities())


@fault("L2", f"{_AGREES}[softcap]", attention=ATTENTION_FEATURES - {"softcap"})
class RefusalNamesNothing(_Declaring):
    """A refusal has the right type, and names something else than what was asked for."""

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        try:
            return super().attention(spec)
        except UnsupportedCapability as error:
            raise UnsupportedCapability("dtypes", spec.dtype) from error


@fault("L4", "test_communicator.py::test_collectives[all_reduce]", collectives=frozenset())
class CollectivesNotThere(_Declaring):
    """No collectives are declared, and a communicator is made all the same."""

    def communicator(self, group: Any) -> Any:
        return None


# What the contract forbids a plugin.


@fault("L0", "test_plugin_rules.py::test_patches_nothing")
class PatchesTheEngine(HostPlatform):
    """The platform replaces a function of the engine"s when it is made."""

    def __init__(self, device_index: int = 0) -> None:
        super().__init__(device_index)
        import engine.scheduler

        kept = engine.scheduler.Scheduler.schedule
        engine.scheduler.Scheduler.schedule = lambda self: kept(self)  # type: ignore[method-assign]
