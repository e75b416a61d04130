"""Communicators that add wrongly, deliver to the wrong rank, change their input, hang, or hide a mismatch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine_mutation.catalogue import fault
from engine_sdk import CommunicatorError, TorchCommunicator


def _check(name: str) -> str:
    return f"test_communicator.py::test_collectives[{name}]"


class _Unchecked(TorchCommunicator):
    """Calls are not compared between the ranks before they start."""

    def _compare(self, *call: Any, **sizes: Any) -> None:
        pass


# Sums.


@fault("L4", _check("same_bits"))
class SumBeginsWithItsOwn(TorchCommunicator):
    """Each rank adds the others' parts to its own, so that with three ranks or more roundings differ."""

    def all_reduce(self, x: Tensor) -> Tensor:
        parts = self.all_gather(x[None]).roll(-self.rank, 0).unbind(0)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total


@fault("L4", _check("all_reduce"))
class SumInPlace(TorchCommunicator):
    """The caller's tensor receives the sum."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(super().all_reduce(x))


@fault("L4", _check("all_reduce"))
class AverageForSum(TorchCommunicator):
    """The mean is returned."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(x) / self.size


@fault("L4", _check("all_reduce"))
class SumThroughBf16(TorchCommunicator):
    """fp32 is sent as bf16 to save half of the traffic."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(x.bfloat16()).to(x.dtype)


@fault("L4", _check("all_reduce"))
class StridedNotReduced(TorchCommunicator):
    """The sum of a tensor with gaps lands in a copy, and the tensor comes back as it was."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total = super().all_reduce(x)
        return total if x.is_contiguous() else x.clone()


@fault("L4", _check("all_reduce"))
class LargeMessageCutOff(TorchCommunicator):
    """Exchange buffers hold 256 Ki elements, and what is beyond is not reduced."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total = super().all_reduce(x)
        total.view(-1)[1 << 18 :] = x.reshape(-1)[1 << 18 :]
        return total


@fault("L4", _check("all_reduce"))
class OddSizesCutOff(TorchCommunicator):
    """Elements go in packs of 8, and the last ones of an odd size are not reduced."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total, whole = super().all_reduce(x), x.numel() // 8 * 8
        total.view(-1)[whole:] = x.reshape(-1)[whole:]
        return total


@fault("L4", _check("all_reduce"))
class EmptySumFails(TorchCommunicator):
    """A tensor without elements is an error."""

    def all_reduce(self, x: Tensor) -> Tensor:
        if not x.numel():
            raise CommunicatorError("all_reduce: nothing to reduce")
        return super().all_reduce(x)


@fault("L4", _check("results_stay"))
class ResultOverwritten(TorchCommunicator):
    """Results live in one workspace, and the next call of the same shape overwrites them."""

    def all_reduce(self, x: Tensor) -> Tensor:
        kept: dict[Any, Tensor] = self.__dict__.setdefault("_kept", {})
        total = super().all_reduce(x)
        return kept.setdefault((x.shape, x.dtype), total).copy_(total)


@fault("L4", _check("all_reduce"))
class ReturnsBeforeCompletion(_Unchecked):
    """The sum is started, and returned without waiting for it."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        if self._pg is not None and x.numel():
            self._running_work = dist.all_reduce(total, group=self._pg, async_op=True)
        return total


# Who gets what.


@fault("L4", _check("overlapping_groups"))
class GroupIgnored(TorchCommunicator):
    """Every group is taken for all ranks."""

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total


@fault("L4", _check("group_order"))
class GroupOrderSorted(TorchCommunicator):
    """Parts come in the order of global ranks, whatever the group's order."""

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        gathered = super().all_gather(x, dim, sizes)
        if list(self.group.ranks) == sorted(self.group.ranks) or sizes is not None:
            return gathered
        parts = gathered.chunk(self.size, dim)
        return torch.cat([parts[self.group.ranks.index(r)] for r in sorted(self.group.ranks)], dim)


@fault("L4", _check("all_gather"))
class GatherAlongTheFirst(TorchCommunicator):
    """Parts are always joined along the first dimension."""

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        return super().all_gather(x, 0 if sizes is None else dim, sizes)


