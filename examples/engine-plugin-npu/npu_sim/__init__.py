"""A simulated accelerator for PyTorch: what a vendor ships as a driver and as an extension of torch.

Importing it makes the name ``"npu"`` and ``torch.npu`` known. `load()` brings the device in, and compiles its code on
first use; `npu_sim.driver` answers without either.
"""

import torch
from torch.utils.backend_registration import rename_privateuse1_backend

from npu_sim import runtime
from npu_sim.kernels import kernel
from npu_sim.loading import load

__all__ = ["kernel", "load"]

rename_privateuse1_backend("npu")
torch._register_device_module("npu", runtime)
