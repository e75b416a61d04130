"""Collectives over `torch.distributed`."""

from __future__ import annotations

import datetime
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import CommunicatorError
from engine.interfaces import Communicator, GroupSpec

log = logging.getLogger(__name__)

COLLECTIVES = frozenset(
    ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "receive", "barrier")
)
"""Everything that a communicator may offer, as `Capabilities.collectives` names it."""

_made: Counter[tuple[str, tuple[int, ...]]] = Counter()
"""Groups that this process has made, by role and ranks."""

# torch 2.13 gave two of the three their third's name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchCommunicator(Communicator):
    """Collectives of a process group of torch's.

    `torch.distributed` is initialised by whoever started the processes. A call that this group has not made before,
    with its dtype and shape, is first compared between the ranks, on their hosts: where ranks differ, backends end
    the process, return garbage, or wait for ever on the device. A call like an earlier one starts at once; but
    all-to-alls between hosts are always compared, since their sizes change.

    Args:
        group: who takes part; only its members call.
        device: of the tensors.
        backend: torch.distributed's name of what carries them; None takes torch's default for the device.
        capturable: the backend's calls may be recorded in a graph.
    """

    def __init__(
        self, group: GroupSpec, device: torch.device, backend: str | None = None, *, capturable: bool = False
    ) -> None:
        super().__init__(group)
        self._capturable = capturable
        self._device = device
        self._open = True
        self._pg: Any = None
        self._hosts: Any = None
        self._agreed: set[tuple[Any, ...]] = set()
        if self.size == 1:
            return
        if not dist.is_initialized():
            raise CommunicatorError(
                f"group {group.role} has {self.size} ranks, and torch.distributed is not initialised: "
                "start the processes through an executor, or call torch.distributed.init_process_group first"
            )
        with self._running("creation"):
            self._pg = _make(group, backend or dist.get_default_backend_for_device(device))
            if dist.is_gloo_available():
                self._hosts = _make(group, "gloo")
            else:
                log.warning("this torch has no gloo: ranks that make different calls are not told, and may hang")

    @property
    def capturable(self) -> bool:
        """As the platform says."""
        return self._capturable

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        name = f"{what} over group {self.group.role} {list(self.group.ranks)}"
        if not self._open:
            raise CommunicatorError(f"{name}: the communicator was closed; make a new one")
        try:
            yield
        except RuntimeError as error:
            raise CommunicatorError(
                f"{name} failed on rank {self.group.rank} within its {self.group.timeout:g} s: another rank ended, did "
                f"not call it, or passed something else\ncause: {error}\nremedy: see the first error of the other ranks"
            ) from error

    def _compare(
        self, call: str, x: Tensor, shape: Sequence[int], send: Sequence[int] = (), receive: Sequence[int] = ()
    ) -> None:
        """Check that every rank makes the same call, and that what one sends is what another expects."""
        known, on_host = (call, x.dtype, *shape), self._device.type == "cpu"
        if self._hosts is None or (known in self._agreed and not (send and on_host)):
            return
        mine = _encode([call, str(x.dtype), list(shape), list(send), list(receive)], 256 + 64 * self.size)
        every = mine.new_empty(self.size, *mine.shape)
        _all_gather(every, mine[None], group=self._hosts)
        calls = [_decode(row) for row in every]
        same = all(c[:3] == calls[0][:3] for c in calls)
        if not same or any(a[3][r] != b[4][s] for s, a in enumerate(calls) for r, b in enumerate(calls) if send):
            shown = "\n".join(
                f"  rank {rank}: {json.dumps(c)}" for rank, c in zip(self.group.ranks, calls, strict=True)
            )
            raise CommunicatorError(
                f"the ranks of group {self.group.role} do not make the same call\n{shown}\n"
                "remedy: every rank calls the same collectives in the same order, with the same dtypes and shapes"
            )
        self._agreed.add(known)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Communicator.all_reduce`."""
        result = x.clone(memory_format=torch.contiguous_format)
        with self._running("all_reduce"):
            self._compare("all_reduce", x, x.shape)
            if self._pg is not None and x.numel():
                dist.all_reduce(result, group=self._pg)
        return result

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        """See `Communicator.all_gather`."""
        dim %= x.dim()
        with self._running("all_gather"):
            if sizes is not None and (len(sizes) != self.size or sizes[self.rank] != x.shape[dim]):
                raise CommunicatorError(
                    f"all_gather: sizes {list(sizes)} do not fit rank {self.rank} of {self.size} with {x.shape[dim]} "
                    f"along dimension {dim}: pass every rank's size along it, in rank order"
                )
            widths = [x.shape[dim]] * self.size if sizes is None else list(sizes)
            shape = list(x.shape)
            shape[dim] = max(widths)
            self._compare(f"all_gather along {dim} of {widths}", x, shape)
            if self._pg is None:
                return x.clone(memory_format=torch.contiguous_format)
            mine = x.contiguous()
            if x.shape[dim] < shape[dim]:
                mine = x.new_empty(shape)
                mine.narrow(dim, 0, x.shape[dim]).copy_(x)
            every = self._gather(mine)
        return torch.cat([part.narrow(dim, 0, width) for part, width in zip(every, widths, strict=True)], dim)

    def _gather(self, x: Tensor) -> Tensor:
        every = x.new_empty(self.size, *x.shape)
        if x.numel():
            _all_gather(every, x[None], group=self._pg)
        return every

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """See `Communicator.reduce_scatter`."""
        dim %= x.dim()
        with self._running("reduce_scatter"):
            self._compare(f"reduce_scatter along {dim}", x, x.shape)
            if x.shape[dim] % self.size:
                raise CommunicatorError(f"reduce_scatter: {x.shape[dim]} does not split into {self.size} equal parts")
            parts = torch.stack(x.chunk(self.size, dim))
            if self._pg is None:
                return parts[0]
            result = torch.empty_like(parts[0])
            if result.numel():
                _reduce_scatter(result[None], parts, group=self._pg)
        return result

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `Communicator.all_to_all`."""
        with self._running("all_to_all"):
            if len(send) != self.size or len(receive) != self.size or sum(send) != x.shape[0]:
                raise CommunicatorError(
                    f"all_to_all: send {list(send)} and receive {list(receive)} do not fit {self.size} ranks and "
                    f"{x.shape[0]} rows"
                )
            self._compare("all_to_all", x, x.shape[1:], send, receive)
            if self._pg is None:
                return x.clone(memory_format=torch.contiguous_format)
            result = x.new_empty(sum(receive), *x.shape[1:])
            dist.all_to_all_single(result, x.contiguous(), list(receive), list(send), group=self._pg)
        return result

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """See `Communicator.broadcast`."""
        result = x.clone(memory_format=torch.contiguous_format)
        with self._running("broadcast"):
            self._compare(f"broadcast from {src}", x, x.shape)
            if self._pg is not None and x.numel():
                dist.broadcast(result, group_src=src, group=self._pg)
        return result

    def send(self, x: Tensor, dst: int) -> None:
        """See `Communicator.send`."""
        with self._running(f"send to {dst}"):
            self._greet("send", x, dst)
            dist.send(x.contiguous(), group_dst=dst, group=self._pg)

    def receive(self, like: Tensor, src: int) -> Tensor:
        """See `Communicator.receive`."""
        result = torch.empty_like(like, memory_format=torch.contiguous_format)
        with self._running(f"receive from {src}"):
            self._greet("receive", like, src)
            dist.recv(result, group_src=src, group=self._pg)
        return result

    def _greet(self, call: str, x: Tensor, other: int) -> None:
        """Check with one other rank that what is sent is what is expected there; each learns of a difference."""
        if self._hosts is None or (known := (call, other, x.dtype, *x.shape)) in self._agreed:
            return
        mine = _encode([str(x.dtype), list(x.shape)])
        theirs = torch.empty_like(mine)
        steps = (dist.send, mine, "group_dst"), (dist.recv, theirs, "group_src")
        for step, data, name in steps if call == "send" else reversed(steps):
            step(data, group=self._hosts, **{name: other})
        if not theirs.equal(mine):
            raise CommunicatorError(
                f"{call}: rank {other} of group {self.group.role} has {_decode(theirs)}, and this one {_decode(mine)}\n"
                "remedy: pass `like` of the shape and dtype that is sent"
            )
        self._agreed.add(known)

    def barrier(self) -> None:
        """See `Communicator.barrier`."""
        with self._running("barrier"):
            token = torch.ones(1, device=self._device)
            self._compare("barrier", token, token.shape)
            if self._pg is not None and self._device.type != "cpu":
                dist.all_reduce(token, group=self._pg)
                token.item()  # waits for the device

    def close(self) -> None:
        """See `Communicator.close`."""
        if self._open and self._pg is not None:
            for group in (self._hosts, self._pg):
                if group is not None:
                    dist.destroy_process_group(group)
        self._open, self._pg, self._hosts = False, None, None


def _make(group: GroupSpec, backend: str) -> Any:
    """A process group that only its members make, in the order of `group.ranks`.

    `torch.distributed.new_group` would name it by its ranks and by how many groups this process has: names that differ
    between ranks that are members of different groups, and that a later group inherits from a closed one, with what is
    in the store under it. Role, ranks, and how many of them were made before, are the same on all members, and new.
    """
    c10d: Any = dist.distributed_c10d
    serial = _made[group.role, group.ranks]
    _made[group.role, group.ranks] += 1
    ranks = list(group.ranks)
    pg, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(group.rank),
        ranks,
        dist.Backend(backend),
        c10d._get_default_store(),
        f"{group.role}/{'-'.join(map(str, ranks))}/{serial}",
        timeout=datetime.timedelta(seconds=group.timeout),
    )
    c10d._world.pg_group_ranks[pg] = {rank: index for index, rank in enumerate(ranks)}
    return pg


def _encode(call: list[Any], width: int = 256) -> Tensor:
    text = json.dumps(call, separators=(",", ":")).encode()
    assert len(text) <= width, call
    return torch.frombuffer(bytearray(text.ljust(width)), dtype=torch.uint8)


def _decode(data: Tensor) -> list[Any]:
    call: list[Any] = json.loads(bytes(data.tolist()))
    return call
