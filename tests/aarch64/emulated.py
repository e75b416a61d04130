"""The kernels of the host's platform built for aarch64, and run under qemu on this process's tensors.

`Emulated` stands in for the `ctypes.CDLL` of a build, so that the tests of other instruction sets serve as they are.
Run as a program, ``emulated.py FOLDER FLAGS...``, it does them all.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_cpu import native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian's packages have the loader and the libraries of aarch64
_PAGE, _TAKEN = 4096, 3  # the same as in driver.cpp


def build(folder: Path, *flags: str) -> list[str]:
    """Compile the kernels, with the flags that all builds of theirs have and `flags`; the command that serves them."""
    driver, kernels = folder / "driver", folder / "kernels.so"
    sources = [str(source) for source in native.SOURCES.glob("*.cpp")]
    subprocess.run([COMPILER, *native._FLAGS, *flags, *sources, "-o", str(kernels)], check=True)
    subprocess.run([COMPILER, "-O1", "-w", str(Path(__file__).parent / "driver.cpp"), "-o", str(driver)], check=True)
    return [EMULATOR, "-L", LIBRARIES, "-cpu", "max", str(driver), str(kernels)]


class Emulated:
    """Kernels by name, as attributes. Nothing else may happen in this process while one runs."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: Any = None
        self._memory = os.open("/proc/self/mem", os.O_RDWR)

    def __getattr__(self, name: str) -> Any:
        kernel = _Kernel(self, name)
        setattr(self, name, kernel)
        return kernel

    def call(self, name: str, words: list[int], floats: list[float]) -> int:
        """What a kernel gives. Raises `OSError` where it touches what is not there, or ends the emulator."""
        while True:
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
                )
                self._read(9)  # it is there
                if self._meet():  # where it lies is chosen at random
                    self.close()
                    continue
            try:
                words += [0] * (16 - len(words))
                floats += [0.0] * (2 - len(floats))
                return self._serve(struct.pack("<32s16Q2f", name.encode(), *words, *floats))
            except EOFError:
                if (code := self._process.wait()) != _TAKEN:
                    raise OSError(f"{name}: the emulator ended with {code}") from None
                self.close()

    def close(self) -> None:
        """End the emulator."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _serve(self, message: bytes) -> int:
        self._process.stdin.write(message)
        changes = []  # are made once it is sure that the call ends
        while True:
            kind, word = struct.unpack("<cQ", self._read(9))
            if kind == b"p":
                self._process.stdin.write(os.pread(self._memory, _PAGE, word))
            elif kind == b"w":
                changes.append((word, self._read(*struct.unpack("<Q", self._read(8)))))
            else:
                for address, data in changes:
                    os.pwrite(self._memory, data, address)
                return int(word)

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            if not (more := self._process.stdout.read(count - len(found))):
                raise EOFError
            found += more
        return found

    def _meet(self) -> bool:
        """Whether some address is in use by both processes."""
        theirs = list(_ranges(self._process.pid))
        return any(a < d and c < b for a, b in _ranges(os.getpid()) for c, d in theirs)


def _ranges(process: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        if not line.endswith("[vsyscall]"):
            begin, end = line.split()[0].split("-")
            yield int(begin, 16), int(end, 16)


class _Kernel:
    """One of them, to be called like a function of `ctypes`."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, library: Emulated, name: str) -> None:
        self._library, self._name = library, name

    def __call__(self, *arguments: Any) -> int | None:
        floats = [x for x in arguments if isinstance(x, float)]
        words = [_word(x) for x in arguments if not isinstance(x, float)]
        result = self._library.call(self._name, words, floats)
        return None if self.restype is None else int(self.restype(result).value)


def _word(value: Any) -> int:
    """An integer, an address, None for no address, packed bytes, or what `ctypes.byref` made."""
    if isinstance(value, bytes):
        value = ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value
    elif value is not None and not isinstance(value, int):
        value = ctypes.addressof(value._obj)
    return (value or 0) % (1 << 64)


def main(folder: str, *flags: str) -> None:
    """All that other instruction sets are tested with."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    kernels = Emulated(build(Path(folder), *flags))
    importlib.import_module("test_cpu").check_all(kernels)
    kernels.close()
    print("all is well")


if __name__ == "__main__":
    main(*sys.argv[1:])
