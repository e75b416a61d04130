"""Safetensors files: what tensors a folder holds, and their bytes, read where they are wanted.

The format is 8 bytes of header length (little endian), a JSON header, then the bytes of the tensors. A tensor is read
into memory, or mapped: its pages are the system's, which reads them when they are used, keeps one copy for all
processes, and takes them back where memory is short. Who shortens the file then ends the process (SIGBUS).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from engine.errors import CheckpointError

_HEADER_LIMIT = 100 << 20  # the format's own limit
_READ_AHEAD = 128 << 10  # what the system reads at once, unless it is told otherwise

_NETWORK = "9p afs beegfs ceph cifs fuse glusterfs gpfs lustre nfs nfs4 smb3 smbfs"
"""Kinds of file systems, as Linux calls them, that are slow to read page by page, and may be gone when that is due."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype, shape and the bytes ``[begin, end)``."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self, target: Tensor, at: int = 0) -> None:
        """Fill `target` (contiguous, on the host, this dtype) with the elements from `at` on."""
        view = memoryview(target.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.begin + at * self.dtype.itemsize)
                while len(view):
                    if not (count := file.readinto(view)):
                        raise CheckpointError(f"{self.file} ends inside tensor {self.name!r}; download it again")
                    view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{self.file}, tensor {self.name!r}: {error}; check the disk") from error

    def mapped(self) -> Tensor:
        """The tensor where it lies in the file: only what is used is read. Changes do not reach the file."""
        start = self.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.file, "rb") as file:
                data = mmap.mmap(file.fileno(), self.end - start, offset=start, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # a value: the file is shorter by now
            raise CheckpointError(f"{self.file}, tensor {self.name!r}: {error}; check the disk") from error
        count = math.prod(self.shape)
        return torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.begin - start).view(self.shape)

    def read_ahead(self) -> None:
        """Have the system read the tensor by the time that it is used, if it is not in memory; does not wait."""
        with suppress(OSError), open(self.file, "rb") as file:
            for begin in range(self.begin, self.end, _READ_AHEAD):
                os.posix_fadvise(file.fileno(), begin, min(_READ_AHEAD, self.end - begin), os.POSIX_FADV_WILLNEED)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin

    def load(self) -> Tensor:
        """The tensor, on the host."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read(tensor)
        return tensor


def read_index(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder's safetensors files, by name; reads headers only.

    Raises `CheckpointError` naming the file that is missing, incomplete or damaged.
    """
    return {entry.name: entry for file in _files(folder) for entry in _read_header(file)}


def is_remote(file: Path, root: Path = Path("/")) -> bool:
    """Whether a file comes over a network, or from a program, as far as Linux says.

    Args:
        file: it, or a link to it.
        root: where ``proc`` is.
    """
    device = file.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    kinds = (fields[fields.index("-") + 1] for fields in mounts if fields[2] == number)
    return next(kinds, "").partition(".")[0] in _NETWORK.split()


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}; download it again") from error
        if missing := [name for name in names if not (folder / name).exists()]:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists; download them")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    others = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.gguf")))
    raise CheckpointError(
        f"{folder} has no *.safetensors file"
        + (f", only {', '.join(others)}; convert it: load it with Transformers and save_pretrained()" if others else "")
        + "; for random weights use load_format='dummy'"
    )


def _read_header(file: Path) -> Iterator[Entry]:
    damaged = "download it again"
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(f"{file} is no safetensors file, or is truncated; {damaged}")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; {damaged}") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            begin, end = 8 + length + begin, 8 + length + end
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} describes tensor {name!r} wrongly: {error!r}; {damaged}") from error
        if (dtype := str_to_torch_dtype.get(kind)) is None:
            raise CheckpointError(f"{file}: tensor {name!r} has dtype {kind}, which is not supported")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{file}: tensor {name!r} has a shape that does not fit its bytes; {damaged}")
        if end > size:
            raise CheckpointError(f"{file} is truncated: tensor {name!r} ends at byte {end} of {size}; {damaged}")
        yield Entry(file, name, dtype, shape, begin, end)


def pieces(flat: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of at most `step` elements, each with the index where it begins."""
    return ((begin, flat[begin : begin + step]) for begin in range(0, flat.numel(), step))
