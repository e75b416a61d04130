"""The host's memory: fresh pages are cleared when they are first written, and where a machine is virtual its host has
to find them, so they are written ahead, or kept once they were.

    weights      the first 2 GiB | packed 0 | packed 1 | ... | written by a thread while modules are imported |
                 then, 64 MiB and more at a time | packed n | packed n + 1 | ...
    activations  what steps free is kept for the next step
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

from engine_cpu.layout import ceil_to
from engine_sdk import TorchMemory
from engine_sdk.memory import fresh_pages

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST = 32 << 20  # of what comes from the heap, and the most that glibc allows
_KEPT = 1 << 30

_LINE, _LARGE_PAGE = 64, 2 << 20
_SLAB = 64 << 20
"""Bytes of large pages that are asked for at a time, which weights share. What nobody takes is never touched."""
_MOST_AHEAD = 2 << 30
"""Bytes that are written before anybody knows what of the weights will be packed."""
_AT_ONCE = 16 << 20
"""Bytes between two looks at whether to go on: often enough not to be waited for, seldom enough not to ask for Python's
lock all the time."""


class HostMemory(TorchMemory):
    """Memory as torch has it, with large pages for weights, written ahead, and an allocator that holds on to what a
    step used, up to 1 GiB."""

    _slab: Slab | None = None

    def expect(self, nbytes: int) -> None:
        """See `MemoryManager.expect`. A machine with little memory that is free waits until it is needed."""
        self._end()
        nbytes = min(nbytes, _MOST_AHEAD)
        if 0 < nbytes <= self._device.memory_info().free // 2:
            with suppress(OSError):  # no such range of addresses: then there is nothing ahead
                self._slab = Slab(nbytes, ahead=True)

    def for_weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor, not initialised, of what was written ahead, and of other large pages once that is used up."""
        part = None if self._slab is None else self._slab.take(shape, dtype)
        if part is None:
            self._end()
            try:
                self._slab = Slab(max(_nbytes(shape, dtype), _SLAB))
            except OSError:  # torch says how much was wanted, or finds it elsewhere
                return torch.empty(shape, dtype=dtype)
            part = self._slab.take(shape, dtype)
            assert part is not None
        return part

    def kv_budget(self, fraction: float) -> int:
        """See `MemoryManager.kv_budget`. All weights are packed by now, so what is left was not needed."""
        self._end()
        return super().kv_budget(fraction)

    def allocate(self, nbytes: int) -> Tensor:
        """See `MemoryManager.allocate`.

        A cache is made when the model is loaded, so what is freed from now on is activations. Weights that were freed
        before, once packed, went back to the system.
        """
        self._end()
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(_MMAP_THRESHOLD, _LARGEST)
            mallopt(_TRIM_THRESHOLD, _KEPT)
        return super().allocate(nbytes)

    def _end(self) -> None:
        if self._slab is not None:
            self._slab.end()
            self._slab = None


class Slab:
    """A range of large pages, of which tensors take one part after the other.

    Args:
        nbytes: of all that can be taken. Raises `OSError` where there are no addresses for it.
        ahead: a thread of its own writes the pages, in order, until the first is taken. Whoever takes finds them
            there, or is the one to write them.
    """

    def __init__(self, nbytes: int, *, ahead: bool = False) -> None:
        nbytes = ceil_to(nbytes, _LARGE_PAGE)
        self._pages = fresh_pages(nbytes + _LARGE_PAGE)
        whole = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._begin = -whole.data_ptr() % _LARGE_PAGE
        self._bytes = whole[self._begin : self._begin + nbytes]
        self._taken = 0
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._write, name="memory ahead") if ahead else None
        if self._writer:
            self._writer.start()

    def _write(self) -> None:
        for part in self._bytes.split(_AT_ONCE):
            if self._stop.is_set() or not threading.main_thread().is_alive():  # a command may end early
                return
            part[:: mmap.PAGESIZE].zero_()  # without Python's lock; a large page is there after its first byte

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The next part, not initialised, which may be written from now on; None where it does not fit any more."""
        self._settle()
        flat, nbytes = self._bytes[self._taken :], _nbytes(shape, dtype)
        if nbytes > len(flat):
            return None
        self._taken += ceil_to(nbytes, _LINE)
        return flat[:nbytes].view(dtype).view(shape)

    def end(self) -> None:
        """Give what was not taken back to the system."""
        self._settle()
        rest = ceil_to(self._begin + self._taken, mmap.PAGESIZE)
        if hasattr(mmap, "MADV_DONTNEED") and rest < len(self._pages):
            self._pages.madvise(mmap.MADV_DONTNEED, rest)

    def _settle(self) -> None:
        """Have the thread write nothing any more."""
        self._stop.set()
        if self._writer:
            self._writer.join()


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
