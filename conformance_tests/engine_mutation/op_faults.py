"""Token-wise operations and experts that compute something near to what was asked for."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_mutation.catalogue import Ops, fault
from engine_mutation.host import HostPlatform
from engine_sdk import (
    REFERENCE_OPS,
    ExpertsSpec,
    ExpertWeights,
    LinearMethod,
    QuantScheme,
    QuantWeight,
    TorchExperts,
    TorchQuantized,
    combine,
)

_NORM = "test_ops.py::test_rms_norm"
_ROTARY = "test_ops.py::test_rotary"
_SILU = "test_ops.py::test_silu_and_mul"
_EXPERTS = "test_ops.py::test_experts[silu_gate]"
_LINEAR = "test_ops.py::test_linear"
_QUANTISED = "test_ops.py::test_quantised_linear"


_norm = REFERENCE_OPS.rms_norm


@fault("L1", _NORM)
class EpsilonOutsideTheRoot(Ops):
    """Epsilon is added to the root, not under it."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        return weight * (y / (y.square().mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)


@fault("L1", _NORM)
class NormInTheInputsDtype(Ops):
    """Squares are taken in the input's dtype: fp16 overflows, bf16 loses digits."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


@fault("L1", _NORM)
class NormOfOnePlusWeight(Ops):
    """The weight is taken for an offset from one."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _norm(x, weight + 1, eps)


@fault("L1", _NORM)
class NormOfOneThousand(Ops):
    """A row is reduced by 1024 threads, one element each: what is beyond is not counted."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = x[..., :1024].float().square().sum(-1, keepdim=True) / x.shape[-1]
        return weight * (x.float() * torch.rsqrt(mean + eps)).to(x.dtype)


@fault("L1", _NORM)
class NormPaddedToAPowerOfTwo(Ops):
    """The mean divides by the row's length padded to a power of two."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        padded = 1 << (x.shape[-1] - 1).bit_length()
        more = (padded / x.shape[-1]) ** 0.5
        return torch.mul(_norm(x, weight, eps).float(), more).to(x.dtype)


@fault("L1", _NORM)
class NormOverTheBatch(Ops):
    """Rows of one sequence share a mean."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        return weight * (y * torch.rsqrt(y.square().mean((-1, -2) if x.dim() > 2 else -1, keepdim=True) + eps)).to(
            x.dtype
        )


@fault("L1", _NORM)
class NormInPlace(Ops):
    """The input receives the result too."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.copy_(_norm(x, weight, eps))


@fault("L1", _SILU)
class SiluOfUp(Ops):
    """Gate and up are swapped."""

    @staticmethod
    def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(up) * gate


@fault("L1", _SILU)
class SiluByTanh(Ops):
    """The sigmoid is replaced by a hard one."""

    @staticmethod
    def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
        return F.hardswish(gate) * up


@fault("L1", _SILU)
class SiluWithoutTails(Ops):
    """Beyond -8 the gate counts as closed."""

    @staticmethod
    def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).masked_fill(gate < -8, 0) * up


@fault("L1", _SILU)
class SiluInPlace(Ops):
    """The product is stored in the caller's gate."""

    @staticmethod
    def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
        return gate.copy_(REFERENCE_OPS.silu_and_mul(gate, up))


@fault("L1", _ROTARY)
class RotaryOfNeighbours(Ops):
    """Pairs are neighbours instead of halves."""

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos.unsqueeze(-3) + other * sin.unsqueeze(-3)

        return turn(q), turn(k)


@fault("L1", _ROTARY)
class RotaryTheOtherWay(Ops):
    """The angle has the wrong sign."""

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return REFERENCE_OPS.rotary(q, k, cos, -sin)


@fault("L1", _ROTARY)
class RotaryFromPositionZero(Ops):
    """The angles of a chunk are those of a prompt's beginning."""

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        step = torch.atan2(sin.float(), cos.float()).diff(dim=-2)[..., :1, :]
        angle = step * torch.arange(cos.shape[-2])[:, None]
        return REFERENCE_OPS.rotary(q, k, angle.cos().to(q.dtype), angle.sin().to(q.dtype))


@fault("L1", _ROTARY)
class RotaryOfQueriesAlone(Ops):
    """Keys of another number of heads than the queries' are left as they were."""

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = REFERENCE_OPS.rotary(q, k, cos, sin)
        return turned if q.shape == k.shape else (turned[0], k.clone())


