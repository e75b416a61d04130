"""Capture and replay of device work, and the compiler's options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


class Graph(ABC):
    """Captured device work; it reads and writes the tensors that it was captured with."""

    @abstractmethod
    def replay(self) -> None:
        """Launch the captured work on the current stream."""


class GraphRuntime(ABC):
    """Captures what a function launches. All graphs of one runtime share one memory pool."""

    @abstractmethod
    def capture(self, launch: Callable[[], None]) -> Graph:
        """Run `launch` while recording. It must not synchronise and must have run once before."""


@dataclass(frozen=True)
class CompilerOptions:
    """How a decoder layer is compiled with `torch.compile`.

    Attributes:
        backend: torch.compile's backend.
        options: passed on to the backend.
    """

    backend: str = "inductor"
    options: Mapping[str, object] = field(default_factory=dict)
