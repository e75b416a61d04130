"""What the driver knows of the devices: nothing here imports torch or starts a device.

The chip is made of environment variables: ``NPU_SIM_DEVICES`` (2), ``NPU_SIM_MEMORY`` (bytes of each, 2 GiB) and
``NPU_SIM_GENERATION`` (2; the first has no bfloat16).
"""

from __future__ import annotations

import os
import shutil


def device_count() -> int:
    """Devices of this host."""
    return int(os.environ.get("NPU_SIM_DEVICES", "2"))


def total_memory() -> int:
    """Bytes of each device."""
    return int(os.environ.get("NPU_SIM_MEMORY", str(2 << 30)))


def generation() -> int:
    """Of the chips."""
    return int(os.environ.get("NPU_SIM_GENERATION", "2"))


def compiler() -> str | None:
    """The C++ compiler that builds the device's code on first use; ``CXX`` names another than ``g++``."""
    return shutil.which(os.environ.get("CXX", "g++"))
