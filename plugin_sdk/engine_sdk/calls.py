"""Calls of a platform's parts as data: what went in, on the host; how to run it again; and whether a result is right.

The bounds are coarse, a few roundings, so that what they find is an error; the conformance suite has the sharp ones.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError, UnsupportedCapability
from engine.interfaces import (
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    DrawInputs,
    ExpertsSpec,
    ExpertWeights,
    Platform,
)
from engine_sdk.attention import TorchAttention
from engine_sdk.experts import TorchExperts
from engine_sdk.layout import PagedCache
from engine_sdk.ops import REFERENCE_OPS

_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_FLOAT = 2.0**-18  # what fp32 arithmetic may lose, relative to the sum of absolute terms

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu, gated": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "gelu, gated": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "gelu_tanh, gated": lambda x: F.gelu(x.chunk(2, -1)[0], approximate="tanh") * x.chunk(2, -1)[1],
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
}
"""What experts may do between their two products, as far as a file can name it: [S, I or 2I] to [S, I]."""


class Call(ABC):
    """One call. Its fields are host tensors and plain data."""

    kind: ClassVar[str]

    @abstractmethod
    def run(self, platform: Platform) -> tuple[Tensor, ...]:
        """Call a platform's part with these inputs; the results, on the host. A specification may be refused."""

    @abstractmethod
    def judge(self, got: tuple[Tensor, ...], declared: Capabilities) -> str | None:
        """What is wrong with results, as the reference on the host sees it; None when nothing is."""

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain data, which `torch.load` reads without running code."""
        return {"kind": self.kind} | {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Call:
        """The inverse of `to_dict`, for every kind; raises `ConfigError` for one that is not known here."""
        for kind in (AttentionCall, OpCall, LinearCall, ExpertsCall):
            if data.get("kind") == kind.kind:
                return kind(**{f.name: _typed(data[f.name]) for f in dataclasses.fields(kind)})
        raise ConfigError(f"a recorded call of kind {data.get('kind')!r} is not known\nremedy: upgrade the engine")


@dataclass(frozen=True)
class AttentionCall(Call):
    """`AttentionBackend.forward`, with the blocks of the cache that it may touch, as they were before.

    blocks int64 [n] have keys [n, B, K, D] and values [n, B, K, E]. Results are out, the log-sum-exp where it was asked
    for, and then keys and values of these blocks afterwards.
    """

    kind: ClassVar[str] = "attention"

    spec: AttentionSpec
    batch: AttentionBatch
    q: Tensor
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    lse: bool
    blocks: Tensor
    keys: Tensor
    values: Tensor

    def run(self, platform: Platform) -> tuple[Tensor, ...]:
        """See `Call.run`. The cache has as many blocks as the largest id asks for."""
        device = platform.device().torch_device
        backend = platform.attention(self.spec)
        layout = backend.layout(self.batch.block_size)
        num_blocks = int(self.blocks.max()) + 1
        padded = -(-layout.block_bytes // 256) * 256
        cache = layout.bind(torch.zeros(num_blocks * padded, dtype=torch.uint8, device=device), num_blocks)
        blocks, keys, values = to((self.blocks, self.keys, self.values), device)
        layout.import_blocks(cache, blocks, keys, values)
        q, k, v, sinks, slopes = to((self.q, self.k, self.v, self.sinks, self.alibi_slopes), device)
        out = q.new_zeros(*self.q.shape[:2], self.spec.v_head_dim)
        lse = torch.zeros(out.shape[:2], dtype=torch.float32, device=device) if self.lse else None
        host = {name: getattr(self.batch, name) for name in ("query_start_host", "seq_lens_host")}
        plan = backend.plan(replace(to(self.batch, device), **host))
        backend.forward(q, k, v, cache, plan, out, sinks=sinks, alibi_slopes=slopes, lse=lse)
        after = layout.export_blocks(cache, blocks)
        return results((out, *(() if lse is None else (lse,)), *after))

    def judge(self, got: tuple[Tensor, ...], declared: Capabilities) -> str | None:
        """See `Call.judge`: the cache must have the new tokens and be as before elsewhere, and rows be near enough."""
        out, *logsum, keys, values = got
        expected_keys, expected_values = self._after()
        real = self.blocks != 0  # what block 0 holds is nobody's
        for name, stored, expected in (("keys", keys, expected_keys), ("values", values, expected_values)):
            if wrong := _differing_blocks(stored[real], expected[real]):
                return f"{name} in the cache are not those that were written, or others changed: {wrong} blocks differ"
        want, weight, want_logsum = self._reference(expected_keys, expected_values)
        padding = self._padding()
        unit = _UNIT.get(self.spec.dtype, _FLOAT)
        scores = self._largest_score(expected_keys)
        bound = 2 * (unit * (want.abs() + weight) + (_FLOAT + 2.0**-22 * scores) * weight)
        if declared.numerics == "B":
            bound += 2 * unit * scores * weight
        if found := compare("out", out, want, (bound + 2.0**-20).index_fill(0, padding, torch.inf)):
            return found
        if logsum:
            bound = torch.full_like(want_logsum, 2.0**-14) + want_logsum.abs() * 2.0**-18 + 2.0**-20 * scores
            if declared.numerics == "B":
                bound += 2 * unit * scores
            return compare("lse", logsum[0], want_logsum, bound.index_fill(0, padding, torch.inf))
        return None

    def _padding(self) -> Tensor:
        """Tokens that belong to no request with keys."""
        starts, lengths = self.batch.query_start_host.tolist(), self.batch.seq_lens_host.tolist()
        real = {t for a, b, n in zip(starts, starts[1:], lengths, strict=False) if n > 0 for t in range(a, b)}
        return torch.tensor([t for t in range(self.batch.num_tokens) if t not in real], dtype=torch.int64)

    def _after(self) -> tuple[Tensor, Tensor]:
        """Keys and values of `blocks` once the step's tokens are written."""
        keys, values = self.keys.clone(), self.values.clone()
        if self.k is not None and self.v is not None:
            size = self.batch.block_size
            column = {block: i for i, block in enumerate(self.blocks.tolist())}
            for token, slot in enumerate(self.batch.slots.tolist()):
                at = column[slot // size], slot % size
                keys[at], values[at] = self.k[token].to(keys.dtype), self.v[token].to(values.dtype)
        return keys, values

    def _reference(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, ``sum p |v|`` and log-sum-exp in fp32, over the cache as it is once the step is written."""
        spec = replace(self.spec, dtype=torch.float32, kv_dtype=torch.float32)
        backend = TorchAttention(spec)
        index = torch.zeros(int(max(self.blocks.max(), self.batch.block_table.max())) + 1, dtype=torch.int32)
        index[self.blocks] = torch.arange(len(self.blocks), dtype=torch.int32)
        plan = backend.plan(replace(self.batch, block_table=index[self.batch.block_table.long()]))
        extras = {"sinks": self.sinks, "alibi_slopes": self.alibi_slopes}
        shape = (*self.q.shape[:2], spec.v_head_dim)
        made = []
        for stored in (values.float(), values.float().abs()):
            out, lse = torch.zeros(shape), torch.zeros(shape[:2])
            cache = PagedCache(keys.float(), stored)
            backend.forward(self.q.float(), None, None, cache, plan, out, lse=lse, **extras)
            made.append(out)
        return made[0], made[1], lse

    def _largest_score(self, keys: Tensor) -> float:
        """A bound of ``scale * sum |q| |k|``, from which the error of rounded scores follows."""
        longest = torch.nan_to_num(keys.float()).norm(dim=-1).amax() if keys.numel() else torch.zeros(())
        return float(self.spec.scale * self.q.float().norm(dim=-1).amax() * longest)


@dataclass(frozen=True)
class OpCall(Call):
    """One of the functions of an `OpSet`, by its name. Results are what it returned, and its arguments afterwards."""

    kind: ClassVar[str] = "op"

    name: str
    arguments: tuple[Any, ...]

    def run(self, platform: Platform) -> tuple[Tensor, ...]:
        """See `Call.run`."""
        arguments = to(self.arguments, platform.device().torch_device)
        return results((getattr(platform.ops(), self.name)(*arguments), arguments))

    def judge(self, got: tuple[Tensor, ...], declared: Capabilities) -> str | None:
        """See `Call.judge`: integers must be the reference's, floats near what it gives in fp32."""
        rounded, exact = self._reference(self.arguments), self._reference(upcast(self.arguments))
        numbers = self._numbers(got)
        if len(numbers) != len(rounded):
            return f"{self.name} gives {len(numbers)} tensors with its arguments, and the reference {len(rounded)}"
        for part, near, want in zip(numbers, rounded, exact, strict=True):
            if near.is_floating_point():
                problem = compare(self.name, part, want.float(), _roundings(near, want))
            else:
                wrong = int((part != near).sum()) if part.shape == near.shape else near.numel()
                problem = f"{self.name}: {wrong} of {near.numel()} integers are not the reference's" if wrong else None
            if problem:
                return problem
        return None

    def _reference(self, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        arguments = to(arguments, torch.device("cpu"))  # some are changed
        return self._numbers(results((getattr(REFERENCE_OPS, self.name)(*arguments), arguments)))

    def _numbers(self, made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What to compare: of `logprobs` the bits as floats, and no ids that a tie leaves open."""
        if self.name != "logprobs" or made[0].dtype != torch.int32:
            return made
        width = (made[0].shape[1] - 1) // 2
        return made[0][:, width:-1].contiguous().view(torch.float32), made[0][:, [0, -1]], *made[1:]


@dataclass(frozen=True)
class LinearCall(Call):
    """`LinearMethod.apply` of an unquantised layer, with the weight and bias that `pack` was given."""

    kind: ClassVar[str] = "linear"

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def run(self, platform: Platform) -> tuple[Tensor, ...]:
        """See `Call.run`."""
        if (method := platform.linear(None)) is None:
            raise UnsupportedCapability("linear", None, f"{platform.name} leaves unquantised layers to torch")
        x, weight, bias = to((self.x, self.weight, self.bias), platform.device().torch_device)
        return results(method.apply(x, method.pack(weight, bias)))

    def judge(self, got: tuple[Tensor, ...], declared: Capabilities) -> str | None:
        """See `Call.judge`."""
        bias = None if self.bias is None else self.bias.float()
        want = F.linear(self.x.float(), self.weight.float(), bias)
        total = F.linear(self.x.float().abs(), self.weight.float().abs(), None if bias is None else bias.abs())
        unit = _UNIT.get(self.x.dtype, _FLOAT)
        # Products of fp32 may be made of shorter numbers: 2^-11 of their sum.
        return compare("linear", got[0], want, 2 * unit * want.abs() + 2.0**-11 * total + 2.0**-20)


@dataclass(frozen=True)
class ExpertsCall(Call):
    """`ExpertsMethod.apply`. `activate` is the weights' own; None from a file, where it is none of `ACTIVATIONS`."""

    kind: ClassVar[str] = "experts"

    spec: ExpertsSpec
    x: Tensor
    expert_ids: Tensor
    scores: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activate: Callable[[Tensor], Tensor] | None

    def weights(self, device: torch.device) -> ExpertWeights:
        """The layer's parameters on a device."""
        if self.activate is None:
            raise ConfigError(
                "the activation of these experts is the model's own, which a file cannot hold\n"
                "remedy: run the model again with --platform record:NAME"
            )
        up, down, up_bias, down_bias = to((self.up, self.down, self.up_bias, self.down_bias), device)
        return ExpertWeights(up, down, self.activate, up_bias, down_bias)

    def run(self, platform: Platform) -> tuple[Tensor, ...]:
        """See `Call.run`; raises `ConfigError` where the activation is not known."""
        device = platform.device().torch_device
        x, ids, scores = to((self.x, self.expert_ids, self.scores), device)
        return results(platform.experts(self.spec).apply(x, ids, scores, self.weights(device)))

    def judge(self, got: tuple[Tensor, ...], declared: Capabilities) -> str | None:
        """See `Call.judge`."""
        method = TorchExperts(replace(self.spec, dtype=torch.float32))
        weights = self.weights(torch.device("cpu"))
        rounded = TorchExperts(self.spec).apply(self.x, self.expert_ids, self.scores, weights)
        want = method.apply(self.x.float(), self.expert_ids, self.scores.float(), upcast(weights))
        return compare("experts", got[0], want, 4 * _roundings(rounded, want))


def compare(name: str, got: Tensor, want: Tensor, bound: Tensor) -> str | None:
    """The worst difference beyond `bound`, in a sentence; values that are not finite must be the reference's."""
    if got.shape != want.shape:
        return f"{name} has shape {list(got.shape)}, and {list(want.shape)} is expected"
    got, finite = got.float(), want.isfinite() & bound.isfinite()
    if (odd := want.isinf() & (got != want)).any():
        return f"{name} is {float(got[odd][0]):.6g} at {_first(odd)}, and the reference is {float(want[odd][0]):.6g}"
    if not got[finite].isfinite().all():
        return f"{name} is not finite where the reference is, at {_first(~got.isfinite() & finite)}"
    excess = torch.where(finite, (got - want).abs() - bound, -math.inf)
    if excess.numel() == 0 or float(excess.max()) <= 0:
        return None
    at = int(excess.argmax())
    return (
        f"{name} is {float(got.flatten()[at]):.6g} at {_first(excess == excess.max())}, and the reference is "
        f"{float(want.flatten()[at]):.6g} +- {float(bound.flatten()[at]):.2g}; {int((excess > 0).sum())} of "
        f"{got.numel()} values are off"
    )


def results(made: Any) -> tuple[Tensor, ...]:
    """The tensors in a value, or in tuples or dataclasses of values, on the host; this waits for the device."""
    found: list[Tensor] = []
    _map(lambda x: found.append(x.detach().to("cpu", copy=True)) or x, made)  # type: ignore[func-returns-value]
    return tuple(found)


def to(value: Any, device: torch.device) -> Any:
    """Every tensor in a value, or in a tuple or dataclass of values, on a device and apart from the original."""
    return _map(lambda x: x.detach().to(device, copy=True), value)


def upcast(value: Any) -> Any:
    """Every floating tensor in fp32."""
    return _map(lambda x: x.float() if x.is_floating_point() else x, value)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(change, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map(change, getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


_TYPES = {kind.__name__: kind for kind in (AttentionSpec, AttentionBatch, DrawInputs, ExpertsSpec)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if callable(value):
        return {"type": "activation", "name": _activation(value)}
    if type(value) in _TYPES.values():
        return {"type": type(value).__name__} | {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return value


def _typed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_typed, value))
    if isinstance(value, dict) and value["type"] == "activation":
        return ACTIVATIONS.get(value["name"])
    if isinstance(value, dict):
        return _TYPES[value["type"]](**{name: part for name, part in value.items() if name != "type"})
    return value


def _activation(activate: Callable[[Tensor], Tensor]) -> str | None:
    """The name of what does the same to numbers around zero, on the host."""
    x = torch.linspace(-4, 4, 6 * 16).view(6, 16)
    for name, known in ACTIVATIONS.items():
        if torch.equal(activate(x.clone()), known(x)):
            return name
    return None


def _roundings(rounded: Tensor, exact: Tensor) -> Tensor:
    """Eight roundings of the largest value of each row, and twice what the reference itself loses by its dtype."""
    unit = _UNIT.get(rounded.dtype, _FLOAT)
    largest = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact
    return 8 * unit * largest + 2 * (rounded.float() - exact).abs() + 2.0**-22 * largest


def _differing_blocks(got: Tensor, want: Tensor) -> int:
    same = (got == want) | (got.isnan() & want.isnan()) if got.is_floating_point() else got == want
    return int((~same).flatten(1).any(1).sum()) if len(got) else 0


def _first(where: Tensor) -> list[int]:
    place: list[int] = where.nonzero()[0].tolist()
    return place
