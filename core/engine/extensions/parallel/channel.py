"""From the driver to its ranks: one message, written once into shared memory, read by all.

    | read by rank 0, 1, ... | collectives entered by rank 0, 1, ... | slot 0 | slot 1 | ...      slot: size, more, data

The memory has no name, and each reader's bell is a file descriptor, so nothing is left behind when processes end, in
whatever way. A writer waits for a slot until all have read what was in it. Messages longer than a slot take several.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable

_SLOTS = 16
_SLOT_BYTES = 256 << 10
_HEAD = struct.Struct("=II")  # bytes in the slot; whether the message goes on in the next one
_BODY = _SLOT_BYTES - _HEAD.size
_PAGE = 4096


class Memory:
    """The memory, and counters in it that their rank alone writes.

    Args:
        fd: of the memory.
        num_ranks: readers.
    """

    def __init__(self, fd: int, num_ranks: int) -> None:
        assert 16 * num_ranks <= _PAGE, "the counters fill a page"
        self._map = mmap.mmap(fd, _PAGE + _SLOTS * _SLOT_BYTES)
        counters = memoryview(self._map)[:_PAGE].cast("Q")
        self.done, self.entered = counters[:num_ranks], counters[num_ranks : 2 * num_ranks]

    @staticmethod
    def create() -> int:
        """The file descriptor of new memory."""
        fd = os.memfd_create("engine-ranks", 0)
        os.ftruncate(fd, _PAGE + _SLOTS * _SLOT_BYTES)
        return fd

    def slot(self, number: int) -> memoryview:
        """The slot that the `number`-th write since the start uses."""
        begin = _PAGE + number % _SLOTS * _SLOT_BYTES
        return memoryview(self._map)[begin : begin + _SLOT_BYTES]


class Writer:
    """The driver's end.

    Args:
        memory: shared with the readers.
        bells: a semaphore (`os.eventfd`) a reader.
    """

    def __init__(self, memory: Memory, bells: list[int]) -> None:
        self._memory, self._bells = memory, bells
        self._written = 0

    def send(self, data: bytes, waiting: Callable[[], None] = lambda: None) -> None:
        """Give `data` to all readers; `waiting` is called while it waits for them, and may raise."""
        for begin in range(0, max(1, len(data)), _BODY):
            part = data[begin : begin + _BODY]
            while self._written - min(self._memory.done) >= _SLOTS:
                waiting()
                time.sleep(0.0005)
            slot = self._memory.slot(self._written)
            _HEAD.pack_into(slot, 0, len(part), begin + _BODY < len(data))
            slot[_HEAD.size : _HEAD.size + len(part)] = part
            self._written += 1
            for bell in self._bells:
                os.eventfd_write(bell, 1)


class Reader:
    """A rank's end."""

    def __init__(self, memory: Memory, bell: int, rank: int) -> None:
        self._memory, self._bell, self._rank = memory, bell, rank

    def receive(self) -> bytes:
        """The next message; waits for it."""
        parts = []
        while True:
            os.eventfd_read(self._bell)
            number = self._memory.done[self._rank]
            slot = self._memory.slot(number)
            size, more = _HEAD.unpack_from(slot, 0)
            parts.append(bytes(slot[_HEAD.size : _HEAD.size + size]))
            self._memory.done[self._rank] = number + 1
            if not more:
                return b"".join(parts)
