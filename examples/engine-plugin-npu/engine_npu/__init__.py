"""NPU accelerators as a platform of the engine."""

from engine_npu.platform import NpuPlatform

__all__ = ["NpuPlatform"]
