"""Paged attention on one accelerator: microseconds, rates, and the ratio to the best of torch's dense kernels.

    python bench/attention.py                                  the standard shapes, as the platform runs them
    python bench/attention.py --sweep --write --limit 150      try cuts of the kernel, keep the best in the tuning table
    python bench/attention.py --only decode --models 8b --batch 32 256

A peer is `scaled_dot_product_attention` through each of its kernels (flash, cuDNN, memory-efficient) on dense keys of
the same lengths, and FlashInfer on the same pages where it is installed. Peers do not write the cache, and the dense
ones read it in order; ours is timed with its write and without. Everything is captured in a graph and replayed over
several sets of inputs, more than the caches hold, so the times are the device's; `host` is what one call takes to
launch. The floor is the bytes of queries, keys, values and outputs over the bandwidth of a large copy, or the
floating-point operations over the rate of a large product: whichever is more.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from engine.plugins import load_platform
from engine_sdk import AttentionBackend, AttentionBatch, AttentionSpec
from engine_sdk.triton.attention import TritonAttention
from engine_sdk.triton.kv_cache import TritonHeadMajor, TritonTokenMajor
from engine_sdk.triton.tuning import TABLE, AttentionTuning, Tile, attention_tuning, device_properties

ACCELERATOR = torch.accelerator.current_accelerator() or torch.device("cpu")
MODULE = torch.get_device_module(ACCELERATOR.type)
BEGAN = time.perf_counter()
CACHE_BYTES = 128 << 20  # inputs are rotated until they are more than this


@dataclass(frozen=True)
class Shape:
    """Requests of one length: `new` tokens each after `computed` ones."""

    name: str
    heads: tuple[int, int]
    dims: tuple[int, int]
    requests: int
    computed: int
    new: int
    features: tuple[tuple[str, Any], ...] = ()

    @property
    def length(self) -> int:
        return self.computed + self.new

    def spec(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> AttentionSpec:
        (h, k), (d, e) = self.heads, self.dims
        return AttentionSpec(h, k, d, e, d**-0.5, dtype, kv_dtype, **dict(self.features))

    def __str__(self) -> str:
        what = f"{self.name} b{self.requests} {self.computed}+{self.new}"
        return " ".join([what, *(f"{name}={value}" for name, value in self.features)])


MODELS = {"0.6b": ((16, 8), (128, 128)), "8b": ((32, 8), (128, 128)), "30b": ((32, 4), (128, 128))}


def shapes(args: argparse.Namespace) -> Iterator[Shape]:
    """The shapes that were asked for."""
    if "decode" in args.only:
        for model, requests, context in itertools.product(args.models, args.batch, args.context):
            if requests * context <= 1 << 20:
                yield Shape(f"decode {model}", *MODELS[model], requests, context - 1, 1)
    if "prefill" in args.only:
        for model, (requests, computed, new) in itertools.product(
            args.models, ((1, 0, 2048), (4, 0, 2048), (1, 0, 8192), (1, 6144, 2048), (8, 1024, 64))
        ):
            yield Shape(f"prefill {model}", *MODELS[model], requests, computed, new)
    if "others" in args.only:
        window, sinks = ("window", 1024), ("sinks", True)
        yield Shape("gemma", (16, 8), (256, 256), 32, 4095, 1)
        yield Shape("gemma", (16, 8), (256, 256), 32, 4095, 1, (window, ("softcap", 50.0)))
        yield Shape("gemma", (16, 8), (256, 256), 1, 0, 4096, (window,))
        yield Shape("gpt-oss", (64, 8), (64, 64), 32, 4095, 1, (("window", 128), sinks))
        yield Shape("gpt-oss", (64, 8), (64, 64), 1, 0, 4096, (sinks,))
        yield Shape("latent", (16, 1), (576, 512), 32, 4095, 1)


class Inputs:
    """One set of tensors of a shape, its pages in random order."""

    def __init__(
        self, shape: Shape, spec: AttentionSpec, block_size: int, backend: AttentionBackend, seed: int
    ) -> None:
        torch.manual_seed(seed)
        r, new, length = shape.requests, shape.new, shape.length
        layout = backend.layout(block_size)
        width = -(-length // block_size)
        pitch = -(-layout.block_bytes // 256) * 256
        storage = torch.empty((1 + r * width) * pitch, dtype=torch.uint8, device=ACCELERATOR)
        halves = storage.view(torch.int16)
        for part in halves.split(1 << 28):
            values = torch.randn(part.numel() * 2 // spec.kv_dtype.itemsize, device=ACCELERATOR).to(spec.kv_dtype)
            part.copy_(values.view(torch.int16))
        self.cache = layout.bind(storage, 1 + r * width)
        table = (torch.randperm(r * width) + 1).view(r, width).to(torch.int32)
        starts = torch.arange(0, r * new + 1, new, dtype=torch.int32)
        lengths = torch.full((r,), length, dtype=torch.int32)
        at = torch.arange(shape.computed, length)
        slots = (table[:, at // block_size].long() * block_size + at % block_size).flatten()
        on = {"device": ACCELERATOR}
        self.batch = AttentionBatch(
            starts.to(**on), lengths.to(**on), table.to(**on), slots.to(**on), starts, lengths,
            r if new == 1 else 0, new, length, block_size,
        )  # fmt: skip
        (h, k), (d, e) = shape.heads, shape.dims
        on["dtype"] = spec.dtype
        self.q = torch.randn(r * new, h, d, **on)
        self.k = torch.randn(r * new, k, d, **on)
        self.v = torch.randn(r * new, k, e, **on)
        self.out = torch.empty(r * new, h, e, **on)
        self.sinks = torch.randn(h, **on) if spec.sinks else None

    def forward(self, backend: AttentionBackend, plan: Any, write: bool) -> None:
        k, v = (self.k, self.v) if write else (None, None)
        backend.forward(self.q, k, v, self.cache, plan, self.out, sinks=self.sinks)


def seconds(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Of one call: all of them captured in one graph, replayed; the median."""
    for call in calls[:2]:
        call()
    MODULE.synchronize()
    graph = MODULE.CUDAGraph()
    with MODULE.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = MODULE.Event(enable_timing=True), MODULE.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def host_seconds(call: Callable[[], object]) -> float:
    """What launching takes."""
    MODULE.synchronize()
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    MODULE.synchronize()
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a large product."""
    x = torch.randn(1 << 30, dtype=torch.bfloat16, device=ACCELERATOR)
    y = torch.empty_like(x)
    copy = seconds([lambda: y.copy_(x)])
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=ACCELERATOR) for _ in range(2))
    product = seconds([lambda: a @ b] * 4)
    return 2 * x.nbytes / copy, 2 * 8192**3 / product


def work(shape: Shape, spec: AttentionSpec) -> tuple[float, float]:
    """Bytes that must be moved, and floating-point operations."""
    (h, k), (d, e) = shape.heads, shape.dims
    reach = shape.length if spec.window is None else min(shape.length, spec.window + shape.new - 1)
    rows = torch.arange(shape.computed, shape.length) + 1
    pairs = float((rows if spec.window is None else rows.clamp(max=spec.window)).sum())
    moved = reach * k * (d + e) * spec.kv_dtype.itemsize + shape.new * h * (d + e) * spec.dtype.itemsize
    return shape.requests * moved, shape.requests * pairs * h * 2 * (d + e)


def peers(shape: Shape, spec: AttentionSpec, copies: int) -> dict[str, float]:
    """Seconds of each dense kernel that takes the shape; empty for what they have no notion of."""
    if shape.features or (shape.computed and shape.new > 1):
        return {}
    (h, k), (d, e) = shape.heads, shape.dims
    on = {"dtype": spec.dtype, "device": ACCELERATOR}
    sets = [
        tuple(
            torch.randn(shape.requests, n, t, w, **on)
            for n, t, w in ((h, shape.new, d), (k, shape.length, d), (k, shape.length, e))
        )
        for _ in range(copies)
    ]
    found = {}
    causal = shape.new > 1
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
    for name, kind in kinds.items():
        if kind == SDPBackend.EFFICIENT_ATTENTION:
            if not causal:  # a query a head: heads of a group as queries
                sets_of = [(q.view(shape.requests, k, h // k, d), *kv) for q, *kv in sets]
            elif shape.length * shape.requests * h > 1 << 19:
                continue
            else:
                sets_of = [(q, *(x.repeat_interleave(h // k, 1) for x in kv)) for q, *kv in sets]
            options: dict[str, Any] = {"is_causal": causal}
        else:
            sets_of, options = sets, {"is_causal": causal, "enable_gqa": True}

        def call(tensors: tuple[Tensor, ...], options: dict[str, Any] = options) -> Tensor:
            return F.scaled_dot_product_attention(*tensors, **options)

        try:
            with sdpa_kernel(kind):
                found[name] = seconds([lambda t=t: call(t) for t in sets_of])
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
    return found


def flashinfer_seconds(shape: Shape, spec: AttentionSpec, sets: list[Inputs], block_size: int) -> float | None:
    """FlashInfer on the same pages, which it wants token-major; None where it is not installed or refuses."""
    try:
        import flashinfer
    except ImportError:
        return None
    (h, k), (d, e) = shape.heads, shape.dims
    if shape.features or d != e:
        return None
    width = -(-shape.length // block_size)
    indptr = torch.arange(0, (shape.requests + 1) * width, width, dtype=torch.int32, device=ACCELERATOR)
    last = torch.full((shape.requests,), (shape.length - 1) % block_size + 1, dtype=torch.int32, device=ACCELERATOR)
    calls = []
    for inputs in sets:
        workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=ACCELERATOR)
        indices = inputs.batch.block_table.flatten()
        pages = (inputs.cache.keys, inputs.cache.values)
        if shape.new == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(indptr, indices, last, h, k, d, block_size, q_data_type=spec.dtype, kv_data_type=spec.kv_dtype)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            starts = inputs.batch.query_start
            wrapper.plan(starts, indptr, indices, last, h, k, d, block_size, causal=True, q_data_type=spec.dtype)
        calls.append(lambda w=wrapper, i=inputs, p=pages: w.run(i.q, p, out=i.out))
    return seconds(calls)


DECODE_CUTS = [
    (Tile(16, n, warps, depth), programs, least)
    for n, warps, depth in (
        (64, 4, 1), (64, 4, 2), (64, 4, 3), (32, 4, 3), (32, 2, 3), (64, 2, 1), (64, 2, 2), (64, 2, 3), (128, 4, 2),
    )
    for programs, least in ((2, 128), (4, 128), (4, 256), (8, 256))
]  # fmt: skip
PREFILL_CUTS = [
    Tile(*cut)
    for cut in (
        (128, 64, 8, 1), (128, 64, 8, 2), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3),
        (128, 64, 4, 1), (128, 64, 4, 2), (256, 64, 8, 1), (256, 64, 8, 2),
    )
]  # fmt: skip


def variants(default: AttentionTuning, shape: Shape) -> Iterator[AttentionTuning]:
    """Cuts to try, the default first."""
    yield default
    if shape.new == 1:
        for tile, programs, least in DECODE_CUTS:
            tile = replace(tile, block_m=default.decode.block_m)
            yield replace(default, decode=tile, programs_per_core=programs, least_keys=least)
    else:
        for tile in PREFILL_CUTS:
            yield replace(default, prefill=tile)


def compile_cut(shape: Shape, spec: AttentionSpec, block_size: int, cut: AttentionTuning) -> None:
    """Compile what a cut launches, into Triton's cache on disk; in a process of its own, so that many run at once."""
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)
    backend = TritonAttention(spec, tuning=cut)
    inputs = Inputs(shape, spec, block_size, backend, 0)
    with contextlib.suppress(OutOfResources):
        inputs.forward(backend, backend.plan(inputs.batch), True)


