"""Capture and replay through `torch.accelerator.Graph`, which torch has from 2.13 on."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.interfaces import Device, Graph, GraphRuntime


class TorchGraph(Graph):
    """A captured graph of torch's: `torch.accelerator.Graph`, or an older class with the same methods."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def replay(self) -> None:
        """See `Graph.replay`."""
        self._graph.replay()


class TorchGraphs(GraphRuntime):
    """Captures on a side stream; all graphs that are alive share one memory pool."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._alive: weakref.WeakSet[TorchGraph] = weakref.WeakSet()
        self._pool: Any = None

    @classmethod
    def available(cls) -> bool:
        """Whether this torch has graphs for its accelerator. Initialises the device."""
        try:
            torch.accelerator.Graph()
        except (AttributeError, RuntimeError):
            return False
        return True

    def _begin(self, pool: Any) -> Any:
        """Start capturing on the current stream, into `pool` if given; returns the graph."""
        graph = torch.accelerator.Graph(pool=pool)
        graph.capture_begin()
        return graph

    def capture(self, launch: Callable[[], None]) -> Graph:
        """See `GraphRuntime.capture`."""
        self._device.synchronize()
        with self._device.side_stream():
            graph = self._begin(self._pool if self._alive else None)  # a pool goes with the last graph that uses it
            try:
                with self._refusing_waits():
                    launch()
            finally:
                graph.capture_end()
        self._pool = graph.pool()
        captured = TorchGraph(graph)
        self._alive.add(captured)
        return captured

    @contextlib.contextmanager
    def _refusing_waits(self) -> Iterator[None]:
        """Let calls that wait for the device raise, where its module can: asked for a value within a capture, a driver
        ends it as spoilt, and torch's random numbers then stay in it for the life of the process.
        """
        module = torch.get_device_module(self._device.torch_device)
        if not (hasattr(module, "get_sync_debug_mode") and hasattr(module, "set_sync_debug_mode")):
            yield
            return
        before = module.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that not every wait is found: those spoil it as before
            module.set_sync_debug_mode("error")
        try:
            yield
        finally:
            module.set_sync_debug_mode(before)
