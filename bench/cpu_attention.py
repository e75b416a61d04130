"""The CPU platform's attention beside plain torch's over the same batch, both with the writes into the cache.

    python bench/cpu_attention.py --flags="-mno-amx-bf16 -mno-amx-tile"

One thread, processor time, best of many calls. `--flags` builds the kernels for a processor with less.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine_cpu import CpuPlatform, native
from engine_cpu.attention import CpuAttention
from engine_sdk import AttentionBatch, AttentionSpec, TorchAttention

HEADS, KV_HEADS, SIZE, BLOCK = 16, 8, 128, 32
SHAPES = [
    (1, 512, 1),
    (1, 2048, 1),
    (8, 512, 1),
    (8, 2048, 1),
    (32, 512, 1),
    (1, 1024, 1024),
    (1, 2048, 1024),
    (8, 128, 128),
]
"""Requests, their length, and how many of these tokens are new."""


def batch(num: int, length: int, new: int) -> AttentionBatch:
    width = -(-length // BLOCK)
    table = (torch.randperm(num * width) + 1).view(num, width).int()
    at = torch.arange(length - new, length)
    slots = (table[:, at // BLOCK].long() * BLOCK + at % BLOCK).flatten()
    starts, lengths = torch.arange(0, (num + 1) * new, new).int(), torch.full((num,), length).int()
    return AttentionBatch(starts, lengths, table, slots, starts, lengths, num if new == 1 else 0, new, length, BLOCK)


def seconds(call: Callable[[], None], budget: float = 0.5) -> float:
    call()
    best, end = math.inf, time.perf_counter() + budget
    while time.perf_counter() < end:
        begin = time.process_time()
        call()
        best = min(best, time.process_time() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flags", default="", help="of the compiler, after ours")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels = ctypes.CDLL(str(native.build(args.flags.split(), Path(tempfile.mkdtemp()))))
    print(
        f"{'dtype':<10}{'requests':>9}{'length':>7}{'new':>6}{'ms':>9}{'torch':>9}{'ratio':>7}{'GB/s':>7}{'GFLOP/s':>9}"
    )
    for dtype in (torch.bfloat16, torch.float32):
        spec = AttentionSpec(HEADS, KV_HEADS, SIZE, SIZE, SIZE**-0.5, dtype, dtype)
        for num, length, new in SHAPES:
            step = batch(num, length, new)
            q, k, v = (torch.randn(num * new, heads, SIZE).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
            took = []
            for backend in (CpuAttention(spec, kernels, CpuPlatform().capabilities()), TorchAttention(spec)):
                layout = backend.layout(BLOCK)
                blocks = int(step.block_table.max()) + 1
                cache = layout.bind(torch.zeros(blocks * layout.block_bytes, dtype=torch.uint8), blocks)
                out, plan = torch.empty_like(q), backend.plan(step)
                took.append(seconds(lambda: backend.forward(q, k, v, cache, plan, out)))  # noqa: B023
            moved = 2 * num * length * KV_HEADS * SIZE * dtype.itemsize
            work = 4 * num * HEADS * SIZE * (length * new - new * (new - 1) / 2)
            print(
                f"{str(dtype)[6:]:<10}{num:9}{length:7}{new:6}{took[0] * 1e3:9.3f}{took[1] * 1e3:9.3f}"
                f"{took[1] / took[0]:7.2f}{moved / took[0] / 1e9:7.1f}{work / took[0] / 1e9:9.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
