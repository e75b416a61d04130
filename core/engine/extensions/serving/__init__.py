"""The engine for many callers at once: an asynchronous front, and the core in a process of its own."""

from engine.extensions.serving.async_llm import AsyncLLM

__all__ = ["AsyncLLM"]
