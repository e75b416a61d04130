"""All-reduce between the devices of one machine: the platform's communicator beside torch.distributed alone.

    python bench/collectives.py --ranks 2
    python bench/collectives.py --ranks 2 --platform cpu --sizes 8192 1048576

Microseconds of one call, the median of many, eagerly and in a captured graph of eight calls, where the communicator may
be captured. The bandwidth is `busbw` of NCCL's tests: 2 (n - 1) / n times the bytes, over the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engine.plugins import load_platform
from engine_sdk import GroupSpec

SIZES = tuple(8192 << i for i in range(11))
CALLS = 8


def microseconds(call: Callable[[], object], synchronize: Callable[[], None], repeats: int) -> float:
    """Of one call; the median of rounds of `CALLS`."""
    times = []
    for round_ in range(repeats + 2):
        synchronize()
        dist.barrier()
        begin = time.perf_counter()
        call()
        synchronize()
        if round_ >= 2:
            times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(times)


def rank_main(rank: int, args: argparse.Namespace, store: str) -> None:
    platform = load_platform(args.platform, rank)
    device = platform.device()
    device.activate()
    here = device.torch_device
    dist.init_process_group(
        dist.get_default_backend_for_device(here), init_method=f"file://{store}", rank=rank, world_size=args.ranks,
        device_id=here if here.type != "cpu" else None,
    )  # fmt: skip
    group = platform.communicator(GroupSpec("tp", tuple(range(args.ranks)), rank))
    graphs = platform.graphs() if group.capturable else None
    if rank == 0:
        print(f"{args.platform}, {args.ranks} ranks, bf16; us a call, and GB/s on the bus")
        print(f"{'bytes':>9} {'torch':>8} {'ours':>8} {'captured':>8} {'GB/s':>7}", flush=True)
    for size in args.sizes:
        x = torch.ones(size // 2, dtype=torch.bfloat16, device=here)

        def alone(x: torch.Tensor = x) -> None:
            for _ in range(CALLS):
                dist.all_reduce(x)

        def ours(x: torch.Tensor = x) -> None:
            for _ in range(CALLS):
                group.all_reduce(x)

        found = [microseconds(call, device.synchronize, args.repeats) for call in (alone, ours)]
        if graphs is not None:
            x.zero_()
            graph = graphs.capture(ours)
            found.append(microseconds(graph.replay, device.synchronize, args.repeats))
        if rank == 0:
            shown = f"{found[2]:8.1f}" if len(found) > 2 else f"{'':>8}"
            bus = 2 * (args.ranks - 1) / args.ranks * size / min(found) / 1e3
            print(f"{size:9} {found[0]:8.1f} {found[1]:8.1f} {shown} {bus:7.1f}", flush=True)
    dist.barrier()
    os._exit(0)  # a captured graph holds its communicator, whose end would wait for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (args, os.path.join(folder, "store")), args.ranks)


if __name__ == "__main__":
    main()
