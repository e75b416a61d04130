"""NVIDIA GPUs as a platform, through torch's CUDA builds."""

from __future__ import annotations

import os
from typing import Any

import torch

from engine_sdk import (
    CompilerOptions,
    DeviceInfo,
    ExpertsMethod,
    ExpertsSpec,
    GraphRuntime,
    GroupedExperts,
    Probe,
    TorchGraphs,
    TorchPlatform,
)


class CudaPlatform(TorchPlatform):
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

    def __init__(self, device_index: int = 0) -> None:
        super().__init__(device_index)
        # It would build a plan for every new length, and a decode has a new one at every step: on an H200 the first
        # 32 requests of a 0.6B model took 12.3 s with it and 2.8 s without, later ones 3.5 to 4.0 s and 2.8 s.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        """Grouped products where torch has kernels for them: bf16 from compute capability 8.0 on."""
        if spec.dtype is torch.bfloat16 and torch.cuda.get_device_capability(self.device_index) >= (8, 0):
            return GroupedExperts(spec)
        return super().experts(spec)

    def graphs(self) -> GraphRuntime | None:
        """CUDA graphs."""
        return super().graphs() or CudaGraphs(self.device())

    def compiler(self) -> CompilerOptions | None:
        """Torch's own compiler, whose kernels are Triton's."""
        return CompilerOptions()


class CudaGraphs(TorchGraphs):
    """CUDA graphs as every torch has them; before 2.13 there is no device-neutral class."""

    def _begin(self, pool: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(*(() if pool is None else (pool,)))
        return graph