@fault("L1", _ROTARY)
class RotaryInPlace(Ops):
    """The caller's query and key are turned in place."""

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = REFERENCE_OPS.rotary(q, k, cos, sin)
        return q.copy_(turned[0]), k.copy_(turned[1])


@fault("L1", "test_ops.py::test_rotary_broadcasts")
class RotaryOfTheFirstSequence(Ops):
    """All sequences of a batch are turned by the first one's angles."""

    @staticmethod
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return REFERENCE_OPS.rotary(q, k, cos[:1], sin[:1])


# Experts.


@fault("L1", _EXPERTS)
class AbsentExpertIsTheLast(TorchExperts):
    """An id beyond the last expert is clamped to it, where it should contribute nothing."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        return super().apply(x, expert_ids.clamp(max=self.spec.num_experts - 1), scores, weights)


@fault("L1", _EXPERTS)
class ExpertIdsClampedInPlace(TorchExperts):
    """The caller's ids are changed."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        result = super().apply(x, expert_ids, scores, weights)
        expert_ids.clamp_(max=self.spec.num_experts - 1)
        return result


@fault("L1", _EXPERTS)
class ExpertChosenTwiceCountsOnce(TorchExperts):
    """A token's repeated expert is taken for one choice."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        again = (expert_ids[:, :, None] == expert_ids[:, None]).tril(-1).any(-1)
        return super().apply(x, expert_ids, scores.masked_fill(again, 0), weights)


@fault("L1", _EXPERTS)
class ScoresOfTheFirstChoice(TorchExperts):
    """All choices of a token are weighed with its first score."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        return super().apply(x, expert_ids, scores[:, :1].expand_as(scores), weights)


@fault("L1", _EXPERTS)
class ScoresNormalised(TorchExperts):
    """Scores are made to add up to one."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        return super().apply(x, expert_ids, scores / scores.sum(-1, keepdim=True), weights)


@fault("L1", "test_ops.py::test_experts_sum_in_fp32")
class ExpertsSummedInTheirDtype(TorchExperts):
    """Experts are added in the activations' dtype."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        total = torch.zeros_like(x)
        for i in range(expert_ids.shape[1]):
            total += super().apply(x, expert_ids[:, i : i + 1], scores[:, i : i + 1], weights)
        return total


@fault("L1", _EXPERTS)
class ScoreAppliedBeforeTheActivation(TorchExperts):
    """The score weighs an expert's input instead of its output."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        ones = torch.ones_like(scores)
        parts = [
            TorchExperts.apply(self, x * scores[:, i : i + 1], expert_ids[:, i : i + 1], ones[:, :1], weights)
            for i in range(expert_ids.shape[1])
        ]
        return torch.stack(parts).sum(0)


@fault("L1", _EXPERTS)
class ExpertBiasDropped(TorchExperts):
    """The second product's bias is left out."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        bare = replace(weights, down_bias=None)
        return super().apply(x, expert_ids, scores, bare)


@fault("L1", _EXPERTS)
class TokensBeyondCapacityDropped(TorchExperts):
    """An expert takes 8 tokens of a step, and drops the others."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        before = F.one_hot(expert_ids.clamp(max=self.spec.num_experts).flatten()).cumsum(0)
        place = before.gather(1, expert_ids.clamp(max=self.spec.num_experts).flatten()[:, None]).view_as(expert_ids)
        return super().apply(x, expert_ids, scores.masked_fill(place > 8, 0), weights)


@fault("L1", _EXPERTS)
class UnwrittenRowsWeighed(TorchExperts):
    """Rows of experts that do not exist are never written, and are added with a weight of zero: NaN."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        rows = self._hit(x, expert_ids, weights)
        absent = expert_ids >= self.spec.num_experts
        rows[absent] = torch.nan
        return combine(rows, expert_ids, scores.masked_fill(absent, 0), self.spec.num_experts + 99)


@fault("L1", _EXPERTS)
class SortedAssignmentsUnstable(TorchExperts):
    """Rows are sorted by expert, and put back in the order of the sort."""

    def _hit(self, x: Tensor, expert_ids: Tensor, weights: ExpertWeights) -> Tensor:
        rows = super()._hit(x, expert_ids, weights)
        order = expert_ids.flatten().argsort(stable=True)
        return rows.flatten(0, 1)[order].view_as(rows)


