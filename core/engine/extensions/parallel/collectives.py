"""Collectives as opaque operations, so that modelling code calls them anywhere, compiled or not.

A group's number finds it, as a constant of the compiled code: all layers of a model share their groups. On `meta`
tensors, where a probe runs the model, only shapes come out.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.interfaces import Communicator

_numbers = itertools.count()
_groups: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()


class Group:
    """One group of ranks, with the operations that modules call.

    Args:
        communicator: the platform's.
        entered: called before each collective, so that whoever watches sees which rank is behind.
    """

    def __init__(self, communicator: Communicator, entered: Callable[[], None] = lambda: None) -> None:
        self.communicator, self.entered = communicator, entered
        self.rank, self.size = communicator.rank, communicator.size
        self._number = next(_numbers)
        _groups[self._number] = self

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        result: Tensor = torch.ops.engine.all_reduce(x, self._number)
        return result

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The ranks' tensors, joined along their last dimension, of which rank r has ``sizes[r]``."""
        result: Tensor = torch.ops.engine.all_gather(x, list(sizes), self._number)
        return result


def bounds(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Where the share of `rank` begins and ends in `size` things; shares differ by one at most."""
    return size * rank // ranks, size * (rank + 1) // ranks


_library: Any = torch.library.Library("engine", "FRAGMENT")
_library.define("all_reduce(Tensor x, int group) -> Tensor")
_library.define("all_gather(Tensor x, int[] sizes, int group) -> Tensor")


def _all_reduce(x: Tensor, number: int) -> Tensor:
    group = _groups[number]
    group.entered()
    return group.communicator.all_reduce(x)


def _all_gather(x: Tensor, sizes: list[int], number: int) -> Tensor:
    group = _groups[number]
    group.entered()
    return group.communicator.all_gather(x, -1, None if len(set(sizes)) == 1 else sizes)


_library.impl("all_reduce", _all_reduce, "CompositeExplicitAutograd")
_library.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
torch.library.register_fake("engine::all_reduce", lambda x, number: x.new_empty(x.shape), lib=_library)
torch.library.register_fake(
    "engine::all_gather", lambda x, sizes, number: x.new_empty(*x.shape[:-1], sum(sizes)), lib=_library
)