@fault("L4", _check("all_gather"))
class UnevenGatherKeepsPadding(TorchCommunicator):
    """Parts of different sizes are padded for the exchange, and the padding stays."""

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        if sizes is None:
            return super().all_gather(x, dim)
        shape = list(x.shape)
        shape[dim] = max(sizes) - x.shape[dim]
        return super().all_gather(torch.cat((x, x.new_zeros(shape)), dim), dim)


@fault("L4", _check("all_gather"))
class GatherIgnoresStrides(TorchCommunicator):
    """A transposed tensor is sent as it lies in memory."""

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        dense = x if x.is_contiguous() else x.as_strided(x.shape, torch.empty(x.shape).stride())
        return super().all_gather(dense, dim, sizes)


@fault("L4", _check("reduce_scatter"))
class ScatterToTheNextRank(TorchCommunicator):
    """Each rank gets the part of the one after it."""

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        first, *others = x.chunk(self.size, dim)
        return super().reduce_scatter(torch.cat((*others, first), dim), dim)


@fault("L4", _check("reduce_scatter"))
class ScatterOfItsOwn(TorchCommunicator):
    """Each rank gets its part of its own tensor, not of the sum."""

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        super().reduce_scatter(x, dim)
        return x.chunk(self.size, dim)[self.rank].clone()


@fault("L4", _check("all_to_all"))
class AllToAllReversed(TorchCommunicator):
    """Rows come in the reverse of the ranks' order."""

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return super().all_to_all(x, send, receive).flip(0)


@fault("L4", _check("broadcast"))
class BroadcastFromTheFirst(TorchCommunicator):
    """The source is always the group's first rank."""

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return super().broadcast(x, 0)


@fault("L4", _check("broadcast"))
class BroadcastInPlace(TorchCommunicator):
    """The receivers' tensors are overwritten."""

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x.copy_(super().broadcast(x, src))


@fault("L4", _check("send_receive"))
class ReceiveOverwritesItsArgument(TorchCommunicator):
    """What arrives is written into the tensor that only says its shape."""

    def receive(self, like: Tensor, src: int) -> Tensor:
        return like.copy_(super().receive(like, src))


# Waiting, mismatches, and the end.


@fault("L4", _check("delayed_rank"))
class BarrierDoesNotWait(TorchCommunicator):
    """The barrier returns at once."""

    def barrier(self) -> None:
        pass


@fault("L4", _check("mismatch"))
class MismatchGivesGarbage(_Unchecked):
    """Ranks that pass other shapes get what happens to be there."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x * self.size

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x.clone()


@fault("L4", _check("mismatch"))
class MismatchIsAnotherError(TorchCommunicator):
    """A mismatch ends in an error of no particular type."""

    def _compare(self, *call: Any, **sizes: Any) -> None:
        try:
            super()._compare(*call, **sizes)
        except CommunicatorError as error:
            raise ValueError(str(error)) from error


@fault("L4", _check("absent_rank"))
class AbsentRankHangs(TorchCommunicator):
    """The group's time limit is not passed on: who waits for a rank that never comes waits far longer."""

    def all_reduce(self, x: Tensor) -> Tensor:
        try:
            return super().all_reduce(x)
        except CommunicatorError:
            time.sleep(3 * self.group.timeout)
            raise


@fault("L4", _check("mismatch_of_two"))
class ReceiveTakesAnything(TorchCommunicator):
    """A message of another shape is cut to what was asked for."""

    def receive(self, like: Tensor, src: int) -> Tensor:
        try:
            return super().receive(like, src)
        except CommunicatorError:
            return torch.empty_like(like)


@fault("L4", _check("closed"))
class WorksAfterTheEnd(TorchCommunicator):
    """A closed communicator goes on."""

    def close(self) -> None:
        pass


@fault("L4", _check("closed"))
class CloseEndsTheOthers(TorchCommunicator):
    """Closing one group closes every group of the process."""

    _all: list[TorchCommunicator] = []  # noqa: RUF012

    def __init__(self, *group: Any) -> None:
        super().__init__(*group)
        self._all.append(self)

    def close(self) -> None:
        for other in self._all:
            TorchCommunicator.close(other)


@fault("L4", "test_communicator.py::test_required_collectives", collectives=frozenset({"all_reduce", "barrier"}))
class GatherNotDeclared(TorchCommunicator):
    """Collectives are declared without all-gather, which whoever has any must have."""
