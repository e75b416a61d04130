"""The CPU platform's linear layers of bf16 beside oneDNN's, weights of either in the order of its own; or its layers of
8 and 4 bits, in groups of so many, and how many times as fast as those of bf16 they are.

    python bench/cpu_linear.py --rows 1 8 16 512 --flags="-mno-amx-bf16 -mno-amx-tile"
    python bench/cpu_linear.py --quantised --shapes "gate, up"

Weights take turns, more than a shared cache of hundreds of MB holds, so that they come from memory as in a model. Best
of many rounds, with torch's threads. `--flags` builds the kernels for a processor with less; ``ONEDNN_MAX_CPU_ISA``
does the same for oneDNN.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine_cpu import CpuPlatform, native
from engine_cpu.linear import PackedLinear
from engine_cpu.memory import HostMemory
from engine_cpu.quantised import CpuQuantized
from engine_sdk import LinearMethod, QuantScheme

SHAPES = {
    "qkv": (4096, 1024),
    "o": (1024, 2048),
    "gate, up": (6144, 1024),
    "down": (1024, 3072),
    "head": (151936, 1024),
}
"""Outputs and inputs, of Qwen3-0.6B."""

TURNS = 1 << 30
"""Bytes of weights that take turns."""


SCHEMES = QuantScheme("int8", 8, None), QuantScheme("int4", 4, 128), QuantScheme("int4", 4, 32)


def seconds(calls: Sequence[Callable[[], object]], budget: float = 0.4) -> float:
    """Of one call, in the best round over all."""
    best, end = math.inf, time.perf_counter() + budget
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for call in calls:
            call()
        best = min(best, time.perf_counter() - begin)
    return best / len(calls)


def measure(weight: Tensor, rows: Sequence[int], methods: Sequence[LinearMethod]) -> Iterator[tuple[int, list[float]]]:
    """A number of rows, and how long each method takes for them."""
    packed = [[m.pack(weight, None) for _ in range(max(1, TURNS // weight.nbytes))] for m in methods]
    for count in rows:
        x = torch.randn(count, weight.shape[1]).bfloat16()
        yield (
            count,
            [
                seconds([functools.partial(m.apply, x, p) for p in many])
                for m, many in zip(methods, packed, strict=True)
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 512])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--flags", default="", help="of the compiler, after ours")
    parser.add_argument("--quantised", action="store_true", help="8 and 4 bits beside bf16, in place of oneDNN's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels = ctypes.CDLL(str(native.build(args.flags.split(), Path(tempfile.mkdtemp()))))
    large = torch.ones(TURNS)
    print(f"reading takes place at {large.nbytes / seconds([large.sum]) / 1e9:.1f} GB/s")
    del large
    if args.quantised:
        print(f"{'shape':<10}{'rows':>5}{'bf16, us':>9}" + "".join(f"{_name(scheme):>10}" for scheme in SCHEMES))
    else:
        print(f"{'shape':<10}{'rows':>5}{'us':>9}{'oneDNN':>9}{'ratio':>7}{'GB/s':>7}{'GFLOP/s':>9}")
    for name in args.shapes:
        weight, memory = torch.randn(SHAPES[name]).bfloat16(), HostMemory(CpuPlatform().device())
        quantised = [CpuQuantized(scheme, memory, kernels) for scheme in SCHEMES]
        others = quantised if args.quantised else [PackedLinear(memory)]
        for count, (plain, *took) in measure(weight, args.rows, [PackedLinear(memory, kernels), *others]):
            print(f"{name:<10}{count:5}{plain * 1e6:9.0f}", end="")
            if args.quantised:
                print(*(f"{plain / t:10.2f}" for t in took), sep="", flush=True)
            else:
                print(
                    f"{took[0] * 1e6:9.0f}{took[0] / plain:7.2f}"
                    f"{weight.nbytes / plain / 1e9:7.1f}{2 * count * weight.numel() / plain / 1e9:9.0f}",
                    flush=True,
                )


def _name(scheme: QuantScheme) -> str:
    return scheme.name + (f"/{scheme.group_size}" if scheme.group_size else "")


if __name__ == "__main__":
    main()
