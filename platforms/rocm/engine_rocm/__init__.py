"""AMD GPUs as a platform, through torch's ROCm builds. Written from the documentation: it has not run on hardware.

What differs from one GPU to another is data: here by its architecture, and how kernels are cut by what Triton's driver
says of its cores, memory and wavefront, in `engine_sdk.triton.tuning`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine_sdk import Capabilities, DeviceInfo, GraphRuntime, PlatformUnavailableError, Probe, TorchGraphs
from engine_sdk.triton.platform import TritonPlatform

_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
_KFD = Path("/dev/kfd")
_VISIBLE = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""What hides GPUs; HIP reads the last one too (https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html)."""

_FNUZ = frozenset((torch.float8_e4m3fnuz, torch.float8_e5m2fnuz))
_OCP = frozenset((torch.float8_e4m3fn, torch.float8_e5m2))
FLOATS8 = {"gfx940": _FNUZ, "gfx941": _FNUZ, "gfx942": _FNUZ, "gfx950": _OCP, "gfx1200": _OCP, "gfx1201": _OCP}
"""8-bit floats that an architecture converts; others have none.

CDNA 3 has those without infinity and negative zero, CDNA 4 and RDNA 4 those of the Open Compute Project
(https://rocm.docs.amd.com/en/latest/reference/precision-support.html).
"""


class RocmPlatform(TritonPlatform):
    """One AMD GPU. Torch's ROCm builds call their device ``cuda``, and RCCL, their collectives, ``nccl``."""

    name = "rocm"
    device_type = "cuda"
    contract = "1.0"
    cluster_resource = "GPU"

    @classmethod
    def probe(cls) -> Probe:
        """Count GPUs without a context on any; the kernel driver knows their architectures."""
        if torch.version.hip is None:
            built = "for CUDA, whose platform is cuda" if torch.version.cuda else "without ROCm"
            return Probe(
                False,
                f"torch {torch.__version__} was built {built}: "
                "pip install torch --index-url https://download.pytorch.org/whl/rocm7.2",
            )
        if not (count := torch.cuda.device_count()):
            return Probe(False, _why_none())
        names, built_for = list(architectures()), _built_for()
        if names and built_for and not built_for & set(names):
            return Probe(
                False,
                f"torch {torch.__version__} has no kernels for {', '.join(sorted(set(names)))}, only for "
                f"{', '.join(sorted(built_for))}: install a build of torch for this architecture",
            )
        if len(names) != count:  # some are hidden, and which is not known here
            names = [f"AMD GPU {i}" for i in range(count)]
        return Probe(True, devices=tuple(DeviceInfo(i, name) for i, name in enumerate(names)))

    def capabilities(self) -> Capabilities:
        """What the kernels can do, and caches of 8-bit floats in the architecture's own format."""
        return self._capabilities

    @functools.cached_property
    def _capabilities(self) -> Capabilities:
        try:
            architecture = torch.cuda.get_device_properties(self.device_index).gcnArchName.partition(":")[0]
        except RuntimeError as error:
            raise PlatformUnavailableError(
                f"GPU {self.device_index} cannot be used: {error}\nremedy: check that rocminfo lists it, and that the "
                f"driver is one for ROCm {torch.version.hip}"
            ) from error
        declared = super().capabilities()
        return dataclasses.replace(declared, kv_dtypes=declared.kv_dtypes | FLOATS8.get(architecture, frozenset()))

    def graphs(self) -> GraphRuntime | None:
        """HIP graphs."""
        return HipGraphs(self.device())


class HipGraphs(TorchGraphs):
    """HIP graphs, which torch's ROCm builds call CUDA graphs.

    Since ROCm 7.0 a call that may not be captured ends every capture of the process, whichever thread makes it, as in
    CUDA. A thread of `torch.distributed` asks RCCL's events all the time, so only calls of the capturing thread count
    (https://github.com/ROCm/rccl/issues/2022).
    """

    def _begin(self, pool: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool, capture_error_mode="thread_local")
        return graph


def architectures(topology: Path = _TOPOLOGY) -> Iterator[str]:
    """Names like ``gfx942`` of the GPUs that the kernel's compute driver lists.

    ``gfx_target_version`` is 10000 * major + 100 * minor + stepping, and 0 for processors; the name writes minor and
    stepping in hexadecimal (Linux, drivers/gpu/drm/amd/amdkfd).
    """
    for node in sorted(topology.glob("*/properties"), key=lambda path: int(path.parent.name)):
        values = dict(line.split(maxsplit=1) for line in node.read_text().splitlines() if " " in line)
        if version := int(values.get("gfx_target_version", 0)):
            yield f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _built_for() -> set[str]:
    """Architectures that torch has kernels for, ``gfx90a`` for ``gfx90a:xnack-``; empty where it does not say."""
    return {name.partition(":")[0] for name in torch.cuda.get_arch_list()}


def _why_none() -> str:
    """Why torch sees no GPU, and what to do."""
    said = [f"{name} is {os.environ[name]!r}" for name in _VISIBLE if name in os.environ]
    shown = " and ".join(said) or f"{_VISIBLE[0]} is not set"
    if not _KFD.exists():
        remedy = "load the amdgpu driver, which makes /dev/kfd; a container needs --device /dev/kfd --device /dev/dri"
    elif not os.access(_KFD, os.R_OK | os.W_OK):
        remedy = "this user may not open /dev/kfd: add it to the groups render and video, and log in again"
    elif said:
        remedy = "name GPUs there that rocminfo lists, or unset it"
    else:
        remedy = "check that rocminfo lists one, and that this user may open /dev/dri"
    return f"no AMD GPU is visible; {shown}: {remedy}"