def compile_all(found: list[Shape], args: argparse.Namespace) -> None:
    """Compile all that a sweep will launch, a process a core."""
    todo = {}
    for shape in found:
        spec = shape.spec(*dtypes(args))
        for cut in variants(tuned(shape, spec), shape):
            small = replace(shape, requests=min(shape.requests, 2) if cut.programs_per_core > 1 else shape.requests)
            tile = cut.decode if shape.new == 1 else cut.prefill
            todo[spec, tile, shape.new == 1] = (small, spec, args.block_size, cut)
            if shape.new == 1:  # and the kernel that does not split
                todo[spec, tile, None] = (replace(small, computed=0), spec, args.block_size, cut)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 14), get_context("spawn")) as pool:
        for future in [pool.submit(compile_cut, *each) for each in todo.values()]:
            future.result()
    print(f"{len(todo)} kernels compiled  [{time.perf_counter() - BEGAN:.0f} s]", flush=True)


def dtypes(args: argparse.Namespace) -> tuple[torch.dtype, torch.dtype]:
    return getattr(torch, args.dtype), getattr(torch, args.kv_dtype or args.dtype)


def tuned(shape: Shape, spec: AttentionSpec) -> AttentionTuning:
    (h, k), (d, e) = shape.heads, shape.dims
    device = device_properties(ACCELERATOR)
    return attention_tuning(device, h // k, d, e, spec.dtype.itemsize, spec.kv_dtype.itemsize)


def check(inputs: Inputs, shape: Shape, spec: AttentionSpec) -> float:
    """The largest error of the first and last request beside fp64, relative to the largest output."""
    worst = 0.0
    (h, k), size = shape.heads, inputs.batch.block_size
    for request in (0, shape.requests - 1):
        blocks = inputs.batch.block_table[request].long()
        rows = slice(request * shape.new, (request + 1) * shape.new)
        keys, values = (
            x[blocks].flatten(0, 1)[: shape.length].to(torch.float64).repeat_interleave(h // k, 1)
            for x in (inputs.cache.keys, inputs.cache.values)
        )
        take = torch.unique(torch.tensor([0, shape.new // 2, shape.new - 1], device=ACCELERATOR))
        q = inputs.q[rows][take].double()
        scores = torch.einsum("thd,lhd->htl", q, keys) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        at, to = torch.arange(shape.length, device=ACCELERATOR), (take + shape.computed)[:, None]
        seen = at <= to
        if spec.window is not None:
            seen &= at > to - spec.window
        scores = scores.masked_fill(~seen, -math.inf)
        if inputs.sinks is not None:
            scores = torch.cat((scores, inputs.sinks.double()[:, None, None].expand(-1, len(take), 1)), 2)
        p = scores.softmax(2)[..., : shape.length]
        want = torch.einsum("htl,lhe->the", p, values)
        worst = max(worst, float((inputs.out[rows][take] - want).abs().max() / want.abs().max()))
        assert math.isfinite(worst), f"{shape}: the output is not finite"
    assert not size or worst < 0.02, f"{shape}: the error is {worst:.3g}"
    return worst


@dataclass
class Result:
    """Of one shape, in seconds; `of_cut` of each cut that was tried."""

    shape: Shape
    floor: float
    moved: float
    operations: float
    of_cut: dict[AttentionTuning, float]
    best: float
    with_write: float
    host: float
    plan: float
    peers: dict[str, float]
    error: float

    def __str__(self) -> str:
        peers = ", ".join(f"{name} {t * 1e6:.1f}" for name, t in self.peers.items())
        ratio = f"  {min(self.peers.values()) / self.best:.2f} of {peers}" if self.peers else ""
        return (
            f"{self.shape!s:40} {self.best * 1e6:8.1f} {self.with_write * 1e6:8.1f} {self.host * 1e6:5.0f} "
            f"{self.plan * 1e6:5.0f} {self.moved / self.best / 1e9:6.0f} {self.operations / self.best / 1e12:7.0f} "
            f"{self.floor / self.best:6.2f} {self.error:8.1e}{ratio}"
        )


HEAD = (
    f"{'shape':40} {'us':>8} {'+write':>8} {'host':>5} {'plan':>5} {'GB/s':>6} {'TFLOP/s':>7} {'floor':>6} {'error':>8}"
    "  speed beside the best peer; peers, us"
)


def measure(shape: Shape, args: argparse.Namespace, bandwidth: float, rate: float) -> Result:
    """All of one shape."""
    spec = shape.spec(*dtypes(args))
    moved, operations = work(shape, spec)
    copies = max(1, min(8, math.ceil(CACHE_BYTES / moved)))
    layout = TritonHeadMajor if args.head_major else TritonTokenMajor
    sets = [Inputs(shape, spec, args.block_size, TritonAttention(spec, layout=layout), seed) for seed in range(copies)]

    def backend_of(cut: AttentionTuning) -> AttentionBackend:
        if args.sweep or args.triton or args.head_major:
            return TritonAttention(spec, layout=layout, tuning=cut)
        return load_platform().attention(spec)

    def ours(cut: AttentionTuning, write: bool, repeats: int) -> float:
        backend = backend_of(cut)
        plans = [backend.plan(inputs.batch) for inputs in sets]
        calls = [lambda i=i, p=p: i.forward(backend, p, write) for i, p in zip(sets, plans, strict=True)]
        return seconds(calls, repeats)

    of_cut: dict[AttentionTuning, float] = {}
    default = tuned(shape, spec)
    for candidate in variants(default, shape) if args.sweep else [default]:
        if of_cut and late(args):
            break
        with contextlib.suppress(OutOfResources):
            of_cut[candidate] = ours(candidate, False, 5)
    cut = min(of_cut, key=of_cut.__getitem__)
    backend = backend_of(cut)
    plan = backend.plan(sets[0].batch)
    sets[0].out.fill_(math.nan)
    sets[0].forward(backend, plan, True)
    error = check(sets[0], shape, spec)
    others = {}
    if not args.no_peers and not late(args):
        others = peers(shape, spec, copies)
        if (took := flashinfer_seconds(shape, spec, sets, args.block_size)) is not None:
            others["flashinfer"] = took
    return Result(
        shape,
        max(moved / bandwidth, operations / rate),
        moved,
        operations,
        of_cut,
        of_cut[cut],
        ours(cut, True, 7),
        host_seconds(lambda: sets[0].forward(backend, plan, True)),
        host_seconds(lambda: backend.plan(sets[0].batch)),
        others,
        error,
    )


def late(args: argparse.Namespace) -> bool:
    return time.perf_counter() - BEGAN > args.limit


def show_cuts(result: Result) -> None:
    """The best few, and the one that the table has."""
    default, *_ = result.of_cut
    best = sorted(result.of_cut, key=result.of_cut.__getitem__)[:4]
    for cut in dict.fromkeys([*best, default]):
        tile = cut.decode if result.shape.new == 1 else cut.prefill
        label = "now " if cut == default else "best"
        print(
            f"    {label} {result.of_cut[cut] * 1e6:8.1f} us  m {tile.block_m} n {tile.block_n} warps {tile.num_warps} "
            f"depth {tile.depth} programs {cut.programs_per_core} least {cut.least_keys}"
        )


def write_table(results: list[Result], args: argparse.Namespace) -> None:
    """Put the cuts that are best over the shapes of a kind, by geometric mean, into the tuning table."""
    device = device_properties(ACCELERATOR)
    dtype, kv_dtype = dtypes(args)
    table = json.loads(TABLE.read_text())
    for width in sorted({max(r.shape.dims) for r in results}):
        key = {"device": {"shared_bytes": device.shared_bytes, "warp_size": device.warp_size},
               "shape": [width, dtype.itemsize, kv_dtype.itemsize]}  # fmt: skip
        row = next((row for row in table if row | key == row), None)
        if row is None:
            table.append(row := dict(key))
        for decode in (True, False):
            of_kind = [r for r in results if max(r.shape.dims) == width and (r.shape.new == 1) == decode]
            if not of_kind:
                continue
            cuts = set.intersection(*({_cut(c, decode) for c in r.of_cut} for r in of_kind))
            losses = {
                cut: statistics.geometric_mean(
                    min(t for c, t in r.of_cut.items() if _cut(c, decode) == cut) / r.best for r in of_kind
                )
                for cut in cuts
            }
            best = min(losses, key=losses.__getitem__)
            print(
                f"head size {width}, {'decode' if decode else 'prefill'}: {best}, {losses[best]:.3f} of each one's best"
            )
            names = ("decode", "programs_per_core", "least_keys") if decode else ("prefill",)
            row |= dict(zip(names, best, strict=True))
    TABLE.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in table) + "\n]\n")


def _cut(cut: AttentionTuning, decode: bool) -> tuple[Any, ...]:
    """What of a cut one kind of step uses, as the table has it."""
    if decode:
        return astuple(cut.decode), cut.programs_per_core, cut.least_keys
    return (astuple(cut.prefill),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("decode", "prefill", "others")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--context", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--head-major", action="store_true")
    parser.add_argument("--triton", action="store_true", help="Triton's kernel, also where the platform has another")
    parser.add_argument("--sweep", action="store_true", help="try other cuts of Triton's kernel")
    parser.add_argument("--write", action="store_true", help=f"put the best cuts into {TABLE.name}")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--limit", type=float, default=150, help="seconds; shapes that come later are left out")
    args = parser.parse_args()
    if ACCELERATOR.type == "cpu":
        parser.error("torch sees no accelerator here")
    bandwidth, rate = ceilings()
    print(f"{device_properties(ACCELERATOR)}; copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    found = list(shapes(args))
    if args.sweep:
        compile_all(found, args)
    print(HEAD)
    results = []
    for shape in found:
        if late(args):
            print(f"{shape!s:40} left out: {args.limit:.0f} s are over")
            continue
        results.append(measure(shape, args, bandwidth, rate))
        print(f"{results[-1]}  [{time.perf_counter() - BEGAN:.0f} s]", flush=True)
        if args.sweep:
            show_cuts(results[-1])
        MODULE.empty_cache()
    if args.write:
        write_table(results, args)


if __name__ == "__main__":
    main()
