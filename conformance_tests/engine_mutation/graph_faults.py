"""Graphs that replay what was instead of what is, and attention that is wrong under replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine_mutation.catalogue import fault
from engine_mutation.loop import LoopAttention, Request
from engine_sdk import AttentionBatch, AttentionSpec, Capabilities, Graph, GraphRuntime, TorchAttention

_REPLAY = "test_graphs.py::test_replay_is_eager_after_a_change"
_DECODES = "test_graphs.py::test_captured_decodes[4-causal]"
_MIXED = "test_graphs.py::test_captured_mixed_batches[causal]"


class HostGraph(Graph):
    """Work of the host, which reads its tensors anew each time."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch

    def replay(self) -> None:
        self._launch()


class HostGraphs(GraphRuntime):
    """Capture and replay on a host: a graph calls again what was captured."""

    _attention: ClassVar[Any] = LoopAttention

    def capture(self, launch: Callable[[], None]) -> Graph:
        launch()
        return HostGraph(launch)


class _Baked(LoopAttention):
    """Plans keep a copy of some tensors of the batch."""

    _fields: ClassVar[tuple[str, ...]]

    def plan(self, batch: AttentionBatch) -> Any:
        return replace(batch, **{name: getattr(batch, name).clone() for name in self._fields})


@fault("L5", _REPLAY, graphs="full")
class ReplayDoesNothing(HostGraphs):
    """A replay launches nothing, and the output is the captured step's."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        launch()
        return HostGraph(lambda: None)


@fault("L5", _REPLAY, graphs="full")
class ReplayWorksOnce(HostGraphs):
    """A graph can be replayed once, and later replays launch nothing."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        launch()
        waiting = [launch]
        return HostGraph(lambda: waiting.pop()() if waiting else None)


@fault("L5", "test_graphs.py::test_graphs_are_independent", graphs="full")
class NewestGraphReplayed(HostGraphs):
    """The runtime keeps one graph: the replay of an older one launches the newest."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        launch()
        self._newest = launch
        return HostGraph(lambda: self._newest())


@fault("L5", _DECODES, graphs="full")
class LengthsBakedIn(HostGraphs):
    """A captured step keeps the lengths that its requests had."""

    class _attention(_Baked):  # noqa: N801
        _fields = ("seq_lens",)


@fault("L5", _DECODES, graphs="full")
class TableBakedIn(HostGraphs):
    """A captured step keeps its block table: the pointer is stale once there is another."""

    class _attention(_Baked):  # noqa: N801
        _fields = ("block_table",)


@fault("L5", _DECODES, graphs="full")
class SlotsBakedIn(HostGraphs):
    """A replayed step writes where the captured one did."""

    class _attention(_Baked):  # noqa: N801
        _fields = ("slots",)


@fault("L5", _MIXED, graphs="full")
class RowsBakedIn(HostGraphs):
    """A captured step keeps which tokens belong to which request."""

    class _attention(_Baked):  # noqa: N801
        _fields = ("query_start",)


@fault("L5", _DECODES, graphs="full")
class ReplayBeforeTheUpdate(HostGraphs):
    """A replay runs with the lengths of the replay before it, as if it overtook their copy to the device."""

    class _attention(LoopAttention):  # noqa: N801
        _lengths: Tensor | None = None

        def _requests(self, batch: AttentionBatch) -> list[Request]:
            lengths = batch.seq_lens.clone()
            before = lengths if self._lengths is None or not batch.captured else self._lengths
            self._lengths = lengths if batch.captured else self._lengths
            return super()._requests(replace(batch, seq_lens=before))


@fault("L5", _DECODES, graphs="full")
class FirstStepLimitsTheRest(HostGraphs):
    """The number of keys that a captured step can read is its own longest request's, not `max_seq_len`."""

    class _attention(LoopAttention):  # noqa: N801
        def plan(self, batch: AttentionBatch) -> Any:
            self._limit = int(batch.seq_lens_host.max()) if batch.captured else batch.max_seq_len
            return batch

        def _sees(self, query: Tensor, key: Tensor, request: Request) -> Tensor:
            return super()._sees(query, key, request) & (key < self._limit)


@fault("L5", _DECODES, graphs="full")
class PaddedRowsWriteUnderReplay(HostGraphs):
    """In a captured step, padded tokens are written behind their stale request instead of into block 0."""

    class _attention(LoopAttention):  # noqa: N801
        def _slots(self, batch: AttentionBatch) -> tuple[Tensor, Tensor]:
            blocks, offsets = super()._slots(batch)
            if not batch.captured:
                return blocks, offsets
            return torch.where(blocks == 0, blocks.roll(1), blocks), offsets


@fault("L5", _MIXED, graphs="full")
class UniformDeclaredFull(HostGraphs):
    """A captured step reads one query a request, and graphs of any batch are declared."""

    class _attention(LoopAttention):  # noqa: N801
        def _requests(self, batch: AttentionBatch) -> list[Request]:
            requests = super()._requests(batch)
            if not batch.captured:
                return requests
            return [replace(r, tokens=slice(r.tokens.start, r.tokens.start + 1)) for r in requests]


@fault("L5", _DECODES, graphs="full")
class HostPlanUnderReplay(HostGraphs):
    """The plan of a captured step is made of the host's lengths, and never refreshed."""

    class _attention(TorchAttention):  # noqa: N801
        def __init__(self, spec: AttentionSpec, declared: Capabilities) -> None:
            super().__init__(spec, declared=declared)


@fault("L5", "test_graphs.py::test_failed_capture", graphs="full")
class FailedCaptureIsAGraph(HostGraphs):
    """An error while recording is swallowed."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        try:
            launch()
        except RuntimeError:
            return HostGraph(lambda: None)
        return HostGraph(launch)


@fault("L5", "test_graphs.py::test_declared_graphs_are_there", graphs="full")
class GraphsMissing(LoopAttention):
    """Graphs of any batch are declared, and there is no runtime."""
