"""Runs checks of a communicator in several processes, one rank each."""

from __future__ import annotations

import multiprocessing
import random
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
from engine_sdk import Communicator, CommunicatorError, GroupSpec, Platform, UnsupportedCapability

TIMEOUT = 5.0
"""Seconds after which a collective that a rank did not enter must have ended; other groups wait for a busy machine."""

_START = 240.0
"""Seconds until the processes have begun."""

_PATIENCE = 10 * TIMEOUT
"""Seconds without a sign of any rank after which they hang."""

_LARGEST = {torch.float32: 1 << 20, torch.bfloat16: 40, torch.float16: 500, torch.int32: 1 << 24, torch.int64: 1 << 40}
"""Largest integers of which four add up exactly in a dtype, and do not in a smaller one."""


class World:
    """One rank's view: it makes communicators, and tensors with integer values, so that sums are exact."""

    def __init__(self, platform: Platform, rank: int, size: int) -> None:
        self.platform, self.rank, self.size = platform, rank, size
        self.device = platform.device().torch_device
        self.dtypes = sorted(platform.capabilities().dtypes, key=str)

    def group(
        self, role: str = "tp", ranks: tuple[int, ...] | None = None, timeout: float = 6 * TIMEOUT
    ) -> Communicator:
        """A new communicator over all ranks, or some."""
        return self.platform.communicator(GroupSpec(role, ranks or tuple(range(self.size)), self.rank, timeout))

    def integers(self, rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What rank `rank` brings: small integers, the same on every process that asks."""
        generator = torch.Generator().manual_seed(rank)
        most = _LARGEST[dtype]
        return torch.randint(-most, most + 1, shape, generator=generator).to(dtype).to(self.device)

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
    reports: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        arguments = (platform, dict(checks), size, store, reports)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        return _collect(processes, reports)


def _collect(processes: list[Any], reports: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    running = dict.fromkeys(range(len(processes)), "the start")
    end = time.monotonic() + _START
    while running and time.monotonic() < end:
        try:
            rank, label, text = reports.get(timeout=0.5)
        except Empty:
            if any(process.exitcode not in (None, 0) for process in processes):
                break
            continue
        end = time.monotonic() + _PATIENCE
        if text:
            found[label] = found.get(label, "") + text
        elif label:
            running[rank] = label
        else:
            del running[rank]
    if running:
        codes = [process.exitcode for process in processes]
        at = ", ".join(f"rank {rank} in {label}" for rank, label in sorted(running.items()))
        text = f"did not finish: {at}; exit codes {codes} (None: still running {_PATIENCE:g} s after the last sign)"
        found["the processes"] = text
    for process in processes:
        process.join(0 if running else 5)
        process.kill()
    return found


def _rank(rank: int, name: str, checks: dict[str, Check], size: int, store: str, reports: Any) -> None:
    torch.set_num_threads(1)
    platform = load_platform(name, rank)
    platform.device().activate()
    dist.init_process_group(init_method=f"file://{store}", rank=rank, world_size=size)
    world = World(platform, rank, size)
    for label, check in checks.items():
        reports.put((rank, label, ""))
        try:
            check(world)
        except BaseException:
            reports.put((rank, label, f"rank {rank}:\n{traceback.format_exc()}"))
        dist.barrier()  # a check that failed on one rank must not desynchronise the next
    reports.put((rank, "", ""))


def all_reduce(world: World) -> None:
    """Exact sums, of several sizes and dtypes; inputs are kept, and results are the same bits everywhere."""
    group = world.group()
    for dtype in world.dtypes:
        for shape in ((1,), (7,), (3, 5), (64, 129), (0, 4), (300_000,), ()):
            parts = world.everyone(*shape, dtype=dtype)
            mine = parts[world.rank].clone()
            got = group.all_reduce(mine)
            assert torch.equal(mine, parts[world.rank]), "the input was changed"
            assert (got.dtype, got.device) == (dtype, mine.device)
            assert torch.equal(got, total(parts)), (dtype, shape)
    strided = world.integers(world.rank, 8, 6)[:, ::2]
    assert torch.equal(group.all_reduce(strided), total(world.everyone(8, 6))[:, ::2]), "strided input"
    expanded = world.integers(world.rank, 1, 6).expand(4, 6)
    assert torch.equal(group.all_reduce(expanded), total(world.everyone(1, 6)).expand(4, 6)), "expanded input"


def same_bits(world: World) -> None:
    """Sums that need rounding come out the same on every rank, each time, and are as good as their dtype allows."""
    group = world.group()
    for dtype in world.dtypes:
        noise = [
            torch.randn(5000, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(world.size)
        ]
        mine = noise[world.rank].to(world.device)
        got = group.all_reduce(mine)
        first, *others = group.all_gather(got[None]).unbind(0)
        assert all(torch.equal(first, other) for other in others), dtype
        exact = torch.stack(noise).double()
        error = (got.cpu().double() - exact.sum(0)).abs()
        unit = torch.finfo(dtype).eps / 2
        assert (error <= world.size * unit * exact.abs().sum(0) + torch.finfo(dtype).tiny).all(), dtype
        if world.platform.capabilities().deterministic:
            assert torch.equal(group.all_reduce(mine), got), "the same call gave other bits"


def results_stay(world: World) -> None:
    """Results are tensors of their own: later calls, and changes of the input, leave them as they are."""
    group = world.group()
    mine = world.integers(world.rank, 4, world.size * 3)
    want = total(world.everyone(4, world.size * 3))
    calls: list[Callable[[Tensor], Tensor]] = [
        group.all_reduce,
        lambda x: group.all_gather(x, 1),
        lambda x: group.all_gather(x, 1, [x.shape[1]] * world.size),
    ]
    held = [(call, call(mine)) for call in calls]
    copies = [got.clone() for _, got in held]
    assert torch.equal(held[0][1], want)
    changed = mine.clone()
    for call in calls:
        call(changed * 2 + 1)
    mine.fill_(-5)
    for (_, got), copy in zip(held, copies, strict=True):
        assert torch.equal(got, copy), "a result was overwritten"
    held[0][1].fill_(7)
    assert bool((mine == -5).all()), "a result shares the input's memory"


def many_calls(world: World) -> None:
    """Hundreds of calls of sizes in no order, each used at once by what comes next."""
    group = world.group()
    draw = random.Random(0)
    for step in range(150):
        size = draw.choice((1, 3, 64, 1000, 4097, 60_000))
        mine = torch.full((size,), float(world.rank + step), device=world.device)
        want = float(sum(rank + step for rank in range(world.size)))
        if step % 3 == 0:
            assert bool(group.all_gather(mine)[-1] == world.size - 1 + step), step
        assert bool((group.all_reduce(mine) * 2 == 2 * want).all()), (step, size)


def late_ranks(world: World) -> None:
    """A result is complete when it is used, however late the others come."""
    group = world.group()
    for late in range(world.size):
        mine = world.integers(world.rank, 100_000)
        if world.rank == late:
            time.sleep(0.3)
        got = group.all_reduce(mine) + 1
        assert torch.equal(got, total(world.everyone(100_000)) + 1), f"rank {late} came late"
        if world.rank == late:
            time.sleep(0.3)
        assert torch.equal(group.all_gather(mine[None]), torch.stack(world.everyone(100_000))), f"rank {late} came late"


def all_gather(world: World) -> None:
    """Along every dimension, and with sizes that differ."""
    group = world.group()
    parts = world.everyone(4, 3, 5)
    for dim in (0, 1, 2, -1):
        assert torch.equal(group.all_gather(parts[world.rank], dim), torch.cat(parts, dim)), dim
        strided = parts[world.rank].transpose(0, 2)
        assert torch.equal(group.all_gather(strided, dim), torch.cat([p.transpose(0, 2) for p in parts], dim)), dim
    for dtype in (*world.dtypes, torch.int64, torch.int32):
        others = world.everyone(3, 2, dtype=dtype)
        mine = others[world.rank].clone()
        assert torch.equal(group.all_gather(mine), torch.cat(others)), dtype
        assert torch.equal(mine, others[world.rank]), "the input was changed"
    assert group.all_gather(torch.ones(0, 4, device=world.device)).shape == (0, 4)
    none = [0] * (world.size - 1) + [2]
    last = world.integers(world.size - 1, 2, 3)
    assert torch.equal(group.all_gather(last[: none[world.rank]], 0, none), last), "parts that are empty"
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
    empty = group.all_to_all(torch.ones(0, 3, device=world.device), [0] * world.size, [0] * world.size)
    assert empty.shape == (0, 3)
    send, receive = ([len(rows(world.rank, r)) for r in ranks], [len(rows(r, world.rank)) for r in ranks])
    got = group.all_to_all(torch.cat([rows(world.rank, r) for r in ranks]), send, receive)
    assert torch.equal(got, torch.cat([rows(r, world.rank) for r in ranks]))
    one_way = [5 if r == 0 else 0 for r in ranks]  # all rows go to the first rank
    strided = world.integers(world.rank, 3, 5).T
    before = strided.clone()
    got = group.all_to_all(strided, one_way, [5 if world.rank == 0 else 0] * world.size)
    parts = [x.T for x in world.everyone(3, 5)] if world.rank == 0 else [strided[:0]]
    assert torch.equal(got, torch.cat(parts)), "all rows to one rank"
    assert torch.equal(strided, before), "the input was changed"


def broadcast(world: World) -> None:
    """From every rank."""
    group = world.group()
    for src in range(world.size):
        mine = world.integers(world.rank, 5, 2)
        assert torch.equal(group.broadcast(mine, src), world.integers(src, 5, 2)), src
        assert torch.equal(mine, world.integers(world.rank, 5, 2)), "the input was changed"
        ids = world.integers(world.rank, 3, dtype=torch.int64)
        assert torch.equal(group.broadcast(ids, src), world.integers(src, 3, dtype=torch.int64)), src
        assert torch.equal(group.broadcast(mine.T, src), world.integers(src, 5, 2).T), "strided input"
        assert group.broadcast(mine[:0], src).shape == (0, 2)


def send_receive(world: World) -> None:
    """Round the ring."""
    group = world.group()
    if world.size == 1:
        return
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for dtype in (world.dtypes[0], torch.float32, torch.int64):
        mine, like = world.integers(world.rank, 6, 4, dtype=dtype).T, world.integers(world.rank, 4, 6, dtype=dtype)
        if world.rank == 0:
            group.send(mine, after)
            got = group.receive(like, before)
        else:
            got = group.receive(like, before)
            group.send(mine, after)
        assert torch.equal(got, world.integers(before, 6, 4, dtype=dtype).T)
        assert torch.equal(like, world.integers(world.rank, 4, 6, dtype=dtype)), (
            "the tensor that says the shape was changed"
        )
        assert torch.equal(mine, world.integers(world.rank, 6, 4, dtype=dtype).T), "the input was changed"


def overlapping_groups(world: World) -> None:
    """Two groups of the same ranks and one of each rank alone: none hears another."""
    first, second = world.group("tp"), world.group("ep")
    alone = world.group("pp", (world.rank,))
    mine = world.integers(world.rank, 9)
    assert torch.equal(alone.all_reduce(mine), mine)
    assert torch.equal(first.all_reduce(mine), total(world.everyone(9)))
    assert torch.equal(second.all_gather(mine[None]), torch.stack(world.everyone(9)))
    assert (alone.rank, alone.size, first.rank, first.size) == (0, 1, world.rank, world.size)


def group_order(world: World) -> None:
    """The group's order counts, not the ranks' numbers; a group need not have all ranks, and others do not wait."""
    backwards = tuple(reversed(range(world.size)))
    group = world.group("tp", backwards)
    assert group.rank == world.size - 1 - world.rank
    mine = world.integers(world.rank, 2, 3)
    want = torch.cat([world.integers(rank, 2, 3) for rank in backwards])
    assert torch.equal(group.all_gather(mine), want), "gathered in another order"
    assert torch.equal(group.all_gather(mine, 0, [2] * world.size), want), "gathered in another order"
    scattered = group.reduce_scatter(torch.arange(2.0 * world.size, device=world.device))
    assert torch.equal(scattered, world.size * torch.arange(2.0, device=world.device) + 2 * world.size * group.rank)
    for src in range(world.size):
        assert torch.equal(group.broadcast(mine, src), world.integers(backwards[src], 2, 3)), "another source"
    rows = torch.full((world.size, 1), float(world.rank), device=world.device)
    exchanged = group.all_to_all(rows, [1] * world.size, [1] * world.size)
    assert exchanged.flatten().tolist() == [float(rank) for rank in backwards], "another order of rows"


def part_of_the_ranks(world: World) -> None:
    """Groups of two ranks that overlap: only their members call, and the sums are theirs."""
    for first in range(world.size - 1):
        ranks = (first, first + 1)
        if world.rank in ranks:
            group = world.group("dp", ranks)
            got = group.all_reduce(world.integers(world.rank, 33))
            assert torch.equal(got, total([world.integers(rank, 33) for rank in ranks])), ranks
            assert torch.equal(
                group.all_gather(world.integers(world.rank, 5)), torch.cat([world.integers(rank, 5) for rank in ranks])
            )
            group.barrier()
            group.close()


def held_groups(world: World) -> None:
    """Groups of two ranks that overlap and stay open: each rank is in as many as it is, and all can be used."""
    held: dict[tuple[int, ...], Communicator] = {}
    for ranks in [(first, first + 1) for first in range(world.size - 1)]:
        if world.rank in ranks:
            held[ranks] = world.group("tp", ranks)
    held[tuple(range(world.size))] = world.group("dp")
    for members, group in held.items():
        got = group.all_reduce(world.integers(world.rank, 21))
        assert torch.equal(got, total([world.integers(rank, 21) for rank in members])), members
    for group in held.values():
        group.close()


def made_again(world: World) -> None:
    """A group like one that was closed is a new one, whatever other groups some of its ranks made in between."""
    for attempt in range(3):
        group = world.group("cp")
        others = [world.group("ep", (world.rank,)) for _ in range(world.rank)]
        if world.rank < 2 <= world.size:
            pair = world.group("pp", (0, 1))
            others.append(pair)
            assert torch.equal(pair.all_reduce(world.integers(world.rank, 5)), total(world.everyone(5)[:2])), attempt
        assert torch.equal(group.all_reduce(world.integers(world.rank, 13)), total(world.everyone(13))), attempt
        group.close()
        if attempt:
            for other in others:
                other.close()


def captured(world: World) -> None:
    """Where the communicator is capturable: replays on all ranks, of what the tensors hold by then."""
    group, graphs = world.group(), world.platform.graphs()
    if not group.capturable or graphs is None or world.platform.capabilities().graphs == "none":
        return
    x, out, every = (torch.zeros(n, device=world.device) for n in (100, 100, 100 * world.size))

    def launch() -> None:
        out.copy_(group.all_reduce(x) + 1)
        every.copy_(group.all_gather(x))

    launch()
    world.platform.device().synchronize()
    graph = graphs.capture(launch)
    for step in range(5):
        parts = [world.integers(10 * step + rank, 100) for rank in range(world.size)]
        x.copy_(parts[world.rank])
        graph.replay()
        assert torch.equal(out, total(parts) + 1), f"replay {step}"
        assert torch.equal(every, torch.cat(parts)), f"replay {step}"


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
        _fails_in_time(label, world.group(timeout=TIMEOUT), call)


def mismatch_of_two(world: World) -> None:
    """Something else is received than was sent: the receiver says so; the sender may be done already."""
    group = world.group(timeout=TIMEOUT)
    sent = torch.ones(6, device=world.device)
    if world.rank == 0 and world.size > 1:
        with suppress(CommunicatorError):
            group.send(sent, 1)
    elif world.rank == 1:
        _fails_in_time("receive", group, lambda g: g.receive(sent[:4], 0))


def absent_rank(world: World) -> None:
    """A rank that never comes."""
    group = world.group(timeout=TIMEOUT)
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
    group, other = world.group(timeout=TIMEOUT), world.group()
    group.close()
    group.close()
    one = torch.ones(1, device=world.device)
    _fails_in_time("closed", group, lambda g: g.all_reduce(one))
    _fails_in_time("closed", group, lambda g: g.all_gather(one))
    _fails_in_time("closed", group, lambda g: g.barrier())
    assert float(other.all_reduce(torch.ones(1, device=world.device))) == world.size


def undeclared(world: World) -> None:
    """A collective that is not declared is refused, and the others go on."""
    group, one = world.group(), torch.ones(world.size, 1, device=world.device)
    ones = [1] * world.size
    calls: dict[str, Callable[[], object]] = {
        "reduce_scatter": lambda: group.reduce_scatter(one),
        "all_to_all": lambda: group.all_to_all(one, ones, ones),
        "broadcast": lambda: group.broadcast(one),
        "send": lambda: group.send(one, 0),
        "receive": lambda: group.receive(one, 0),
        "barrier": group.barrier,
    }
    for name in sorted(calls.keys() - world.platform.capabilities().collectives):
        try:
            calls[name]()
        except UnsupportedCapability:
            continue
        raise AssertionError(f"{name} is not declared, and it was not refused")
    assert float(group.all_reduce(one)[0]) == world.size


_REQUIRED = ("all_reduce", "all_gather")

CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    check.__name__: (check, needs)
    for check, needs in (
        (all_reduce, _REQUIRED),
        (same_bits, _REQUIRED),
        (results_stay, _REQUIRED),
        (many_calls, _REQUIRED),
        (late_ranks, _REQUIRED),
        (all_gather, _REQUIRED),
        (reduce_scatter, ("reduce_scatter",)),
        (all_to_all, ("all_to_all",)),
        (broadcast, ("broadcast",)),
        (send_receive, ("send", "receive")),
        (overlapping_groups, _REQUIRED),
        (group_order, (*_REQUIRED, "reduce_scatter", "broadcast", "all_to_all")),
        (part_of_the_ranks, (*_REQUIRED, "barrier")),
        (held_groups, _REQUIRED),
        (made_again, _REQUIRED),
        (captured, _REQUIRED),
        (delayed_rank, (*_REQUIRED, "barrier")),
        (mismatch, (*_REQUIRED, "broadcast")),
        (mismatch_of_two, ("send", "receive")),
        (absent_rank, _REQUIRED),
        (undeclared, _REQUIRED),
        (closed, (*_REQUIRED, "barrier")),
    )
}
"""By name: the check, and the collectives that it needs."""