@fault("L1", "test_ops.py::test_experts[interleaved_gate]")
class GateTakenForSilu(TorchExperts):
    """The layer's activation is ignored, and gate and up are taken for the halves of a SwiGLU."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        def swiglu(h: Tensor) -> Tensor:
            gate, up = h.chunk(2, -1)
            return F.silu(gate) * up

        mine = replace(weights, activate=swiglu)
        return super().apply(x, expert_ids, scores, mine if self.spec.gated else weights)


@fault("L1", "test_ops.py::test_experts[silu_gate]")
class FusedGateOfTheSecondHalf(TorchExperts):
    """A gate that is fused takes up for gate."""

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        def swapped(h: Tensor) -> Tensor:
            up, gate = h.chunk(2, -1)
            return F.silu(gate) * up

        mine = replace(weights, activate=swapped)
        return super().apply(x, expert_ids, scores, mine if self.spec.silu else weights)


# Linear layers.


class _Linear(LinearMethod):
    def pack(self, weight: Tensor, bias: Tensor | None) -> Any:
        return weight, bias

    def apply(self, x: Tensor, packed: Any) -> Tensor:
        return F.linear(x, *packed)


class _BiasDropped(_Linear):
    def apply(self, x: Tensor, packed: Any) -> Tensor:
        return F.linear(x, packed[0])


class _LowAccumulator(_Linear):
    def apply(self, x: Tensor, packed: Any) -> Tensor:
        weight, bias = packed
        total = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
        for a, w in zip(x.split(8, -1), weight.split(8, -1), strict=True):
            total += F.linear(a, w)
        return total if bias is None else total + bias


@fault("L1", _LINEAR)
class LinearBiasDropped(HostPlatform):
    """A platform's own linear layers leave the bias out."""

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        return super().linear(scheme) or _BiasDropped()


@fault("L1", _LINEAR)
class LinearAccumulatesInTheInputsDtype(HostPlatform):
    """A platform's own linear layers round the sum after every 8 products."""

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        return super().linear(scheme) or _LowAccumulator()


@fault("L1", _LINEAR)
class UnknownSchemeTaken(HostPlatform):
    """A quantisation scheme that nobody declared is run as if there were none."""

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        return None


class _Quantised(HostPlatform):
    """A platform whose quantised layers keep something else than what was stored."""

    @staticmethod
    def _kept(weight: QuantWeight) -> QuantWeight:
        """What is kept of a weight."""
        return weight

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        method = super().linear(scheme)
        if not isinstance(method, TorchQuantized):
            return method
        kept = self._kept

        class Keeps(TorchQuantized):
            def pack_quantized(self, weight: QuantWeight, bias: Tensor | None) -> object:
                return super().pack_quantized(kept(weight), bias)

        return Keeps(method.scheme)


@fault("L1", _QUANTISED)
class ZeroPointsIgnored(_Quantised):
    """Quantised layers leave zero points out, as symmetric ones may."""

    @staticmethod
    def _kept(weight: QuantWeight) -> QuantWeight:
        return dataclasses.replace(weight, zeros=None)


@fault("L1", _QUANTISED)
class ScalesOfTheNextGroup(_Quantised):
    """A group of inputs gets the scale of the one after it."""

    @staticmethod
    def _kept(weight: QuantWeight) -> QuantWeight:
        return dataclasses.replace(weight, scales=weight.scales.roll(-1, 1))


@fault("L1", _QUANTISED)
class LeastIntegerLost(_Quantised):
    """Integers are kept within a symmetric range: the least becomes the one above it."""

    @staticmethod
    def _kept(weight: QuantWeight) -> QuantWeight:
        least = -8 if int(weight.values.abs().amax()) <= 8 else -128
        return dataclasses.replace(weight, values=weight.values.clamp(min=least + 1))


@fault("L1", "test_ops.py::test_experts_refuse_what_is_not_declared")
class ExpertsTakeAnyDtype(HostPlatform):
    """Experts of a dtype that was not declared are made."""

    def experts(self, spec: ExpertsSpec) -> TorchExperts:
        return TorchExperts(spec)
