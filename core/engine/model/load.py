"""Weights: from safetensors files straight into their final storage.

Headers are read first, data later, each tensor once: into place where dtype and device agree, through a small staging
buffer otherwise. What Transformers renames or merges when it reads a checkpoint is honoured.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from engine.errors import CheckpointError
from engine.interfaces import Device

_STAGING_BYTES = 16 << 20
_THREADS = 4
_HEADER_LIMIT = 100 << 20  # the format's own limit

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
        view = memoryview(target.reshape(-1).view(torch.uint8).numpy())
        position = self.begin + at * self.dtype.itemsize
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(position)
                while len(view):
                    if not (count := file.readinto(view)):
                        raise CheckpointError(f"{self.file} ends inside tensor {self.name!r}; download it again")
                    view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{self.file}, tensor {self.name!r}: {error}; check the disk") from error

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
    files = _files(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        entries.update(_read_header(file))
    return entries


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


def _read_header(file: Path) -> Iterator[tuple[str, Entry]]:
    damaged = "download it again"
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(f"{file} is no safetensors file, or is truncated; {damaged}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} has a damaged header: {error}; {damaged}") from error
    data = 8 + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} describes tensor {name!r} wrongly: {error!r}; {damaged}") from error
        if kind not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {name!r} has dtype {kind}, which is not supported")
        dtype = _DTYPES[kind]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{file}: tensor {name!r} has a shape that does not fit its bytes; {damaged}")
        if data + end > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {name!r} ends at byte {data + end} of {size}; {damaged}"
            )
        yield name, Entry(file, name, dtype, shape, data + begin, data + end)


def load_weights(
    model: PreTrainedModel, entries: Mapping[str, Entry], device: Device, *, progress: bool = False
) -> None:
    """Fill the parameters and persistent buffers of `model`, which have their final storage, from a checkpoint.

    Needs, beyond the weights, the staging buffers and the sources of one merged tensor at a time.

    Raises `CheckpointError` naming the tensors that are missing, left over, or of another shape, and the reason.
    """
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
    work = _assign(model, entries, targets)
    local = threading.local()

    def fill(job: tuple[Entry, Tensor]) -> None:
        if not hasattr(local, "staging"):
            device.activate()
            local.staging = device.host_buffer((_STAGING_BYTES,), torch.uint8)
        _fill(*job, local.staging)
        bar.update(job[0].nbytes)

    bar = tqdm(total=work.nbytes, desc="Loading weights", unit="B", unit_scale=True, disable=None if progress else True)
    with bar, torch.no_grad(), ThreadPoolExecutor(_THREADS) as pool:
        loaded = {id(target) for _, target in work.direct}
        for name, converter in work.converted.items():
            for target, tensor in _converted(model, name, converter).items():
                _check(tensor, targets, target, "the checkpoint, converted")
                targets[target].copy_(tensor)
                loaded.add(id(targets[target]))
            bar.update(work.sizes[name])
        _check_complete(model, work, {name for name, target in targets.items() if id(target) not in loaded})
        jobs = sorted(work.direct, key=lambda job: (str(job[0].file), job[0].begin))
        for _ in pool.map(fill, jobs):
            pass
    device.synchronize()


@dataclass
class _Work:
    """What is to be read.

    Attributes:
        direct: entries that are one target as they are.
        converted: transforms that make targets of several entries, by their first target; `sizes` has their bytes.
        unexpected: entries that the model has no place for.
    """

    direct: list[tuple[Entry, Tensor]] = field(default_factory=list)
    converted: dict[str, WeightConverter] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    unexpected: set[str] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(entry.nbytes for entry, _ in self.direct) + sum(self.sizes.values())


def _assign(model: PreTrainedModel, entries: Mapping[str, Entry], targets: Mapping[str, Tensor]) -> _Work:
    """Find each entry's place under the renamings and conversions that Transformers has for the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    work = _Work()
    for source in sorted(entries, key=dot_natural_key):
        entry = entries[source]
        name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, targets)
        if name not in targets and source in targets:
            name, pattern = rename_source_key(source, [], [], model.base_model_prefix, targets)
        if name not in targets:
            work.unexpected.add(name)
        elif pattern is None:
            _check(entry, targets, name, str(entry.file))
            work.direct.append((entry, targets[name]))
        else:
            converter = work.converted.setdefault(name, deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, source, pattern, entry.load)
            work.sizes[name] = work.sizes.get(name, 0) + entry.nbytes
    return work


def _converted(model: PreTrainedModel, name: str, converter: WeightConverter) -> dict[str, Tensor]:
    """The targets that `converter` makes of the entries collected in it, read now."""
    try:
        made = converter.convert(name, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"the tensors that make {name!r} do not fit together: {error}; the checkpoint is damaged, or not of this model"
        ) from error
    return {target: t[0] if isinstance(t, list) else t for target, t in made.items()}


def _check(found: Entry | Tensor, targets: Mapping[str, Tensor], name: str, where: str) -> None:
    """Raise `CheckpointError` unless `found` can be stored as `name`."""
    if name not in targets:
        raise CheckpointError(f"{where} makes {name!r}, which the model does not have")
    target = targets[name]
    if tuple(found.shape) != tuple(target.shape):
        raise CheckpointError(
            f"{where}: {name!r} has shape {list(found.shape)}, and the model needs {list(target.shape)}; config.json and "
            "the weights are not of the same model"
        )
    if found.dtype != target.dtype and not (found.dtype.is_floating_point and target.dtype.is_floating_point):
        raise CheckpointError(f"{where}: {name!r} is {found.dtype}, and the model needs {target.dtype}")


def _check_complete(model: PreTrainedModel, work: _Work, missing: set[str]) -> None:
    """Raise `CheckpointError` for tensors that are missing or left over, but for those that Transformers ignores."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    keys = SimpleNamespace(missing_keys=missing - parameters, unexpected_keys=work.unexpected)
    model._adjust_missing_and_unexpected_keys(keys)
    missing = (missing & parameters) | keys.missing_keys
    for names, what in ((missing, "lacks"), (keys.unexpected_keys, "has, and the model does not,")):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(
                f"the checkpoint {what} {shown}; config.json and the weights are not of the same model, or a file is missing"
            )


def _fill(entry: Entry, target: Tensor, staging: Tensor) -> None:
    """Read `entry` into `target`: into place, or through `staging` (uint8, on the host) a piece at a time."""
    if target.device == staging.device and target.dtype == entry.dtype and target.is_contiguous():
        entry.read(target)
        return
    step = staging.numel() // entry.dtype.itemsize
    flat = target.view(-1)
    for begin in range(0, flat.numel(), step):
        piece = flat[begin : begin + step]
        host = staging[: piece.numel() * entry.dtype.itemsize].view(entry.dtype)
        entry.read(host, begin)
        piece.copy_(host)
