"""Operations that a platform may replace: token-wise ops, drawing tokens, linear layers and experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.errors import UnsupportedCapability


@dataclass(frozen=True)
class DrawInputs:
    """How S rows of logits [S, V] are drawn; each tensor [S], on the device. `engine_sdk.sampling` has the rule.

    Attributes:
        top_k: int64, 1 to V; 1 is greedy, V keeps all.
        top_p: int64, in units of ``1 / ONE``; `ONE` keeps all.
        cut: int64, ``-log2(min_p)`` in units of ``1 / LEVELS``; `LAST` keeps all.
        u: int64, uniform in [0, 1), in units of ``1 / ONE``.
        scale: fp32, positive and finite, ``log2(e) / temperature * LEVELS``.
        max_top_k: the largest `top_k` above 1 and below V, 0 if there is none: known without asking the device.
        any_top_p: whether a `top_p` is below `ONE`.
        any_min_p: whether a `cut` is below `LAST`.
    """

    LEVELS: ClassVar[int] = 1 << 16
    LAST: ClassVar[int] = 41 << 16
    ONE: ClassVar[int] = 1 << 31

    top_k: Tensor
    top_p: Tensor
    cut: Tensor
    u: Tensor
    scale: Tensor
    max_top_k: int
    any_top_p: bool
    any_min_p: bool


@dataclass(frozen=True)
class OpSet:
    """Operations that wait for nothing. `engine_sdk.REFERENCE_OPS` has all in plain torch, to replace where faster.

    Attributes:
        rms_norm: (x [..., D], weight [D], eps) to ``x / sqrt(mean(x^2) + eps) * weight``, computed in fp32 and rounded
            once before the weight (Zhang and Sennrich, 2019, as Transformers' Llama has it).
        add_rms_norm: (x, residual, weight, eps) to ``rms_norm(x + residual)`` and the sum, rounded to the dtype of `x`.
        silu_and_mul: (gate, up) to ``silu(gate) * up``, elementwise.
        rotary: (q [..., H, N, D], k [..., K, N, D], cos and sin [..., N, D]) to new q and k; the two halves of the
            rotated dimensions are pairs (Su et al., 2021, in GPT-NeoX's order).
        draw: (logits [S, V] of any float dtype, `DrawInputs`) to token ids, int64 [S]; all rows are greedy with None.
            The ids are exactly the reference's, whose arithmetic is the same on every device.
        penalise: (logits fp32 [S, V], history int32 [slots, V], places int64 [2, R], penalties fp32 [3, R]) changes
            rows ``places[0]`` of the logits by the histories in slots ``places[1]``. A history is negative (`BANNED`)
            where a token is not allowed: -inf. Else it is the token's count in the output, plus `PROMPT` if the prompt
            has it. The penalties are repetition (Keskar et al., 2019), frequency and presence (as OpenAI has them).
        logprobs: (logits [L, V] of any float dtype, token ids int64 [L], K) to int32 [L, 2K + 3]: the token's id and
            those of the K likeliest; the bits of their fp32 log probabilities; one more than how many are likelier.
    """

    PROMPT: ClassVar[int] = 1 << 30
    BANNED: ClassVar[int] = -(1 << 31)

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor, Tensor], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    draw: Callable[[Tensor, DrawInputs | None], Tensor]
    penalise: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    logprobs: Callable[[Tensor, Tensor, int], Tensor]


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


@dataclass(frozen=True)
class QuantWeight:
    """A weight [out, in] as integers, ``(values - zeros) * scales``, with G groups of inputs."""

    values: Tensor  # int8 [out, in]; those of 4 bits are -8 to 7
    scales: Tensor  # [out, G], of a float dtype
    zeros: Tensor | None = None  # int8 [out, G]


class LinearMethod(ABC):
    """Applies ``x @ weight.T + bias``; may keep the weight in a form of its own."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> object:
        """Take a loaded weight [out, in] over, once. The core drops its own reference, so that no second copy stays."""

    def pack_joined(self, weights: Sequence[Tensor], bias: Tensor | None) -> object:
        """`pack` of several weights as one, their rows one below the other; a method may do without joining them."""
        return self.pack(weights[0] if len(weights) == 1 else torch.cat(tuple(weights)), bias)

    @abstractmethod
    def apply(self, x: Tensor, packed: object) -> Tensor:
        """x [..., in] to [..., out], same dtype."""

    def pack_quantized(self, weight: QuantWeight, bias: Tensor | None) -> object:
        """`pack` for weights that a checkpoint has as integers of the method's scheme, to be kept exactly."""
        raise UnsupportedCapability("quant_schemes", type(self).__name__, "it rounds float weights only; load those")

    def rows(self, ids: Tensor, packed: object) -> Tensor:
        """Rows `ids`, int64 [...], of the weight, [..., in]. With it an embedding may share a quantised weight."""
        raise UnsupportedCapability("quant_schemes", type(self).__name__, "it cannot give rows of a weight back")


@dataclass(frozen=True)
class ExpertsSpec:
    """A layer of experts as Transformers stores it: two stacked weights.

    Attributes:
        num_experts: how many experts this rank holds.
        top_k: experts a token goes to.
        gated: the first weight makes gate and up at once, and `ExpertWeights.activate` combines them.
        transposed: weights are [experts, in, out] rather than [experts, out, in].
        dtype: of weights and activations.
        silu: `ExpertWeights.activate` is ``silu(gate) * up`` of the product's halves, if a method would fuse it.
    """

    num_experts: int
    top_k: int
    gated: bool
    transposed: bool
    dtype: torch.dtype
    silu: bool = False


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
