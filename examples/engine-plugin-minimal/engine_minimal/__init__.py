"""A platform in ten lines. Its "device" is the host's processor, so it runs everywhere."""

from engine_sdk import TorchPlatform


class MinimalPlatform(TorchPlatform):
    """Everything is the default in plain torch."""

    name = "minimal"  # what --platform selects: the entry point's name
    device_type = "cpu"  # torch's name of the device
    contract = "1.0"  # the version of the contract that this was written for
