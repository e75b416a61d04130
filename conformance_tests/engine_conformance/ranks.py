"""Runs checks of a communicator in several processes, one rank each."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.plugins import load_platform
from engine_sdk import Communicator, CommunicatorError, GroupSpec, Platform

TIMEOUT = 5.0
"""Seconds after which a collective that a rank did not enter must have ended."""

_PATIENCE = 240.0


class World:
    """One rank's view: it makes communicators, and tensors with integer values, so that sums are exact."""

    def __init__(self, platform: Platform, rank: int, size: int) -> None:
        self.platform, self.rank, self.size = platform, rank, size
        self.device = platform.device().torch_device

    def group(self, role: str = "tp", ranks: tuple[int, ...] | None = None) -> Communicator:
        """A new communicator over all ranks, or some."""
        return self.platform.communicator(GroupSpec(role, ranks or tuple(range(self.size)), self.rank, TIMEOUT))

    def integers(self, rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What rank `rank` brings: small integers, the same on every process that asks."""
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(-8, 9, shape, generator=generator).to(dtype).to(self.device)

    def everyone(self, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """What each rank brings."""
        return [self.integers(rank, *shape, dtype=dtype) for rank in range(self.size)]


def total(parts: list[Tensor]) -> Tensor:
    """The sum of what the ranks bring; exact, as they are small integers."""
    return torch.stack(parts).sum(0)


Check = Callable[[World], None]


def run_ranks(platform: str, checks: Mapping[str, Check], size: int) -> dict[str, str]:
    """Run every check on every rank; returns the failures, the ranks' tracebacks by the check's name."""
    context = multiprocessing.get_context("spawn")
    failures: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        arguments = (platform, dict(checks), size, store, failures)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        return _collect(processes, failures)


def _collect(processes: list[Any], failures: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    finished = 0
    end = time.monotonic() + _PATIENCE
    while finished < len(processes) and time.monotonic() < end:
        try:
            name, text = failures.get(timeout=0.5)
        except Empty:
            if any(process.exitcode not in (None, 0) for process in processes):
                break
            continue
        if name is None:
            finished += 1
        else:
            found[name] = found.get(name, "") + text
    if finished < len(processes):
        codes = [process.exitcode for process in processes]
        found["the processes"] = f"did not finish: exit codes {codes} (None: still running after {_PATIENCE:g} s)"
    for process in processes:
        process.join(5 if finished == len(processes) else 0)
        process.kill()
    return found


def _rank(rank: int, name: str, checks: dict[str, Check], size: int, store: str, failures: Any) -> None:
    torch.set_num_threads(1)
    platform = load_platform(name, rank)
    platform.device().activate()
    dist.init_process_group(init_method=f"file://{store}", rank=rank, world_size=size)
    world = World(platform, rank, size)
    for label, check in checks.items():
        try:
            check(world)
        except BaseException:
            failures.put((label, f"rank {rank}:\n{traceback.format_exc()}"))
        dist.barrier()  # a check that failed on one rank must not desynchronise the next
    failures.put((None, ""))


def all_reduce(world: World) -> None:
    """Exact sums, of several sizes and dtypes; inputs are kept, and results are the same bits everywhere."""
    group = world.group()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1,), (7,), (3, 5), (64, 129), (0, 4), (300_000,)):
            parts = world.everyone(*shape, dtype=dtype)
            mine = parts[world.rank].clone()
            got = group.all_reduce(mine)
            assert torch.equal(mine, parts[world.rank]), "the input was changed"
            assert torch.equal(got, total(parts)), (dtype, shape)
    strided = world.integers(world.rank, 8, 6)[:, ::2]
    assert torch.equal(group.all_reduce(strided), total(world.everyone(8, 6))[:, ::2]), "strided input"


def same_bits(world: World) -> None:
    """Sums that need rounding come out the same on every rank."""
    group = world.group()
    for dtype in (torch.bfloat16, torch.float32):
        noise = torch.randn(5000, generator=torch.Generator().manual_seed(world.rank)).to(dtype).to(world.device)
        got = group.all_reduce(noise)
        first, *others = group.all_gather(got[None]).unbind(0)
        assert all(torch.equal(first, other) for other in others), dtype


def all_gather(world: World) -> None:
    """Along every dimension, and with sizes that differ."""
    group = world.group()
    parts = world.everyone(4, 3, 5)
    for dim in (0, 1, 2, -1):
        assert torch.equal(group.all_gather(parts[world.rank], dim), torch.cat(parts, dim)), dim
        strided = parts[world.rank].transpose(0, 2)
        assert torch.equal(group.all_gather(strided, dim), torch.cat([p.transpose(0, 2) for p in parts], dim)), dim
    sizes = [3 * rank for rank in range(world.size)]
    uneven = [world.integers(rank, 2, size) for rank, size in enumerate(sizes)]
    assert torch.equal(group.all_gather(uneven[world.rank], 1, sizes), torch.cat(uneven, 1)), "uneven"


def reduce_scatter(world: World) -> None:
    """Each rank gets its part of the sum."""
    group = world.group()
    for dim in (0, 1):
        parts = world.everyone(4 * world.size, 6 * world.size)
        want = total(parts).chunk(world.size, dim)[world.rank]
        mine = parts[world.rank].clone()
        assert torch.equal(group.reduce_scatter(mine, dim), want), dim
        assert torch.equal(mine, parts[world.rank]), "the input was changed"


def all_to_all(world: World) -> None:
    """Uneven rows, some of them none; row values say where they come from and go to."""
    group = world.group()

    def rows(src: int, dst: int) -> Tensor:
        return torch.full((src + 2 * dst, 3), 10.0 * src + dst, device=world.device)

    ranks = range(world.size)
    send, receive = ([len(rows(world.rank, r)) for r in ranks], [len(rows(r, world.rank)) for r in ranks])
    got = group.all_to_all(torch.cat([rows(world.rank, r) for r in ranks]), send, receive)
    assert torch.equal(got, torch.cat([rows(r, world.rank) for r in ranks]))


def broadcast(world: World) -> None:
    """From every rank."""
    group = world.group()
    for src in range(world.size):
        mine = world.integers(world.rank, 5, 2)
        assert torch.equal(group.broadcast(mine, src), world.integers(src, 5, 2)), src
        assert torch.equal(mine, world.integers(world.rank, 5, 2)), "the input was changed"


def send_receive(world: World) -> None:
    """Round the ring."""
    group = world.group()
    if world.size == 1:
        return
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    mine = world.integers(world.rank, 6, 4).to(torch.bfloat16)
    if world.rank % 2 == 0:
        group.send(mine, after)
        got = group.receive(mine, before)
    else:
        got = group.receive(mine, before)
        group.send(mine, after)
    assert torch.equal(got, world.integers(before, 6, 4).to(torch.bfloat16))


def overlapping_groups(world: World) -> None:
    """Two groups of the same ranks and one of each rank alone: none hears another."""
    first, second = world.group("tp"), world.group("ep")
    alone = world.group("pp", (world.rank,))
    mine = world.integers(world.rank, 9)
    assert torch.equal(alone.all_reduce(mine), mine)
    assert torch.equal(first.all_reduce(mine), total(world.everyone(9)))
    assert torch.equal(second.all_gather(mine[None]), torch.stack(world.everyone(9)))
    assert (alone.rank, alone.size, first.rank, first.size) == (0, 1, world.rank, world.size)


def delayed_rank(world: World) -> None:
    """A rank that comes late is waited for."""
    group = world.group()
    if world.rank == world.size - 1:
        time.sleep(1)
    start = time.monotonic()
    group.barrier()
    if world.rank != world.size - 1 and world.size > 1:
        assert time.monotonic() - start > 0.5, "the barrier did not wait"
    assert torch.equal(group.all_reduce(torch.ones(3, device=world.device)).cpu(), torch.full((3,), float(world.size)))


def mismatch(world: World) -> None:
    """Other shapes, other dtypes, or another operation: an error of the right type, in time, and no garbage."""
    if world.size == 1:
        return
    odd = world.rank == world.size - 1
    for label, call in {
        "shape": lambda group: group.all_reduce(torch.ones(5 if odd else 7, device=world.device)),
        "dtype": lambda group: group.all_reduce(
            torch.ones(8, device=world.device, dtype=torch.bfloat16 if odd else torch.float16)
        ),
        "operation": lambda group: (group.broadcast if odd else group.all_reduce)(torch.ones(4, device=world.device)),
    }.items():
        _fails_in_time(label, world.group(), call)


def mismatch_of_two(world: World) -> None:
    """Something else is received than was sent: the receiver says so; the sender may be done already."""
    group = world.group()
    sent = torch.ones(6, device=world.device)
    if world.rank == 0 and world.size > 1:
        with suppress(CommunicatorError):
            group.send(sent, 1)
    elif world.rank == 1:
        _fails_in_time("receive", group, lambda g: g.receive(sent[:4], 0))


def absent_rank(world: World) -> None:
    """A rank that never comes."""
    group = world.group()
    if world.size == 1:
        return
    if world.rank:
        time.sleep(TIMEOUT + 1)
    else:
        _fails_in_time("absent", group, lambda g: g.all_reduce(torch.ones(4, device=world.device)))


def _fails_in_time(label: str, group: Communicator, call: Callable[[Communicator], object]) -> None:
    start = time.monotonic()
    try:
        call(group)
    except CommunicatorError:
        took = time.monotonic() - start
        assert took < 2 * TIMEOUT, f"{label}: the error came after {took:.1f} s; the group's timeout is {TIMEOUT:g} s"
    else:
        raise AssertionError(f"{label}: the ranks do not make the same call, and no error came")


def closed(world: World) -> None:
    """After `close`, a call is an error, and other groups go on."""
    group, other = world.group(), world.group()
    group.close()
    group.close()
    _fails_in_time("closed", group, lambda g: g.all_reduce(torch.ones(1, device=world.device)))
    assert float(other.all_reduce(torch.ones(1, device=world.device))) == world.size


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        all_reduce,
        same_bits,
        all_gather,
        reduce_scatter,
        all_to_all,
        broadcast,
        send_receive,
        overlapping_groups,
        delayed_rank,
        mismatch,
        mismatch_of_two,
        absent_rank,
        closed,
    )
}
