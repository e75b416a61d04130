"""Token-wise ops, draws and experts on one accelerator: microseconds, bytes a second, and the ratio to the floor.

    python bench/ops.py                               all, in about two minutes
    python bench/ops.py --only draw experts           some
    python bench/ops.py --rows 1 32 --no-compile      fewer sizes, and without torch.compile as a peer

Peers are plain torch, the same compiled, and for experts torch's grouped product. Everything is captured in a graph and
replayed over several sets of inputs, more than the caches hold, so the times are the device's; `host` is what one call
takes to launch. The floor is the bytes that must be moved over the bandwidth of a large copy, or the floating-point
operations over the rate of a large product: whichever is more. A result that differs from plain torch's ends the run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from attention import ACCELERATOR, BEGAN, CACHE_BYTES, ceilings, host_seconds, seconds
from torch import Tensor

from engine_sdk import REFERENCE_OPS, DrawInputs, ExpertsSpec, ExpertWeights, GroupedExperts
from engine_sdk.triton.experts import TritonExperts
from engine_sdk.triton.ops import triton_ops

DTYPE = torch.bfloat16
OPS = triton_ops()


@dataclass(frozen=True)
class Case:
    """One measurement: what is timed on each set of inputs, and what has to be moved and computed."""

    name: str
    make: Callable[[], tuple[Any, ...]]
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]
    nbytes: float
    flops: float = 0.0
    exact: bool = False
    reference: Callable[..., Any] | None = None
    tolerance: float = 0.02


def randn(*shape: int, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=ACCELERATOR) * spread


def tokenwise(args: argparse.Namespace) -> Iterator[Case]:
    """The ops of a layer of 8B: hidden 4096, inner 12288, 32 heads of 8, 128."""
    for n in args.rows:
        for name, make, nbytes in (
            ("rms_norm", lambda n=n: (randn(n, 4096), randn(4096), 1e-6), 2 * n * 4096),
            ("add_rms_norm", lambda n=n: (randn(n, 4096), randn(n, 4096), randn(4096), 1e-6), 4 * n * 4096),
            ("silu_and_mul", lambda n=n: randn(n, 2 * 12288).chunk(2, -1), 3 * n * 12288),
            ("rotary", lambda n=n: rotary_inputs(n), 2 * n * 40 * 128 + 2 * n * 128),
        ):
            plain = getattr(REFERENCE_OPS, name)
            peers = {"torch": plain}
            if args.compile:
                peers["compiled"] = torch.compile(plain, dynamic=False)
            yield Case(f"{name} {n}", make, getattr(OPS, name), peers, nbytes * DTYPE.itemsize, reference=plain)


def rotary_inputs(n: int) -> tuple[Tensor, ...]:
    q, k = (randn(1, n, h, 128).transpose(1, 2) for h in (32, 8))
    return q, k, randn(1, n, 128), randn(1, n, 128)


HOW = {
    "greedy": None,
    "plain": (0, 1.0, 0.0),
    "top_k 50": (50, 1.0, 0.0),
    "top_k 20, top_p 0.95": (20, 0.95, 0.0),
    "top_k 1000": (1000, 1.0, 0.0),
    "top_p 0.9": (0, 0.9, 0.0),
}


def draws(args: argparse.Namespace, vocab: int = 151_936) -> Iterator[Case]:
    """Rows of logits as the largest vocabularies have them; a few likely tokens, as after a trained model."""
    for n in args.rows:
        for name, how in HOW.items():
            if n > 512:
                continue
            peers: dict[str, Callable[..., Any]] = {"torch": REFERENCE_OPS.draw}
            if name == "plain":
                peers["multinomial"] = lambda x, _: torch.multinomial(x.float().softmax(-1), 1)
            nbytes = n * vocab * DTYPE.itemsize * (2 if name == "plain" else 1)
            make = lambda n=n, how=how: (randn(n, vocab, spread=2.5), draw_inputs(n, vocab, how))  # noqa: E731
            yield Case(f"draw {n}, {name}", make, OPS.draw, peers, nbytes, exact=True, reference=REFERENCE_OPS.draw)


def draw_inputs(n: int, vocab: int, how: tuple[int, float, float] | None) -> DrawInputs | None:
    if how is None:
        return None
    top_k, top_p, _ = how
    on: dict[str, Any] = {"dtype": torch.int64, "device": ACCELERATOR}
    return DrawInputs(
        torch.full((n,), top_k or vocab, **on),
        torch.full((n,), round(top_p * DrawInputs.ONE), **on),
        torch.full((n,), DrawInputs.LAST, **on),
        torch.randint(DrawInputs.ONE, (n,), **on),
        torch.full((n,), 1.4427 / 0.6 * DrawInputs.LEVELS, device=ACCELERATOR),
        top_k,
        top_p < 1,
        any_min_p=False,
    )


def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def experts(args: argparse.Namespace) -> Iterator[Case]:
    """A layer of Qwen3-30B-A3B: 128 experts, 8 a token, hidden 2048, inner 768."""
    number, top_k, hidden, inner = 128, 8, 2048, 768
    up, down = randn(number, 2 * inner, hidden, spread=0.02), randn(number, hidden, inner, spread=0.02)
    spec = ExpertsSpec(number, top_k, gated=True, transposed=False, dtype=DTYPE, silu=True)
    ours, grouped = TritonExperts(spec), GroupedExperts(spec)
    for n in args.rows:

        def make(n: int = n) -> tuple[Any, ...]:
            scores, ids = torch.rand(n, number, device=ACCELERATOR).topk(top_k)
            # Weights lie apart for each set, where a layer's worth does not fill the caches.
            weights = ExpertWeights(up.clone(), down.clone(), gate) if n < 32 else ExpertWeights(up, down, gate)
            return randn(n, hidden), ids, scores.to(DTYPE), weights

        hit = number * (1 - (1 - top_k / number) ** n)
        nbytes = hit * 3 * inner * hidden * DTYPE.itemsize
        flops = 2.0 * n * top_k * 3 * inner * hidden
        yield Case(
            f"experts {n}", make, ours.apply, {"grouped_mm": grouped.apply}, nbytes, flops, reference=grouped.apply
        )


KINDS = {"tokenwise": tokenwise, "draw": draws, "experts": experts}


def check(case: Case, inputs: tuple[Any, ...]) -> None:
    """Raise unless ours and the reference agree."""
    assert case.reference is not None
    got, want = ((y if isinstance(y, tuple) else (y,)) for y in (case.ours(*inputs), case.reference(*inputs)))
    for a, b in zip(got, want, strict=True):
        if case.exact:
            if not torch.equal(a, b):
                raise SystemExit(f"{case.name}: tokens differ: {a.tolist()} and {b.tolist()}")
        elif (error := float((a.float() - b.float()).abs().max() / b.float().abs().max())) > case.tolerance:
            raise SystemExit(f"{case.name}: an error of {error:.3g} of the largest value")


def measure(case: Case, bandwidth: float, rate: float) -> str:
    """A line of the table."""
    sets = [case.make()]
    check(case, sets[0])
    held = sum(x.nbytes for x in sets[0] if isinstance(x, Tensor))
    held += sum(x.up.nbytes + x.down.nbytes for x in sets[0] if isinstance(x, ExpertWeights))
    sets += [case.make() for _ in range(min(8 if held > 1 << 30 else 24, int(CACHE_BYTES / held) + 1))]
    floor = max(case.nbytes / bandwidth, case.flops / rate)

    def of(call: Callable[..., Any]) -> float:
        return seconds([lambda s=s: call(*s) for s in sets])

    ours = of(case.ours)
    cells = [f"{case.name:28}", f"{ours * 1e6:9.1f}", f"{floor * 1e6:9.1f}", f"{floor / ours:6.2f}"]
    cells += [f"{case.nbytes / ours / 1e9:8.0f}", f"{host_seconds(lambda: case.ours(*sets[0])) * 1e6:7.0f}"]
    for name, peer in case.peers.items():
        try:
            took = of(peer)
        except Exception as error:  # a peer that cannot be captured, or refuses
            torch.accelerator.synchronize()
            cells.append(f"{name} {type(error).__name__}")
        else:
            cells.append(f"{name} {took * 1e6:.1f} ({took / ours:.2f}x)")
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 256, 4096])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which no further case is begun")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, rate = ceilings()
    print(f"{bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s, torch {torch.__version__}")
    print(f"{'':28}  {'us':>9}  {'floor':>9}  {'ratio':>6}  {'GB/s':>8}  {'host us':>7}  peers: us (times ours)")
    with torch.inference_mode():
        for kind in args.only:
            for case in KINDS[kind](args):
                if time.perf_counter() - BEGAN > args.limit:
                    print(f"stopped at --limit {args.limit:.0f} s, before {case.name}")
                    return
                print(f"{measure(case, bandwidth, rate)}  [{time.perf_counter() - BEGAN:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
