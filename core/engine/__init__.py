"""engine: a hardware-plugin platform for LLM inference.

    from engine import LLM, SamplingParams

Names are imported when they are first used, so that the command line and plugins start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from engine.version import __version__

if TYPE_CHECKING:
    from engine.config import EngineArgs
    from engine.llm import LLM
    from engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

_HOME = {
    "LLM": "engine.llm",
    "EngineArgs": "engine.config",
    "SamplingParams": "engine.request",
    "RequestOutput": "engine.request",
    "CompletionOutput": "engine.request",
    "Logprob": "engine.request",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineArgs",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
