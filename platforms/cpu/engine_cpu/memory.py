"""The host's memory: what steps free is kept for the next step, since fresh pages are cleared when first touched."""

from __future__ import annotations

import ctypes

from torch import Tensor

from engine_sdk import TorchMemory

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST = 32 << 20  # of what comes from the heap, and the most that glibc allows
_KEPT = 1 << 30


class HostMemory(TorchMemory):
    """Memory as torch has it, with an allocator that holds on to what a step used, up to 1 GiB."""

    def allocate(self, nbytes: int) -> Tensor:
        """See `MemoryManager.allocate`.

        A cache is made when the model is loaded, so what is freed from now on is activations. Weights that were freed
        before, once packed, went back to the system.
        """
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(_MMAP_THRESHOLD, _LARGEST)
            mallopt(_TRIM_THRESHOLD, _KEPT)
        return super().allocate(nbytes)
