"""``npucl``: the chip's collectives, as a backend of `torch.distributed`.

Data goes through host memory to gloo. Every call is compared between the ranks before it starts, since gloo ends the
process, or returns garbage, where they differ: so a mismatch is an error on every rank, and in time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from npu_sim import runtime
from torch import Tensor
from torch.futures import Future

NAME = "npucl"
"""What `torch.distributed` calls it."""


@functools.cache
def register() -> None:
    """Make the backend known to `torch.distributed`; it carries the host's tensors too, which share its groups."""
    dist.Backend.register_backend(NAME, _Group, devices=["npu", "cpu"])


_c10d: Any = torch._C._distributed_c10d  # most of it has no types


class _Group(_c10d.ProcessGroup):  # type: ignore[misc]
    """A process group, with the methods that `torch.distributed` calls."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = _c10d.ProcessGroupGloo(store, rank, size, timeout)
        self._label = ""

    def getBackendName(self) -> str:  # noqa: N802
        return NAME

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._label = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._label

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        opts = opts or dist.AllreduceOptions()
        self._agree(f"all_reduce {opts.reduceOp.op}", tensors[0])
        return _staged(lambda x: self._gloo.allreduce([x], opts), tensors[0])

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        self._agree(f"broadcast from {opts.rootRank}", tensors[0])
        return _staged(lambda x: self._gloo.broadcast([x], opts), tensors[0])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        every = inputs[0].new_empty(self.size(), *inputs[0].shape)
        self.all_gather_single(every, inputs[0])
        for output, part in zip(outputs[0], every, strict=True):
            output.copy_(part)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Any:
        self._agree("all_gather", x)
        return _staged(lambda out, x: self._gloo._allgather_base(out.view(-1), x.view(-1)), output, x)

    def reduce_scatter_single(self, output: Tensor, x: Tensor, opts: Any = None) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        self._agree(f"reduce_scatter {opts.reduceOp.op}", x)
        return _staged(lambda out, x: self._gloo._reduce_scatter_base(out.view(-1), x.view(-1), opts), output, x)

    def all_to_all_single(
        self, output: Tensor, x: Tensor, receive: Sequence[int], send: Sequence[int], opts: Any = None
    ) -> Any:
        calls = self._agree("all_to_all", x[:0], send=list(send), receive=list(receive))
        for src, theirs in enumerate(calls):
            if send and theirs["send"][self.rank()] != receive[src]:
                raise RuntimeError(f"rank {src} sends {theirs['send'][self.rank()]} rows; {receive[src]} are expected")
        opts = opts or dist.AllToAllOptions()
        return _staged(lambda out, x: self._gloo.alltoall_base(out, x, receive, send, opts), output, x)

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> Any:
        self._gloo.send([_header("send", tensors[0])], dst, tag).wait()
        self._gloo.send([tensors[0].cpu()], dst, tag).wait()
        return _done(tensors)

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> Any:
        expected = _header("send", tensors[0])
        self._gloo.recv([sent := torch.empty_like(expected)], src, tag).wait()
        if not sent.equal(expected):
            raise RuntimeError(f"rank {src} sent {_call(sent)}, and {_call(expected)} is expected")
        return _staged(lambda x: self._gloo.recv([x], src, tag), tensors[0])

    def barrier(self, opts: Any = None) -> Any:
        if runtime.is_initialized():
            runtime.synchronize()
        self._gloo.barrier().wait()
        return _done([])

    def _agree(self, name: str, x: Tensor, **sizes: list[int]) -> list[dict[str, Any]]:
        """Tell the others what this rank calls; returns what each one does, and raises where that is not the same."""
        mine = _header(name, x, **sizes)
        every = mine.new_empty(self.size() * len(mine))
        self._gloo._allgather_base(every, mine).wait()
        calls = [_call(header) for header in every.split(len(mine))]
        for rank, theirs in enumerate(calls):
            if any(theirs[key] != calls[self.rank()][key] for key in ("name", "dtype", "shape")):
                raise RuntimeError(f"rank {self.rank()} calls {_call(mine)}, and rank {rank} calls {theirs}")
        return calls


def _staged(run: Callable[..., Any], output: Tensor, *inputs: Tensor) -> Any:
    """Run `run` on host copies, and bring back what it wrote into the first."""
    host = output.cpu()
    run(host, *(x.cpu().contiguous() for x in inputs)).wait()
    if host is not output:
        output.copy_(host)
    return _done([output])


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _c10d._create_work_from_future(future)


def _header(name: str, x: Tensor, **sizes: list[int]) -> Tensor:
    text = json.dumps({"name": name, "dtype": str(x.dtype), "shape": list(x.shape), **sizes})
    return torch.tensor(list(text.encode().ljust(1024)), dtype=torch.uint8)


def _call(header: Tensor) -> dict[str, Any]:
    return json.loads(bytes(header.tolist()))  # type: ignore[no-any-return]
