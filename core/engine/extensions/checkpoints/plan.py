"""Weights: from a checkpoint straight into their final storage.

A plan is made and checked first, from headers alone: where each tensor belongs, what Transformers renames or merges,
what is missing. Once the model has its storage, every tensor is read once: into its place where dtype and device agree,
through a small staging buffer otherwise. On a host large tensors of the right dtype are not read: the model uses them
where they lie in the file.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import core_model_loading as hf
from transformers.conversion_mapping import get_model_conversion_mapping

from engine.errors import CheckpointError
from engine.extensions.checkpoints.files import Entry, is_remote, pieces, read_index
from engine.interfaces import Device
from engine.model.load import Cut, frozen

_STAGING_BYTES = 16 << 20
_LEAST_MAPPED = 1 << 20  # bytes; smaller tensors are not worth pages of their own
_THREADS = 4
_OTHER_MODEL = "config.json and the weights are not of the same model"


@dataclass(frozen=True)
class _Job:
    """Fill `target` with an entry: with all of it, if `target` is contiguous, or with ``[begin, end)`` along `dim`."""

    entry: Entry
    target: Tensor
    dim: int | None = None
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        share = 1 if self.dim is None else (self.end - self.begin) / self.entry.shape[self.dim]
        return int(self.entry.nbytes * share)


@dataclass
class _Merge:
    """Entries of which Transformers makes other tensors, by the patterns that matched their names."""

    converter: hf.WeightConverter
    sources: dict[str, list[Entry]] = field(default_factory=dict)

    def make(self, model: PreTrainedModel, name: str, load: Callable[[Entry], Tensor]) -> dict[str, Tensor]:
        """The tensors by the names of their places, the first of which is `name`."""
        converter: Any = deepcopy(self.converter)
        for pattern, entries in self.sources.items():
            for entry in entries:
                converter.add_tensor(name, entry.name, pattern, lambda entry=entry: load(entry))
        try:
            made = converter.convert(name, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            what = f"the tensors that make {name!r} do not fit together: {error}"
            raise CheckpointError(f"{what}; {_OTHER_MODEL}") from error
        return {target: t[0] if isinstance(t, list) else t for target, t in made.items()}

    def slices(self, target: Tensor, cut: Cut | None) -> list[_Job] | None:
        """Where each entry goes within `target`, if they are only stacked, and stacks joined; None otherwise."""
        stacked = [(hf.MergeModulelist, 0)], [(hf.MergeModulelist, 0), (hf.Concatenate, 1)]
        if [(type(op), getattr(op, "dim", None)) for op in self.converter.operations] not in stacked:
            return None
        jobs, begin = [], 0
        for entries in (self.sources[p] for p in self.converter.source_patterns if p in self.sources):
            rows = entries[0].shape[0]
            if cut is None:
                jobs += [_Job(entry, target[i].narrow(0, begin, rows)) for i, entry in enumerate(entries)]
            elif cut.dim == 0:
                kept = [index for span in cut.spans for index in range(*span)]
                jobs += [_Job(entries[i], target[at].narrow(0, begin, rows)) for at, i in enumerate(kept)]
            else:
                at, offset = cut.dim - 1, begin if cut.dim == 1 else 0
                for i, entry in enumerate(entries):
                    part = target[i] if cut.dim == 1 else target[i].narrow(0, begin, rows)
                    jobs += _overlaps(entry, part, at, offset, cut.spans)
            begin += rows
        return jobs


def _overlaps(entry: Entry, target: Tensor, dim: int, offset: int, spans: Iterable[tuple[int, int]]) -> list[_Job]:
    """What of an entry, which begins at `offset` of the whole along `dim`, goes where in the `spans` of a target."""
    jobs, at = [], 0
    for begin, end in spans:
        first, last = max(begin, offset), min(end, offset + entry.shape[dim])
        if first < last:
            part = target.narrow(dim, at + first - begin, last - first)
            jobs.append(_Job(entry, part, dim, first - offset, last - offset))
        at += end - begin
    return jobs


def _keep(cut: Cut, tensor: Tensor) -> Tensor:
    """What a cut parameter keeps of a whole tensor, which has no padding."""
    return torch.cat([tensor.narrow(cut.dim, begin, end - begin) for begin, end in cut.spans], cut.dim)


class LoadPlan:
    """Which entry of a folder's safetensors files goes where in a model, which is still on `meta`.

    Where the configuration ties parameters whose values differ in the checkpoint, they are untied, as Transformers
    does. Raises `CheckpointError` naming the tensors that are missing, left over, or of another shape, and the reason.

    Args:
        model: on `meta`.
        folder: of the files.
        in_place: whether a host may use tensors where they lie in the files; those of a network are read in any case.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, *, in_place: bool = True) -> None:
        entries = read_index(folder)
        self._model = model
        self._local = {file: in_place and not is_remote(file) for file in {entry.file for entry in entries.values()}}
        self._direct: dict[str, Entry] = {}
        self._merges: dict[str, _Merge] = {}
        targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._cuts: dict[str, Cut] = {n: t.cut for n, t in targets.items() if hasattr(t, "cut")}
        unexpected = self._assign(entries, targets)
        found: dict[str, Entry | Tensor] = dict(self._direct)
        for name, merge in self._merges.items():
            found |= merge.make(model, name, lambda entry: torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        for name, tensor in found.items():
            _check(tensor, targets, name, self._cuts.get(name))
        _check_complete(model, targets, set(found), unexpected)
        self._settle_ties(targets)

    def _assign(self, entries: Mapping[str, Entry], targets: dict[str, Tensor]) -> set[str]:
        """Sort the entries by what is to be done with them; those that have no place are returned."""
        model, unexpected = self._model, set()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, hf.WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, hf.WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        for source in sorted(entries, key=hf.dot_natural_key):
            name, pattern = hf.rename_source_key(source, renamings, converters, model.base_model_prefix, targets)
            if name not in targets and source in targets:
                name, pattern = hf.rename_source_key(source, [], [], model.base_model_prefix, targets)
            if name not in targets:
                unexpected.add(name)
            elif pattern is None:
                self._direct[name] = entries[source]
            else:
                merge = self._merges.setdefault(name, _Merge(by_pattern[pattern]))
                merge.sources.setdefault(pattern, []).append(entries[source])
        return unexpected

    def _settle_ties(self, targets: Mapping[str, Tensor]) -> None:
        first: dict[int, str] = {}
        for name, entry in list(self._direct.items()):
            other = first.setdefault(id(targets[name]), name)
            if other == name:
                continue
            one, two = (e.mapped() if self._local[e.file] else e.load() for e in (entry, self._direct[other]))
            if torch.equal(one, two):
                del self._direct[name]
            else:
                path, _, attribute = name.rpartition(".")
                setattr(self._model.get_submodule(path), attribute, frozen(targets[name].data))

    def fill(self, device: Device, *, progress: bool = False) -> None:
        """Give the model's parameters and persistent buffers, which have their storage by now, their values.

        Needs, beyond the weights, the staging buffers and, one at a time, the sources of a merged tensor, and tensors
        for a `sink` that the file does not have as they are wanted.
        """
        staging = _Staging(device)
        targets: dict[str, Any] = self._model.state_dict(keep_vars=True)
        taken = {name for name, target in targets.items() if hasattr(target, "sink")}
        jobs, in_place = [], []
        for name in self._direct.keys() - taken:
            target = targets[name]
            alone = isinstance(target, nn.Parameter) and target.untyped_storage().nbytes() == target.nbytes
            if alone and staging.is_host(target) and (found := self._in_place(name, target)) is not None:
                target.data = found
                in_place.append(self._direct[name])
            else:
                jobs += self._jobs(name, target)
        merges = {}
        for name, merge in self._merges.items():
            stacked = None if name in taken else merge.slices(targets[name], self._cuts.get(name))
            if stacked is not None:
                jobs += stacked
            else:
                merges[name] = merge
        nbytes = {name: sum(e.nbytes for es in merge.sources.values() for e in es) for name, merge in merges.items()}
        late = sorted(self._direct.keys() & taken, key=lambda name: _place(self._direct[name]))
        total = sum(job.nbytes for job in jobs) + sum(nbytes.values()) + sum(self._direct[n].nbytes for n in late)
        disable = None if progress else True  # None: quiet unless standard error is a terminal
        bar = tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=disable)

        def read(job: _Job) -> None:
            staging.read(job)
            bar.update(job.nbytes)

        def take(name: str) -> None:
            target = targets[name]
            if (whole := self._in_place(name, target)) is not None:
                bar.update(whole.nbytes)
            else:
                whole = torch.zeros(target.shape, dtype=target.dtype)
                for job in self._jobs(name, whole):
                    read(job)
            target.sink(whole)
            del whole
            _trim()

        with bar, torch.no_grad(), ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(read, sorted(jobs, key=lambda job: _place(job.entry))))
            list(pool.map(Entry.read_ahead, in_place))
            for index, name in enumerate(late):  # one after the other: each is whole for a while
                for following in late[index + 1 : index + 2]:
                    self._direct[following].read_ahead()
                take(name)
            for name, merge in merges.items():
                for target, tensor in merge.make(self._model, name, Entry.load).items():
                    cut = self._cuts.get(target)
                    kept = tensor if cut is None else _keep(cut, tensor)
                    if target in taken:
                        targets[target].sink(kept.to(targets[target].dtype))
                    else:
                        targets[target].copy_(kept)
                bar.update(nbytes[name])
        device.synchronize()

    def _in_place(self, name: str, target: Tensor) -> Tensor | None:
        """What `target` is to be, as it lies in the file; None where it does not lie there so, or is to be read."""
        entry, jobs = self._direct[name], self._jobs(name, target)
        same = entry.dtype == target.dtype and not entry.begin % entry.dtype.itemsize
        if not same or not self._local[entry.file] or len(jobs) != 1 or jobs[0].nbytes < _LEAST_MAPPED:
            return None
        [job] = jobs
        found = entry.mapped() if job.dim is None else entry.mapped().narrow(job.dim, job.begin, job.end - job.begin)
        return found if found.is_contiguous() and found.shape == target.shape else None

    def _jobs(self, name: str, target: Tensor) -> list[_Job]:
        entry, cut = self._direct[name], self._cuts.get(name)
        return [_Job(entry, target)] if cut is None else _overlaps(entry, target, cut.dim, 0, cut.spans)


