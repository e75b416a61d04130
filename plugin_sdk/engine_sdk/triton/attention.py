"""Paged attention in Triton, for any device that Triton has a backend for.

The step's keys and values are written first. Then there are up to two launches of one kernel: requests whose tokens fit
in one tile (decodes, short drafts), with their keys split over programs; and tiles of the others. All lengths are read
on the device, so a plan holds no more than grids, constants and a workspace, and one of a captured step serves every
replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from engine.errors import UnsupportedCapability
from engine.interfaces import (
    ATTENTION_FEATURES,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    Domain,
    KVCache,
    KVLayout,
    Plan,
    Verdict,
)
from engine_sdk.layout import BlockLayout
from engine_sdk.triton.attention_kernels import attend
from engine_sdk.triton.kv_cache import TritonTokenMajor, write_tokens
from engine_sdk.triton.tuning import (
    AttentionTuning,
    DeviceProperties,
    Tile,
    attention_tuning,
    device_properties,
)

HEAD_DIMS = Domain.multiples(8, high=576)
"""Head sizes that the kernel takes."""

_MOST_SPLITS = 128
_MERGED = 8192  # elements that a program merges at once


@dataclass(frozen=True)
class Launch:
    """One launch of `attend`: what does not change from layer to layer.

    Attributes:
        grid: (head tiles, tiles or requests, splits).
        inputs: the kernel's arguments from `table` to `table_row`.
        constants: its constants, warps and stages.
    """

    grid: tuple[int, ...]
    inputs: tuple[Any, ...]
    constants: dict[str, Any]

    def run(
        self,
        q: Tensor,
        cache: KVCache,
        out: Tensor,
        lse: Tensor | None,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> None:
        """Attend; the arguments are those of `AttentionBackend.forward`, whose keys and values are in the cache."""
        attend[self.grid](
            q,
            cache.keys,
            cache.values,
            out,
            lse,
            sinks,
            alibi_slopes,
            *self.inputs,
            *q.stride()[:2],
            *out.stride()[:2],
            *((0, 0) if lse is None else lse.stride()),
            *cache.keys.stride()[:3],
            *cache.values.stride()[:3],
            **self.constants,
        )


@dataclass(frozen=True)
class _Plan:
    slots: Tensor
    launches: list[Launch]


class TritonAttention(AttentionBackend):
    """Paged attention in Triton: every feature of the contract, captured steps of any kind included.

    Numerics are of class A: scores and sums in fp32, probabilities rounded to the activation's dtype. Masked positions
    may hold NaN. The same call gives the same bits; a request's bits depend on how many requests share its step, since
    that decides how its keys are split.

    Plans of one backend share a workspace: steps run one after another. It is made while planning, outside a capture.

    Args:
        spec: what to compute.
        layout: how blocks are stored.
        declared: the platform's capabilities, so that what it did not declare is refused here too.
        device: what the kernels are cut for; None asks Triton's driver when the first step is planned.
        tuning: how they are cut; None looks it up for the device.
    """

    features = ATTENTION_FEATURES - {"relative_bias"}

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        layout: type[BlockLayout] = TritonTokenMajor,
        declared: Capabilities | None = None,
        device: DeviceProperties | None = None,
        tuning: AttentionTuning | None = None,
    ) -> None:
        super().__init__(spec)
        self._layout = layout
        self._declared = declared or Capabilities(attention=self.features)
        self._device = device
        self._tuning = tuning
        self._workspace = _Workspace()

    @classmethod
    def supports(cls, spec: AttentionSpec) -> Verdict:
        """Everything, but a chunk around queries that see the future, which the contract leaves open."""
        if not spec.causal and spec.chunk is not None:
            return Verdict.no("a chunk without a causal mask is not defined; drop one of them")
        return super().supports(spec)

    def layout(self, block_size: int) -> KVLayout:
        """Blocks of `block_size` tokens; binds to a `PagedCache`."""
        if block_size not in self._declared.block_sizes:
            raise UnsupportedCapability("block_sizes", block_size, f"declared: {self._declared.block_sizes}")
        spec = self.spec
        return self._layout(block_size, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, spec.kv_dtype)

    # Planning: once a step.

    def plan(self, batch: AttentionBatch) -> Plan:
        """Choose grids. Host fields but the limits are not used where the step is captured."""
        device, tuning = self._cut(batch.slots.device)
        short = self._tokens_of(tuning.decode)
        if batch.captured:
            num_short = batch.num_requests
        else:
            fits = (batch.query_start_host.diff() <= short).nonzero()
            num_short = int(fits[-1]) + 1 if len(fits) else 0
        launches = []
        if num_short:
            launches.append(self._launch(batch, device.num_cores, tuning, tuning.decode, num_short, None))
        if prefill := self._prefill(batch, device, tuning, short):
            launches.append(prefill)
        return _Plan(batch.slots, launches)

    def _prefill(
        self, batch: AttentionBatch, device: DeviceProperties, tuning: AttentionTuning, short: int
    ) -> Launch | None:
        """The launch of requests with more than `short` tokens, if there are any; subclasses may have other kernels."""
        tiles = tiles_of(batch, short, self._tokens_of(tuning.prefill))
        return self._launch(batch, device.num_cores, tuning, tuning.prefill, tiles, short) if tiles else None

    def _cut(self, device: torch.device) -> tuple[DeviceProperties, AttentionTuning]:
        """The device's properties, and how kernels are cut for it."""
        spec = self.spec
        self._device = self._device or device_properties(device)
        self._tuning = self._tuning or attention_tuning(
            self._device,
            spec.num_heads // spec.num_kv_heads,
            spec.head_dim,
            spec.v_head_dim,
            spec.dtype.itemsize,
            spec.kv_dtype.itemsize,
        )
        return self._device, self._tuning

    def _tokens_of(self, tile: Tile) -> int:
        """Query tokens of a tile."""
        group = self.spec.num_heads // self.spec.num_kv_heads
        return tile.block_m // min(group, tile.block_m)

    def _launch(
        self,
        batch: AttentionBatch,
        num_cores: int,
        tuning: AttentionTuning,
        tile: Tile,
        items: int,
        longer: int | None,
    ) -> Launch:
        spec = self.spec
        group = spec.num_heads // spec.num_kv_heads
        heads = min(group, tile.block_m)
        head_tiles = spec.num_kv_heads * -(-group // heads)
        d1 = 1 << (spec.head_dim.bit_length() - 1)
        rest = spec.head_dim - d1 if d1 >= 16 else 0
        e = max(16, triton.next_power_of_2(spec.v_head_dim))

        # As many programs as keep the device busy, each with keys enough to be worth it.
        wanted = num_cores * tuning.programs_per_core
        reach = batch.max_seq_len
        if longer is None and spec.causal:
            reach = min(reach, *(x + batch.max_query_len for x in (spec.window, spec.chunk) if x is not None), reach)
        splits = min(wanted // (items * head_tiles), -(-reach // tuning.least_keys), _MOST_SPLITS)
        splits = max(1, splits)
        part = part_lse = arrived = None
        if splits > 1:
            part, part_lse, arrived = self._workspace.take(
                items * head_tiles, splits * tile.block_m, e, batch.slots.device
            )
        merge_step = heads if longer is None else tile.block_m
        merge_rows = triton.next_power_of_2(merge_step)
        in_block = batch.block_size % tile.block_n == 0
        return Launch(
            (head_tiles, items, splits),
            (
                batch.block_table,
                batch.seq_lens,
                batch.query_start,
                part,
                part_lse,
                arrived,
                batch.num_requests,
                -(-tuning.least_keys // tile.block_n),
                batch.block_table.stride(0),
            ),
            {
                "SCALE": spec.scale,
                "SOFTCAP": spec.softcap,
                "WINDOW": spec.window,
                "CHUNK": spec.chunk,
                "CAUSAL": spec.causal,
                "GROUP": group,
                "HEAD_DIM": spec.head_dim,
                "V_HEAD_DIM": spec.v_head_dim,
                "BLOCK_SIZE": batch.block_size,
                "D1": max(16, d1),
                "D2": max(16, triton.next_power_of_2(rest)) if rest else 0,
                "E": e,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "LONGER": longer,
                "SPLIT": splits > 1,
                "MERGE_STEP": merge_step,
                "MERGE_ROWS": merge_rows,
                "MERGE_DEPTH": max(1, min(16, _MERGED // (merge_rows * e))),
                "num_warps": tile.num_warps,
                # Of a tile in several blocks each row's address is looked up an iteration before it is read.
                "num_stages": 1 + (1 if in_block else 2) * tile.depth,
            },
        )

    # Computing: once a layer.

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
        """See `AttentionBackend.forward`."""
        if lse is not None and "lse" not in self._declared.attention:
            raise UnsupportedCapability("lse", True, f"declared: {sorted(self._declared.attention)}")
        if k is not None and v is not None:
            write_tokens(k, v, cache, plan.slots)
        for launch in plan.launches:
            launch.run(q, cache, out, lse, sinks, alibi_slopes)


def tiles_of(batch: AttentionBatch, short: int, step: int) -> int:
    """Tiles of `step` tokens of requests with more than `short`; of a captured step, as many as a replay may have."""
    if not batch.captured:
        lengths = batch.query_start_host.diff()
        return int((-(-lengths[lengths > short] // step)).sum())
    if batch.max_query_len <= short:
        return 0
    # Each tile is full, or the last one of a request with more than `short` tokens.
    ends = min(batch.num_requests, batch.num_tokens // (short + 1))
    return min(batch.num_tokens // step + ends, ends * -(-batch.max_query_len // step))


class _Workspace:
    """Where split keys leave their parts. It grows, and plans keep what they were made with."""

    def __init__(self) -> None:
        self._parts: Tensor | None = None
        self._arrived: Tensor | None = None

    def take(self, places: int, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """For `places` times `rows` query rows: float32 [places * rows, width] and [places * rows], garbage; and
        counters, int32 [places], which are zero and are left so.
        """
        numel = places * rows * (width + 1)
        if self._parts is None or self._parts.numel() < numel:
            self._parts = torch.empty(numel, dtype=torch.float32, device=device)
        if self._arrived is None or self._arrived.numel() < places:
            self._arrived = torch.zeros(places, dtype=torch.int32, device=device)
        return self._parts, self._parts[places * rows * width :], self._arrived
