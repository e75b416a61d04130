"""Operations that a platform may replace: token-wise ops, linear layers and experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpSet:
    """Token-wise operations. `engine_sdk.REFERENCE_OPS` has all in plain torch; a platform replaces what it has faster.

    Attributes:
        rms_norm: (x [..., D], weight [D], eps) to ``x / sqrt(mean(x^2) + eps) * weight``, computed in fp32 and rounded
            once before the weight (Zhang and Sennrich, 2019, as Transformers' Llama has it).
        silu_and_mul: (gate, up) to ``silu(gate) * up``, elementwise.
        rotary: (q [..., H, N, D], k [..., K, N, D], cos and sin [..., N, D]) to new q and k; the two halves of the
            rotated dimensions are pairs (Su et al., 2021, in GPT-NeoX's order).
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_and_mul: Callable[[Tensor, Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class QuantScheme:
    """How weights are quantised.

    Attributes:
        name: the scheme's registered name, ``"int8"`` or ``"vendor:name"``.
        bits: of a weight.
        group_size: weights that share a scale along the input dimension; None for one scale an output channel.
    """

    name: str
    bits: int
    group_size: int | None = None


class LinearMethod(ABC):
    """Applies ``x @ weight.T + bias``; may keep the weight in a form of its own."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> object:
        """Take a loaded weight [out, in] over, once. The core drops its own reference, so that no second copy stays."""

    @abstractmethod
    def apply(self, x: Tensor, packed: object) -> Tensor:
        """x [..., in] to [..., out], same dtype."""


@dataclass(frozen=True)
class ExpertsSpec:
    """A layer of experts as Transformers stores it: two stacked weights.

    Attributes:
        num_experts: how many experts this rank holds.
        top_k: experts a token goes to.
        gated: the first weight makes gate and up at once, and `ExpertWeights.activate` combines them.
        transposed: weights are [experts, in, out] rather than [experts, out, in].
        dtype: of weights and activations.
    """

    num_experts: int
    top_k: int
    gated: bool
    transposed: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpertWeights:
    """One layer's parameters. `activate` maps the first product [S, I or 2I] to the second's input [S, I]."""

    up: Tensor
    down: Tensor
    activate: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class ExpertsMethod(ABC):
    """Computes a layer of experts for tokens that have been routed already."""

    @abstractmethod
    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            x: [N, hidden].
            expert_ids: int64 [N, top_k]; an id of `num_experts` or more contributes nothing.
            scores: [N, top_k], the routing weights.
            weights: the layer's parameters.

        Returns:
            [N, hidden], dtype of `x`; summed in fp32 over the experts in the order of `expert_ids`' columns.
        """
