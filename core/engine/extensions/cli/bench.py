"""`engine bench`: throughput (`offline`), times of a fixed batch (`latency`), and a server under load (`serve`).

Prompts are random token ids of the model's vocabulary and outputs ignore the end-of-sequence token, so every run does
the same work whatever the weights are; ``--load-format dummy`` needs no weights at all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import EngineArgs
from engine.extensions.cli import bench_serve
from engine.extensions.cli.options import add_flags, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of both benchmarks."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="offline|latency|serve")
    offline = kinds.add_parser("offline", help="throughput of many prompts at once")
    offline.add_argument("--num-prompts", type=int, default=64, help="how many")
    offline.add_argument("--input-len", type=_span, default=(128, 128), metavar="N|A-B", help="tokens of a prompt")
    offline.add_argument("--output-len", type=_span, default=(128, 128), metavar="N|A-B", help="tokens of an output")
    offline.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    latency = kinds.add_parser("latency", help="first-token and per-token times of one batch, repeated")
    latency.add_argument("--batch-size", type=int, default=1, help="prompts in the batch")
    latency.add_argument("--input-len", type=_span, default=(128, 128), metavar="N|A-B", help="tokens of a prompt")
    latency.add_argument("--output-len", type=_span, default=(64, 64), metavar="N|A-B", help="tokens of an output")
    latency.add_argument("--repeats", type=int, default=5, help="measured rounds")
    serve = kinds.add_parser("serve", help="times of many requests to a server that runs")
    bench_serve.add_arguments(serve)
    serve.add_argument("--input-len", type=_span, default=(128, 128), metavar="N|A-B", help="tokens of a prompt, about")
    serve.add_argument("--output-len", type=_span, default=(128, 128), metavar="N|A-B", help="tokens of an output")
    for kind in (offline, latency, serve):
        kind.add_argument("--warmup", type=int, default=1, help="rounds before measuring")
        kind.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy")
        kind.add_argument("--json", action="store_true", help="print JSON instead of a table")
        kind.add_argument("--output", type=Path, help="also write the JSON to this file")
    for kind in (offline, latency):
        add_flags(kind, EngineArgs, "engine")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    if args.kind == "serve":
        figures, timed = bench_serve.measure(args)
        if args.plot:
            args.plot.write_text(bench_serve.plot(timed))
        return _tell(args, {"benchmark": args.kind, "url": args.url, **figures})
    from engine.llm import LLM

    llm = LLM(**given(args, EngineArgs))
    figures = _offline(llm, args) if args.kind == "offline" else _latency(llm, args)
    info = llm.info
    report = {
        "benchmark": args.kind,
        "architecture": info.architecture,
        "platform": info.platform,
        "device": info.device,
        "dtype": info.dtype,
        "weight_bytes": info.weight_bytes,
        "load_seconds": round(info.load_seconds, 3),
        **figures,
    }
    return _tell(args, report)


def _tell(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Print the report, and write it where that was asked for."""
    text = json.dumps(report, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        report = {name: value for name, value in report.items() if value is not None}
        width = max(map(len, report))
        for name, value in report.items():
            shown = f"{value:,.4g}" if isinstance(value, float) else value
            if isinstance(value, dict):
                shown = "  ".join(f"{kind} {number:,.4g}" for kind, number in value.items())
            print(f"{name.replace('_', ' '):<{width}}  {shown}")
    return 0


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    if not low.isdigit() or (high and not high.isdigit()) or int(low) < 1 or int(high or low) < int(low):
        raise argparse.ArgumentTypeError(f"a length is N or A-B with 1 <= A <= B, not {text!r}")
    return int(low), int(high or low)


def _work(llm: Any, args: argparse.Namespace, count: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Prompts and parameters of one round."""
    from engine.request import SamplingParams

    draw = random.Random(seed)
    vocab = llm.info.vocab_size
    prefix = [draw.randrange(vocab) for _ in range(getattr(args, "shared_prefix", 0))]
    prompts = [prefix + [draw.randrange(vocab) for _ in range(draw.randint(*args.input_len))] for _ in range(count)]
    params = [
        SamplingParams(
            temperature=args.temperature, max_tokens=draw.randint(*args.output_len), ignore_eos=True, detokenize=False
        )
        for _ in range(count)
    ]
    return prompts, params


def _offline(llm: Any, args: argparse.Namespace) -> dict[str, Any]:
    for i in range(args.warmup):
        llm.generate(*_work(llm, args, min(args.num_prompts, 4), seed=-1 - i), use_tqdm=False)
    prompts, params = _work(llm, args, args.num_prompts, seed=0)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - begin
    tokens_in = sum(len(o.prompt_token_ids) for o in outputs)
    tokens_out = sum(len(o.outputs[0].token_ids) for o in outputs)
    return {
        "num_prompts": args.num_prompts,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "cached_tokens": sum(o.num_cached_tokens for o in outputs),
        "seconds": seconds,
        "output_tokens_per_second": tokens_out / seconds,
        "total_tokens_per_second": (tokens_in + tokens_out) / seconds,
        "requests_per_second": args.num_prompts / seconds,
    }


def _latency(llm: Any, args: argparse.Namespace) -> dict[str, Any]:
    first: list[float] = []
    each: list[float] = []
    total: list[float] = []
    for i in range(-args.warmup, args.repeats):
        prompts, params = _work(llm, args, args.batch_size, seed=i)
        begin = time.perf_counter()
        metrics = [asdict(o)["metrics"] for o in llm.generate(prompts, params, use_tqdm=False)]
        if i < 0:
            continue
        total.append(time.perf_counter() - begin)
        first.append(max(m["first_token_time"] - m["arrival_time"] for m in metrics))
        rest = max(p.max_tokens for p in params) - 1
        if rest:
            each.append((total[-1] - first[-1]) / rest)
    return {
        "batch_size": args.batch_size,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "repeats": args.repeats,
        "first_token_ms_median": 1e3 * statistics.median(first),
        "per_token_ms_median": 1e3 * statistics.median(each) if each else None,
        "total_ms_median": 1e3 * statistics.median(total),
        "total_ms_max": 1e3 * max(total),
        "output_tokens_per_second": args.batch_size * statistics.mean(args.output_len) / statistics.median(total),
    }
