"""``--platform torch:DEVICE``: the defaults in plain torch on any device that torch drives, without a plugin."""

from __future__ import annotations

import re

import torch

from engine.errors import PlatformNotFoundError
from engine.interfaces import CONTRACT
from engine_sdk.platform import TorchPlatform


def torch_platform(device_type: str) -> type[TorchPlatform]:
    """The platform ``torch:DEVICE`` for a device type of torch's, whether or not there is such a device here.

    Raises:
        PlatformNotFoundError: this torch has no such type; the message lists those that it has.
    """
    name = f"torch:{device_type}"
    try:
        device = torch.device(device_type or "none")  # an empty word gets another message
    except RuntimeError as error:
        raise PlatformNotFoundError(
            f"{name}: torch {torch.__version__} has no device type {device_type!r}\nusable here: {_usable()}\n"
            f"known to torch: {_known(error)}\nremedy: name one of them, or install the torch extension of the device"
        ) from error
    if device.index is not None:
        raise PlatformNotFoundError(
            f"{name}: a device type is expected, and this is one device\n"
            f"remedy: --platform torch:{device.type} --device-index {device.index}"
        )
    attributes = {"name": name, "device_type": device_type, "contract": CONTRACT, "__doc__": f"Torch's {device_type}."}
    return type("AnyDevicePlatform", (TorchPlatform,), attributes)


def _usable() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ", ".join(f"torch:{d.type}" for d in (accelerator, torch.device("cpu")) if d)


def _known(error: RuntimeError) -> str:
    # Torch lists its device types nowhere but in this message.
    found = re.search("one of (.*?) device type", str(error))
    return found[1] if found else "see https://docs.pytorch.org/docs/stable/tensor_attributes.html#torch.device"
