"""Weights: from a checkpoint straight into their final storage.

A plan is made and checked first, from headers alone: under which name each tensor belongs, what Transformers renames or
merges, what is missing. Then every tensor is read once, into its place where dtype and device agree, and through a small
staging buffer otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from engine.errors import CheckpointError
from engine.interfaces import Device
from engine.model.checkpoint import Entry

_STAGING_BYTES = 16 << 20
_THREADS = 4

Job = tuple[Entry, Tensor]
"""An entry, and the tensor that takes it; the tensor is contiguous."""


@dataclass
class _Merge:
    """Entries of which Transformers makes other tensors, by the patterns that matched their names."""

    converter: WeightConverter
    sources: dict[str, list[Entry]] = field(default_factory=dict)
    made: dict[str, Tensor] = field(default_factory=dict)  # on `meta`

    def make(self, model: PreTrainedModel, name: str, load: Callable[[Entry], Tensor]) -> dict[str, Tensor]:
        """The tensors by the names of their places."""
        converter = deepcopy(self.converter)
        for pattern, entries in self.sources.items():
            for entry in entries:
                converter.add_tensor(name, entry.name, pattern, lambda entry=entry: load(entry))
        try:
            made = converter.convert(name, model=model, config=model.config)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"the tensors that make {name!r} do not fit together: {error}; the checkpoint is damaged, or of another model"
            ) from error
        return {target: t[0] if isinstance(t, list) else t for target, t in made.items()}

    def slices(self, target: Tensor) -> list[Job] | None:
        """Where each entry goes within `target`, if they are only stacked, and stacks joined; None otherwise."""
        stacked = [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]
        if [(type(op), getattr(op, "dim", None)) for op in self.converter.operations] not in stacked:
            return None
        jobs, begin = [], 0
        for entries in (self.sources[p] for p in self.converter.source_patterns if p in self.sources):
            rows = entries[0].shape[0]
            jobs += [(entry, target[i].narrow(0, begin, rows)) for i, entry in enumerate(entries)]
            begin += rows
        return jobs


class LoadPlan:
    """Which entry of a checkpoint goes where in `model`, which may still be on `meta`.

    Raises `CheckpointError` naming the tensors that are missing, left over, or of another shape, and the reason. Where
    the configuration ties parameters whose values differ in the checkpoint, they are untied, as Transformers does.
    """

    def __init__(self, model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
        self._model = model
        self._direct: dict[str, Entry] = {}
        self._merges: dict[str, _Merge] = {}
        self.nbytes = 0
        targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        unexpected = self._assign(entries, targets)
        found: dict[str, Entry | Tensor] = dict(self._direct)
        for name, merge in self._merges.items():
            found |= merge.make(model, name, lambda entry: torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        for name, tensor in found.items():
            _check(tensor, targets, name)
        _check_complete(model, targets, set(found), unexpected)
        self._settle_ties(targets)

    def _assign(self, entries: Mapping[str, Entry], targets: Mapping[str, Tensor]) -> set[str]:
        """Sort the entries by what is to be done with them; those that have no place are returned."""
        model, unexpected = self._model, set()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        for source in sorted(entries, key=dot_natural_key):
            name, pattern = rename_source_key(source, renamings, converters, model.base_model_prefix, targets)
            if name not in targets and source in targets:
                name, pattern = rename_source_key(source, [], [], model.base_model_prefix, targets)
            if name not in targets:
                unexpected.add(name)
                continue
            self.nbytes += entries[source].nbytes
            if pattern is None:
                self._direct[name] = entries[source]
            else:
                merge = self._merges.setdefault(name, _Merge(by_pattern[pattern]))
                merge.sources.setdefault(pattern, []).append(entries[source])
        return unexpected

    def _settle_ties(self, targets: Mapping[str, Tensor]) -> None:
        first: dict[int, str] = {}
        for name in list(self._direct):
            other = first.setdefault(id(targets[name]), name)
            if other != name:
                if torch.equal(self._direct[name].load(), self._direct[other].load()):
                    self.nbytes -= self._direct.pop(name).nbytes
                else:
                    path, _, attribute = name.rpartition(".")
                    setattr(self._model.get_submodule(path), attribute, nn.Parameter(targets[name].data, requires_grad=False))

    def fill(self, device: Device, *, progress: bool = False) -> None:
        """Read the weights into the model's parameters and persistent buffers, which have their final storage.

        Needs, beyond the weights, the staging buffers and the sources of one merged tensor at a time.
        """
        targets: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        jobs = [(entry, targets[name]) for name, entry in self._direct.items()]
        merges = {}
        for name, merge in self._merges.items():
            if (stacked := merge.slices(targets[name])) is not None:
                jobs += stacked
            else:
                merges[name] = merge
        local = threading.local()

        def fill(job: Job) -> None:
            if not hasattr(local, "staging"):
                device.activate()
                local.staging = device.host_buffer((_STAGING_BYTES,), torch.uint8)
            _fill(*job, local.staging)
            bar.update(job[0].nbytes)

        quiet = None if progress else True  # None: quiet unless standard error is a terminal
        bar = tqdm(total=self.nbytes, desc="Loading weights", unit="B", unit_scale=True, disable=quiet)
        with bar, torch.no_grad(), ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(fill, sorted(jobs, key=lambda job: (str(job[0].file), job[0].begin))):
                pass
            for name, merge in merges.items():
                for target, tensor in merge.make(self._model, name, Entry.load).items():
                    targets[target].copy_(tensor)
                bar.update(sum(entry.nbytes for entries in merge.sources.values() for entry in entries))
        device.synchronize()


def _fill(entry: Entry, target: Tensor, staging: Tensor) -> None:
    """Read `entry` into `target`: into place, or through `staging` (uint8, on the host) a piece at a time."""
    if target.device == staging.device and target.dtype == entry.dtype:
        entry.read(target)
        return
    step = staging.numel() // entry.dtype.itemsize
    flat = target.view(-1)
    for begin in range(0, flat.numel(), step):
        piece = flat[begin : begin + step]
        host = staging[: piece.numel() * entry.dtype.itemsize].view(entry.dtype)
        entry.read(host, begin)
        piece.copy_(host)


def _check(found: Entry | Tensor, targets: Mapping[str, Tensor], name: str) -> None:
    """Raise `CheckpointError` unless `found` can be stored as `name`."""
    where = f"{found.file}: {name!r}" if isinstance(found, Entry) else f"{name!r}, made of several tensors,"
    if name not in targets:
        raise CheckpointError(f"{where} has no place in the model; config.json and the weights are not of the same model")
    target = targets[name]
    if tuple(found.shape) != tuple(target.shape):
        raise CheckpointError(
            f"{where} has shape {list(found.shape)}, and the model needs {list(target.shape)}; config.json and the weights "
            "are not of the same model"
        )
    if found.dtype != target.dtype and not (found.dtype.is_floating_point and target.dtype.is_floating_point):
        raise CheckpointError(f"{where} is {found.dtype}, and the model needs {target.dtype}")


def _check_complete(
    model: PreTrainedModel, targets: Mapping[str, Tensor], found: set[str], unexpected: set[str]
) -> None:
    """Raise `CheckpointError` for tensors that are missing or left over, but for those that Transformers ignores."""
    loaded = {id(targets[name]) for name in found}
    missing = {name for name, target in targets.items() if id(target) not in loaded}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignorable = SimpleNamespace(missing_keys=missing - parameters, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(ignorable)
    for names, what in (
        ((missing & parameters) | ignorable.missing_keys, "lacks"),
        (ignorable.unexpected_keys, "has, and the model does not,"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(
                f"the checkpoint {what} {shown}; config.json and the weights are not of the same model, or a file is missing"
            )
