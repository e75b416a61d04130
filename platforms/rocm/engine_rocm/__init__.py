"""AMD GPUs as a platform, through torch's ROCm builds. Written from the documentation: it has not run on hardware."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from engine_sdk import DeviceInfo, Probe
from engine_sdk.triton.platform import TritonPlatform

_TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")


class RocmPlatform(TritonPlatform):
    """One AMD GPU. Torch's ROCm builds call their device ``cuda``, and their collectives ``nccl``."""

    name = "rocm"
    device_type = "cuda"
    contract = "1.0"

    @classmethod
    def probe(cls) -> Probe:
        """Count GPUs without initialising HIP; the kernel driver knows their architectures."""
        if torch.version.hip is None:
            built = "for CUDA, whose platform is cuda" if torch.version.cuda else "without ROCm"
            return Probe(
                False,
                f"torch {torch.__version__} was built {built}: "
                "pip install torch --index-url https://download.pytorch.org/whl/rocm7.2",
            )
        if not (count := torch.cuda.device_count()):
            visible = os.environ.get("HIP_VISIBLE_DEVICES")
            shown = "is not set" if visible is None else f"is {visible!r}"
            return Probe(
                False,
                f"no AMD GPU is visible; HIP_VISIBLE_DEVICES {shown}: check that rocminfo lists one and that this user "
                "may open /dev/kfd and /dev/dri",
            )
        names = list(architectures())
        if len(names) != count:  # some are hidden, and which is not known here
            names = [f"AMD GPU {i}" for i in range(count)]
        return Probe(True, devices=tuple(DeviceInfo(i, name) for i, name in enumerate(names)))


def architectures(topology: Path = _TOPOLOGY) -> Iterator[str]:
    """Names like ``gfx942`` of the GPUs that the kernel's compute driver lists.

    ``gfx_target_version`` is 10000 * major + 100 * minor + stepping, and 0 for processors; the name writes minor and
    stepping in hexadecimal (Linux, drivers/gpu/drm/amd/amdkfd).
    """
    for node in sorted(topology.glob("*/properties"), key=lambda path: int(path.parent.name)):
        values = dict(line.split(maxsplit=1) for line in node.read_text().splitlines() if " " in line)
        if version := int(values.get("gfx_target_version", 0)):
            yield f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
