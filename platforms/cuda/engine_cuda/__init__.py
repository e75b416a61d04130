"""NVIDIA GPUs as a platform, through torch's CUDA builds."""

from __future__ import annotations

import os
from typing import Any

import torch

from engine_sdk import (
    DeviceInfo,
    GraphRuntime,
    Probe,
    TorchGraphs,
)
from engine_sdk.triton.platform import TritonPlatform


class CudaPlatform(TritonPlatform):
    """One NVIDIA GPU."""

    name = "cuda"
    device_type = "cuda"
    contract = "1.0"

    @classmethod
    def probe(cls) -> Probe:
        """Count GPUs through the driver's management library, which leaves CUDA itself uninitialised."""
        if torch.version.cuda is None:
            built = "for ROCm, whose platform is rocm" if torch.version.hip else "without CUDA"
            return Probe(
                False,
                f"torch {torch.__version__} was built {built}: "
                "pip install torch --index-url https://download.pytorch.org/whl/cu130",
            )
        if not (count := torch.cuda.device_count()):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            shown = "is not set" if visible is None else f"is {visible!r}"
            return Probe(
                False,
                f"no NVIDIA GPU is visible; CUDA_VISIBLE_DEVICES {shown}: "
                "check that nvidia-smi lists one and, in a container, that it was started with --gpus all",
            )
        return Probe(True, devices=tuple(DeviceInfo(i, f"NVIDIA GPU {i}") for i in range(count)))

    def graphs(self) -> GraphRuntime | None:
        """CUDA graphs."""
        return super().graphs() or CudaGraphs(self.device())


class CudaGraphs(TorchGraphs):
    """CUDA graphs as every torch has them; before 2.13 there is no device-neutral class."""

    def _begin(self, pool: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(*(() if pool is None else (pool,)))
        return graph
