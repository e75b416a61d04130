"""What a platform can do, as data: read by the engine before it builds anything, and by the conformance suite."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch


@dataclass(frozen=True)
class Verdict:
    """Yes, or no with the reason. Truthy when ok."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @classmethod
    def no(cls, reason: str) -> Verdict:
        """A refusal; `reason` is a full sentence that a user can act on."""
        return cls(False, reason)


OK = Verdict(True)


@dataclass(frozen=True)
class Domain:
    """A set of allowed integers: listed values, or all multiples of `step` in ``[low, high]``.

    ``Domain.of(64, 128)``, ``Domain.multiples(16, high=512)``; `ANY` is every positive integer.
    """

    values: frozenset[int] | None = None
    step: int = 1
    low: int = 1
    high: int | None = None

    @classmethod
    def of(cls, *values: int) -> Domain:
        """Exactly these values."""
        return cls(values=frozenset(values))

    @classmethod
    def multiples(cls, step: int, *, high: int | None = None) -> Domain:
        """Every positive multiple of `step`, up to `high` (inclusive) if given."""
        return cls(step=step, low=step, high=high)

    def __contains__(self, value: int) -> bool:
        if self.values is not None:
            return value in self.values
        return value >= self.low and value % self.step == 0 and (self.high is None or value <= self.high)

    def outside(self) -> int | None:
        """A value just outside the domain, for tests of refusal; None if the domain has no outside."""
        if self.values is not None:
            return next(v for v in range(1, max(self.values) + 2) if v not in self.values)
        beyond = None if self.high is None else self.high + 1
        return self.low + 1 if self.step > 1 else beyond

    def __str__(self) -> str:
        if self.values is not None:
            return "{" + ", ".join(map(str, sorted(self.values))) + "}"
        bound = "" if self.high is None else f" up to {self.high}"
        return ("any" if self.step == 1 else f"multiples of {self.step}") + bound


ANY = Domain()

AttentionFeature = Literal[
    "sliding_window", "chunked", "softcap", "sinks", "alibi", "v_head_dim", "lse",
    "bidirectional", "two_sided_window", "relative_bias",
]  # fmt: skip
"""What an attention layer may ask for beyond causal grouped-query attention."""

ATTENTION_FEATURES: frozenset[AttentionFeature] = frozenset(get_args(AttentionFeature))


@dataclass(frozen=True)
class Capabilities:
    """What a platform declares. Undeclared means refused: the platform raises `UnsupportedCapability` when asked.

    Attributes:
        dtypes: dtypes of weights and activations.
        kv_dtypes: dtypes that the KV cache may store. Keys and values are rounded to it; 8-bit floats saturate.
        head_dims: head sizes that attention takes, of queries and keys, and of values as large as these.
        v_head_dims: head sizes of other values, each with every one of `head_dims`, where `v_head_dim` is declared.
        block_sizes: tokens a KV block may hold.
        attention: optional attention features.
        quant_schemes: names of the weight quantisation schemes that `linear()` takes.
        collectives: names of the collectives that the communicator offers; empty without a communicator.
        graphs: ``"none"``, ``"uniform"`` (decode batches only) or ``"full"`` (any batch).
        numerics: ``"A"``, scores kept in fp32; ``"B"``, scores rounded to the activation dtype.
        nan_safe: masked positions may hold NaN and still contribute nothing.
        deterministic: the same call gives the same bits.
        batch_invariant: a request's bits do not depend on what else is in the batch.
        asynchronous: operations return before the device has done them, so overlapping host work pays.
    """

    dtypes: frozenset[torch.dtype] = frozenset((torch.float32, torch.bfloat16, torch.float16))
    kv_dtypes: frozenset[torch.dtype] = frozenset((torch.float32, torch.bfloat16, torch.float16))
    head_dims: Domain = ANY
    v_head_dims: Domain = ANY
    block_sizes: Domain = ANY
    attention: frozenset[AttentionFeature] = frozenset()
    quant_schemes: frozenset[str] = frozenset()
    collectives: frozenset[str] = frozenset()
    graphs: Literal["none", "uniform", "full"] = "none"
    numerics: Literal["A", "B"] = "A"
    nan_safe: bool = False
    deterministic: bool = True
    batch_invariant: bool = False
    asynchronous: bool = False

    def to_dict(self) -> dict[str, object]:
        """The same as JSON-ready values, for `engine platforms --json` and the conformance report."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(value: object) -> object:
    if isinstance(value, frozenset):
        return sorted(str(each).removeprefix("torch.") for each in value)
    return str(value) if isinstance(value, Domain) else value
