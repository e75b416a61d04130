"""NVIDIA GPUs as a platform, through torch's CUDA builds."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine_sdk import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    DeviceInfo,
    GraphRuntime,
    PlatformUnavailableError,
    Probe,
    TorchGraphs,
)
from engine_sdk.platform import require_attention
from engine_sdk.triton.platform import TritonPlatform

if TYPE_CHECKING:
    from engine_cuda.hopper import HopperAttention

log = logging.getLogger(__name__)

_GLUON = "3.6.", "3.7."  # releases of Triton that `hopper_kernel` is written for
_GPUS = Path("/proc/driver/nvidia/gpus")
_FLOATS8 = frozenset((torch.float8_e4m3fn, torch.float8_e5m2))


class CudaPlatform(TritonPlatform):
    """One NVIDIA GPU."""

    name = "cuda"
    device_type = "cuda"
    contract = "1.0"
    _collectives_capturable = True
    cluster_resource = "GPU"

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
        # A driver runs everything that was built for its own major version of CUDA, or for an older one
        # (https://docs.nvidia.com/deploy/cuda-compatibility).
        driver = driver_version()
        if driver and driver[0] < int(torch.version.cuda.partition(".")[0]):
            return Probe(
                False,
                f"the NVIDIA driver is too old: it runs CUDA up to {driver[0]}.{driver[1]}, and torch "
                f"{torch.__version__} was built for CUDA {torch.version.cuda}: update the driver, or install a build "
                f"of torch for CUDA {driver[0]} (https://pytorch.org/get-started/locally)",
            )
        if not (count := torch.cuda.device_count()):
            return Probe(False, _why_none(driver))
        return Probe(True, devices=tuple(DeviceInfo(i, f"NVIDIA GPU {i}") for i in range(count)))

    def capabilities(self) -> Capabilities:
        """What the kernels can do, and caches of 8-bit floats from compute capability 8.9 on, which converts them."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        try:
            capability = torch.cuda.get_device_capability(self.device_index)
        except RuntimeError as error:
            raise PlatformUnavailableError(
                f"GPU {self.device_index} cannot be used: {error}\nremedy: check that nvidia-smi lists it without an "
                f"error, and that the driver is one for CUDA {torch.version.cuda}"
            ) from error
        declared = super().capabilities()
        return dataclasses.replace(
            declared, kv_dtypes=declared.kv_dtypes | (_FLOATS8 if capability >= (8, 9) else frozenset())
        )

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """A `HopperAttention` where the GPU is one and the layer suits it, else what every Triton platform has."""
        declared = self.capabilities()
        if torch.cuda.get_device_capability(self.device_index)[0] == 9 and (hopper := _hopper()) and hopper.suits(spec):
            require_attention(declared, spec)
            return hopper(spec, declared=declared)
        return super().attention(spec)

    def graphs(self) -> GraphRuntime | None:
        """CUDA graphs."""
        return super().graphs() or CudaGraphs(self.device())


@functools.cache
def _hopper() -> type[HopperAttention] | None:
    """`HopperAttention`; its kernel is in Gluon, a part of Triton that is experimental and differs between releases."""
    import triton

    if not triton.__version__.startswith(_GLUON):
        log.debug("prompts go to Triton's kernel: Triton %s is none of %s", triton.__version__, ", ".join(_GLUON))
        return None
    from engine_cuda.hopper import HopperAttention

    return HopperAttention


class CudaGraphs(TorchGraphs):
    """CUDA graphs as every torch has them; before 2.13 there is no device-neutral class."""

    def _begin(self, pool: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(*(() if pool is None else (pool,)))
        return graph


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, ``(13, 0)``; None where there is no driver. Initialises nothing."""
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _why_none(driver: tuple[int, int] | None) -> str:
    """Why torch sees no GPU, and what to do."""
    visible, present = os.environ.get("CUDA_VISIBLE_DEVICES"), len(list(_GPUS.glob("*")))
    shown = "is not set" if visible is None else f"is {visible!r}"
    if present and visible is not None:
        remedy = f"the machine has {present}: unset it, or name some of 0 to {present - 1}"
    elif present and driver is None:
        remedy = "libcuda.so.1 is not here: install the driver's libraries; a container is started with --gpus all"
    else:
        remedy = "check that nvidia-smi lists one and, in a container, that it was started with --gpus all"
    return f"no NVIDIA GPU is visible; CUDA_VISIBLE_DEVICES {shown}: {remedy}"
