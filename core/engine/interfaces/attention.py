"""Attention: the specification of a layer, one step's batch, and the backend that a platform provides.

Shapes: N tokens of the step, R requests, H query heads, K key/value heads, D head size of query and key, E head size of
the value, B tokens a block, W the width of the block table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.interfaces.capabilities import OK, AttentionFeature, Verdict
from engine.interfaces.kv_cache import KVCache, KVLayout


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention layer computes: ``softmax(mask(cap(scale * q k^T) + bias)) v`` over its request's tokens.

    Attributes:
        num_heads: H, query heads on this rank.
        num_kv_heads: K, key/value heads on this rank; divides H. Head h reads key/value head ``h // (H // K)``.
        head_dim: D.
        v_head_dim: E; equals D in most models.
        scale: factor of the scores.
        dtype: of queries, keys, values and output.
        kv_dtype: of the cache.
        window: tokens a query sees, itself included: key j is seen by query i when ``i - window < j <= i``.
        chunk: chunked-local attention: key j is seen by query i when ``j // chunk == i // chunk`` and ``j <= i``.
        softcap: c of ``c * tanh(scores / c)``, applied to the scaled scores before the mask.
        sinks: a learned logit per head joins the softmax's denominator (GPT-OSS).
        alibi: ``slope[h] * (j - i)`` is added to the scaled scores (Press et al., 2021).
        relative: r of a learned bias, ``table[h, r + clamp(j - i, -r, r)]``, added to the scaled scores if not causal.
        causal: False lets a query see all of its request's tokens, or with a window those j with ``|i - j| < window``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    causal: bool = True
    relative: int | None = None

    def features(self) -> frozenset[AttentionFeature]:
        """The optional features that this layer needs."""
        wanted: dict[AttentionFeature, bool] = {
            "sliding_window": self.window is not None,
            "chunked": self.chunk is not None,
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            "alibi": self.alibi,
            "v_head_dim": self.v_head_dim != self.head_dim,
            "bidirectional": not self.causal,
            "relative_bias": self.relative is not None,
            "two_sided_window": self.window is not None and not self.causal,
        }
        return frozenset(name for name, on in wanted.items() if on)


@dataclass(frozen=True)
class AttentionBatch:
    """One step, as one KV group sees it. Rows with one query token come first.

    Tensors named ``*_host`` live in host memory and equal their device twins; a plan may read them without a
    synchronisation.

    Steps are padded so that a captured graph fits them: tokens from ``query_start[R]`` on belong to no request, and a
    request of length 0 has one token or none. Their slots lie in block 0; the former's output is not written, the
    latter's is not read.

    Attributes:
        query_start: int32 [R + 1] on the device; request r owns tokens ``query_start[r]:query_start[r + 1]``.
        seq_lens: int32 [R] on the device; tokens of each request once this step's are written.
        block_table: int32 [R, W] on the device; block 0 stands for "no block" and is never read within the mask;
            columns past a request's last block hold any block's id.
        slots: int64 [N] on the device; where token n is written: ``block * block_size + offset``.
        query_start_host, seq_lens_host: the same in host memory.
        num_decodes: leading requests with exactly one query token.
        max_query_len, max_seq_len: over the batch.
        block_size: B.
        captured: the step is being captured. Device tensors keep their addresses, and have other contents at each
            replay; `max_query_len` and `max_seq_len` are limits that hold for all replays, and the other host fields
            describe the first step only, but for `num_decodes`, which holds for all when graphs are ``"uniform"``:
            every request is a decode.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slots: Tensor
    query_start_host: Tensor
    seq_lens_host: Tensor
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    block_size: int
    captured: bool = False

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.slots.shape[0]

    @property
    def num_requests(self) -> int:
        """R."""
        return self.seq_lens.shape[0]


Plan = Any
"""Whatever `AttentionBackend.plan` returns: opaque to the core, handed back to `forward`."""


class AttentionBackend(ABC):
    """Paged attention of one kind of layer. One instance serves all layers that have the same specification."""

    features: ClassVar[frozenset[AttentionFeature]] = frozenset()

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @classmethod
    def supports(cls, spec: AttentionSpec) -> Verdict:
        """Whether this backend computes `spec`; the reason when it does not."""
        lacking = spec.features() - cls.features
        return OK if not lacking else Verdict.no(f"{cls.__name__} has no {', '.join(sorted(lacking))}")

    @abstractmethod
    def layout(self, block_size: int) -> KVLayout:
        """How this backend stores `block_size` tokens of one layer."""

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> Plan:
        """Prepare one step; called once a step, shared by all layers of the same group and specification.

        A platform that declares graphs is also asked for plans of captured batches, which serve every replay. Others
        may assume that none comes.
        """

    def refresh(self, plan: Plan, batch: AttentionBatch) -> None:  # noqa: B027
        """Bring what a captured batch's plan holds up to date, in place, before a replay for `batch`.

        `batch` has the device tensors that the plan was made for, already filled, and host fields of its own.
        """

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: KVCache,
        plan: Plan,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        """Write all of the step's keys and values into the cache, and only then attend: requests may share blocks.

        Args:
            q: [N, H, D], dtype of the specification; as in `k` and `v`, only the last dimension must be dense.
            k: [N, K, D]; None when the layer reads another layer's cache (then `v` is None too).
            v: [N, K, E].
            cache: what this backend's layout bound.
            plan: what `plan` returned for this step.
            out: [N, H, E], written; its previous content is garbage.
            sinks: float [H], given exactly when the specification has `sinks`.
            alibi_slopes: float32 [H], given exactly when the specification has `alibi`; for `relative` [H, 2r + 1].
            lse: float32 [N, H], written with the natural log of the softmax's denominator when given.
        """