def _place(entry: Entry) -> tuple[str, int]:
    return str(entry.file), entry.begin


@cache
def _malloc_trim() -> Callable[[int], int]:
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)


def _trim() -> None:
    """Give memory that was freed back to the system; glibc keeps pieces of up to 32 MiB between those in use."""
    _malloc_trim()(0)


class _Staging(threading.local):
    """Reads entries into tensors; what cannot be read in place goes through a buffer that each thread has."""

    def __init__(self, device: Device) -> None:
        device.activate()
        self._device = device
        self._host = device.host_buffer((1,), torch.uint8).device
        self._buffer: Tensor | None = None

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where files are read to."""
        return tensor.device == self._host

    def read(self, job: _Job) -> None:
        """Fill the target, in its own dtype."""
        entry, target = job.entry, job.target
        if job.dim is not None:
            target.copy_(entry.mapped().narrow(job.dim, job.begin, job.end - job.begin))
            return
        if self.is_host(target) and target.dtype == entry.dtype:
            entry.read(target)
            return
        if self._buffer is None:
            self._buffer = self._device.host_buffer((_STAGING_BYTES,), torch.uint8)
        for begin, piece in pieces(target.view(-1), _STAGING_BYTES // entry.dtype.itemsize):
            host = self._buffer[: piece.numel() * entry.dtype.itemsize].view(entry.dtype)
            entry.read(host, begin)
            piece.copy_(host)


def _check(found: Entry | Tensor, targets: Mapping[str, Tensor], name: str, cut: Cut | None) -> None:
    """Raise `CheckpointError` unless `found` can be stored as `name`."""
    what = f"{found.file}: {name!r}" if isinstance(found, Entry) else f"{name!r}, made of several tensors,"
    if name not in targets:
        raise CheckpointError(f"{what} has no place in the model; {_OTHER_MODEL}")
    shape, dtype = list(targets[name].shape if cut is None else cut.shape), targets[name].dtype
    if list(found.shape) != shape:
        raise CheckpointError(f"{what} has shape {list(found.shape)}, and the model needs {shape}; {_OTHER_MODEL}")
    if found.dtype != dtype and not (found.dtype.is_floating_point and dtype.is_floating_point):
        raise CheckpointError(f"{what} is {found.dtype}, and the model needs {dtype}; {_OTHER_MODEL}")


def _check_complete(model: PreTrainedModel, targets: Mapping[str, Tensor], found: set[str], extra: set[str]) -> None:
    """Raise `CheckpointError` for tensors that are missing or left over, but for those that Transformers ignores."""
    loaded = {id(targets[name]) for name in found}
    missing = {name for name, target in targets.items() if id(target) not in loaded}
    needed = missing & {name for name, _ in model.named_parameters(remove_duplicate=False)}
    rest: Any = SimpleNamespace(missing_keys=missing - needed, unexpected_keys=extra)
    model._adjust_missing_and_unexpected_keys(rest)
    for names, what in ((needed | rest.missing_keys, "lacks"), (rest.unexpected_keys, "has, and the model lacks,")):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"the checkpoint {what} {shown}; {_OTHER_MODEL}, or a file is missing")
