"""A simulated accelerator for PyTorch: what a vendor ships as a driver and an extension of torch.

`npu_sim.driver` answers without touching a device. `load()` compiles the device's code on first use, and registers it
with torch as ``"npu"`` and ``torch.npu``.
"""

from npu_sim.kernels import kernel
from npu_sim.loading import load

__all__ = ["kernel", "load"]
