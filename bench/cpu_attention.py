"""The CPU platform's attention beside vLLM's and plain torch's over the same batches, with the writes into the cache.

    python bench/cpu_attention.py --vllm VLLM/bin/python --flags="-mno-amx-bf16 -mno-amx-tile"

Caches of several layers take turns, so that none is in the processor's when it is read. A call counts as long as the
best of its layer takes, and of layers the median: in processor time with one thread, which says something on a busy
machine too, and in wall time with several. Each contestant is a process of its own, and they take turns too, as others
take their share of a machine's memory at times; the best turn counts. The peer is named by the Python of an environment
that has it. `--flags` builds the kernels for a processor with less.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADS, KV_HEADS, SIZE, BLOCK = 16, 8, 128, 32
SHAPES = [
    (1, 512, 1),
    (1, 4096, 1),
    (8, 144, 1),
    (16, 144, 1),
    (16, 528, 1),
    (8, 2048, 1),
    (1, 128, 128),
    (8, 128, 128),
    (1, 1024, 1024),
    (1, 2048, 1024),
    (1, 4096, 4096),
]
"""Requests, their length, and how many of these tokens are new."""

TURNS = 200 << 20
"""Bytes of caches that take turns."""

ROUNDS = 3
"""Turns of each contestant."""

Layers = Sequence[Callable[[], object]]


class Shape:
    """Requests of equal length, in blocks of `block` tokens that lie anywhere."""

    def __init__(self, num: int, length: int, new: int, block: int) -> None:
        draw, width = torch.Generator().manual_seed(0), -(-length // block)
        self.num, self.length, self.new, self.block, self.blocks = num, length, new, block, num * width + 1
        self.table = (torch.randperm(num * width, generator=draw) + 1).view(num, width).int()
        at = torch.arange(length - new, length)
        self.slots = (self.table[:, at // block].long() * block + at % block).flatten()
        self.starts, self.lengths = torch.arange(0, (num + 1) * new, new).int(), torch.full((num,), length).int()

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Queries, keys and values as a product of all three leaves them."""
        fused = torch.randn(self.num * self.new, HEADS + 2 * KV_HEADS, SIZE).to(dtype)
        return list(fused.split((HEADS, KV_HEADS, KV_HEADS), 1))

    def layers(self) -> int:
        return max(1, TURNS // (self.blocks * self.block * KV_HEADS * SIZE * 4))


def engine(num: int, length: int, new: int, args: argparse.Namespace) -> Layers:
    import ctypes

    from engine_cpu import CpuPlatform, native
    from engine_cpu.attention import CpuAttention
    from engine_sdk import AttentionBatch, AttentionSpec, TorchAttention

    shape, dtype = Shape(num, length, new, BLOCK), getattr(torch, args.dtype)
    decodes = num if new == 1 else 0
    step = AttentionBatch(
        *(shape.starts, shape.lengths, shape.table, shape.slots, shape.starts, shape.lengths),
        *(decodes, new, length, BLOCK),
    )
    spec = AttentionSpec(HEADS, KV_HEADS, SIZE, SIZE, SIZE**-0.5, dtype, dtype)
    if args.run == "torch":
        backend: Any = TorchAttention(spec)
    else:
        kernels = ctypes.CDLL(str(native.build(args.flags.split(), Path(args.folder))))
        backend = CpuAttention(spec, kernels, CpuPlatform().capabilities())
    memory = CpuPlatform().memory()
    layout, plan, (q, k, v) = backend.layout(BLOCK), backend.plan(step), shape.inputs(dtype)
    out = torch.empty(q.shape, dtype=dtype)

    def layer() -> Callable[[], object]:
        cache = layout.bind(memory.allocate(shape.blocks * layout.block_bytes).fill_(60), shape.blocks)
        return lambda: backend.forward(q, k, v, cache, plan, out)

    return [layer() for _ in range(shape.layers())]


def vllm(num: int, length: int, new: int, args: argparse.Namespace) -> Layers:
    """Through the operations that its backend calls, see ``vllm/v1/attention/backends/cpu_attn.py``."""
    import importlib.util

    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        found = importlib.util.find_spec("vllm")
        assert found is not None
        assert found.origin is not None
        torch.ops.load_library(str(Path(found.origin).with_name("_C.abi3.so")))
        torch.cpu._init_amx()  # as vLLM does: tiles are asked for
    ops, dtype = torch.ops._C, getattr(torch, args.dtype)
    shape = Shape(num, length, new, 128)  # its default
    q, k, v = shape.inputs(dtype)
    out, isa = torch.empty(q.shape, dtype=dtype), "amx" if dtype == torch.bfloat16 else "vec"
    starts, lengths, table = shape.starts, shape.lengths, shape.table
    plan = ops.get_scheduler_metadata(
        *(num, HEADS, KV_HEADS, SIZE, lengths, dtype, starts, True, -1, isa, True, None, "auto")
    )

    def layer() -> Callable[[], object]:
        cache = torch.full((shape.blocks, KV_HEADS, 2 * shape.block, SIZE), 0.01, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)

        def forward() -> None:
            ops.cpu_attn_reshape_and_cache(k, v, keys, values, shape.slots, isa, 1.0, 1.0, "auto")
            ops.cpu_attention_with_kv_cache(
                *(q, keys, values, out, starts, lengths, SIZE**-0.5, True, None, -1, table, 0.0, plan, None, None),
                *(1.0, 1.0, "auto"),
            )

        return forward

    return [layer() for _ in range(shape.layers())]


CONTESTANTS: dict[str, Callable[[int, int, int, argparse.Namespace], Layers]]
CONTESTANTS = {"engine": engine, "torch": engine, "vllm": vllm}


def seconds(layers: Layers, budget: float) -> float:
    """Of one call: the best of each layer, and the median of these."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best, end = [math.inf] * len(layers), time.perf_counter() + budget
    while time.perf_counter() < end:
        for i, layer in enumerate(layers):
            begin = clock()
            layer()
            best[i] = min(best[i], clock() - begin)
    return statistics.median(best)


class Contestant:
    """A process that measures shapes when it is asked to."""

    def __init__(self, name: str, python: str, argv: Sequence[str]) -> None:
        command = [python, __file__, *argv, "--run", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, shape: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        time.sleep(0.2)  # threads of the one before wait busily for as long
        print(shape, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def answer(args: argparse.Namespace) -> None:
    """What a contestant's process does: a line of seconds for each line that names a shape."""
    asked = ""
    layers: Layers = []
    for line in sys.stdin:
        if line != asked:
            layers = []  # before there are others
            num, length, new = map(int, line.split(","))
            asked, layers = line, CONTESTANTS[args.run](num, length, new, args)
        print(seconds(layers, args.budget / ROUNDS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--torch", action="store_true", help="the SDK's attention, in plain torch")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shapes", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--budget", type=float, default=0.5, help="seconds a shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--flags", default="", help="of the compiler, after ours")
    parser.add_argument("--run", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        answer(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        argv = [*sys.argv[1:], "--folder", folder]
        pythons = {"engine": sys.executable, "vllm": args.vllm, "torch": sys.executable if args.torch else None}
        contestants = {name: Contestant(name, python, argv) for name, python in pythons.items() if python}
        print(
            f"{'requests':>8}{'length':>7}{'new':>6}", *(f"{n:>9}" for n in contestants), f"{'GB/s':>7}{'GFLOP/s':>9}"
        )
        for shape in args.shapes:
            report(shape, [[each.measure(shape) for each in contestants.values()] for _ in range(ROUNDS)], args)
        for each in contestants.values():
            each.end()


def report(shape: str, rounds: Sequence[Sequence[float]], args: argparse.Namespace) -> None:
    num, length, new = map(int, shape.split(","))
    us = [min(times) * 1e6 for times in zip(*rounds, strict=True)]
    moved = 2 * num * length * KV_HEADS * SIZE * getattr(torch, args.dtype).itemsize
    work = 4 * num * HEADS * SIZE * (length * new - new * (new - 1) / 2)
    print(
        f"{num:8}{length:7}{new:6}",
        *(f"{x:9.0f}" for x in us),
        f"{moved / us[0] / 1e3:7.1f}{work / us[0] / 1e3:9.0f}",
        *(f"{x / us[0]:6.2f}x" for x in us[1:]),
        flush=True,
    )


if __name__ == "__main__":
    main()
