"""One accelerator beside the recorded figures of a peer, and the floor: published shapes, random weights, token ids.

    python bench/accelerator.py --models 0.6b 8b --cases decode1 decode32 --json out.json
    python bench/accelerator.py --models 0.6b --breakdown

The peer is vLLM 0.26.0 on one H200 with its defaults, recorded on 2026-11-22 with torch 2.11. The floor of a decode is
the bytes that its steps must read, weights and KV, over the bandwidth that a copy reaches, which is measured here; that
of a prefill is its floating-point operations over the rate of a large matrix product, measured too.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import LLM, SamplingParams

MODELS: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": False},
    "30b-a3b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
                "num_key_value_heads": 4, "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8,
                "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1},
}  # fmt: skip
"""Qwen3's published shapes; what they share is in `checkpoint`."""

PEER = {
    "mixed": {"0.6b": 23665, "8b": 9667, "30b-a3b": 5878},
    "decode1": {"0.6b": 506, "8b": 193, "30b-a3b": 237},
    "decode32": {"0.6b": 11398, "8b": 4276, "30b-a3b": 1917},
    "decode256": {"0.6b": 27100, "8b": 6844, "30b-a3b": 6859},
    "prefill": {"0.6b": 387686, "8b": 43215, "30b-a3b": 69514},
    "first": {"0.6b": 22.7, "8b": 52.8, "30b-a3b": 51.1},
    "start": {"0.6b": 55, "8b": 67, "30b-a3b": 83},
}


@dataclass(frozen=True)
class Case:
    """Requests with lengths drawn from ranges; `unit` says what is reported."""

    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    unit: str = "output tok/s"


CASES = {
    "mixed": Case(256, (100, 1024), (100, 1024)),
    "decode1": Case(1, (128, 128), (256, 256)),
    "decode32": Case(32, (512, 512), (256, 256)),
    "decode256": Case(256, (512, 512), (128, 128)),
    "prefill": Case(16, (2048, 2048), (1, 1), "prompt tok/s"),
    "first": Case(1, (2048, 2048), (1, 1), "ms"),
}


def checkpoint(name: str, folder: Path) -> str:
    moe = "num_experts" in MODELS[name]
    config = {
        "model_type": "qwen3_moe" if moe else "qwen3",
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "attention_bias": False,
        **MODELS[name],
    }
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def work(case: Case, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    draw = random.Random(seed)
    prompts = [[draw.randrange(1000, 150000) for _ in range(draw.randint(*case.prompt))] for _ in range(case.requests)]
    params = [
        SamplingParams(temperature=0.6, max_tokens=draw.randint(*case.output), ignore_eos=True, detokenize=False)
        for _ in prompts
    ]
    return prompts, params


def measure(llm: LLM, case: Case, repeats: int) -> float:
    """The best of `repeats`, after one round that is not counted."""
    seconds = []
    for seed in range(-1, repeats):
        prompts, params = work(
            case, max(seed, 0) if case.requests == 256 and case.output[0] != case.output[1] else seed
        )
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if seed >= 0:
            seconds.append(time.perf_counter() - begin)
    best = min(seconds)
    if case.unit == "ms":
        return 1e3 * best
    tokens = sum(map(len, prompts)) if case.unit.startswith("prompt") else sum(p.max_tokens or 0 for p in params)
    return tokens / best


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), and FLOP a second of a bf16 matrix product."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    return 2 * a.numel() / _time(lambda: a.clone()), 2 * 8192**3 / _time(lambda: x @ x)


def _time(call: Any, repeats: int = 20) -> float:
    for _ in range(3):
        call()
    torch.accelerator.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.accelerator.synchronize()
    return (time.perf_counter() - begin) / repeats


def floor(name: str, case: Case, weight_bytes: int, ceiling: tuple[float, float]) -> float | None:
    """The best that this device could do, in the case's unit; None for the mixed case."""
    bandwidth, rate = ceiling
    shape = MODELS[name]
    token_bytes = 2 * 2 * shape["num_key_value_heads"] * 128 * shape["num_hidden_layers"]
    head = 151936 * shape["hidden_size"]
    active = weight_bytes / 2
    if "num_experts" in shape:
        experts = 3 * shape["num_hidden_layers"] * shape["num_experts"] * shape["hidden_size"] * 768
        touched = 1 - (1 - shape["num_experts_per_tok"] / shape["num_experts"]) ** case.requests
        read = active - experts + touched * experts
        active -= experts * (1 - shape["num_experts_per_tok"] / shape["num_experts"])
    else:
        read = active
    if not shape["tie_word_embeddings"]:
        read, active = read - head, active - head
    if case.prompt[0] != case.prompt[1]:
        return None
    if case.output == (1, 1):
        tokens = case.requests * case.prompt[0]
        attention = (
            2 * case.requests * case.prompt[0] ** 2 * shape["num_attention_heads"] * 128 * shape["num_hidden_layers"]
        )
        seconds = (2 * tokens * (active - head) + attention) / rate
        return 1e3 * seconds if case.unit == "ms" else tokens / seconds
    context = case.prompt[0] + case.output[0] / 2
    step = (2 * read + case.requests * context * token_bytes) / bandwidth
    return case.requests / step


def breakdown(llm: LLM, case: Case, trace_to: Path | None) -> None:
    """Where the device's time goes in the case, by kernel, and the host's by function; the timeline as a file."""
    import cProfile
    import pstats

    from torch.profiler import ProfilerActivity, profile

    case = Case(case.requests, case.prompt, (min(case.output[0], 48),) * 2)
    prompts, params = work(case, 7)
    host = cProfile.Profile()
    host.runcall(llm.generate, prompts, params, use_tqdm=False)
    pstats.Stats(host).sort_stats("tottime").print_stats(22)
    llm.reset_prefix_cache()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        llm.generate(prompts, params, use_tqdm=False)
    if trace_to is not None:
        trace.export_chrome_trace(str(trace_to))
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in trace.events():
        if "cuda" in str(event.device_type).lower():
            spent[event.name][0] += event.device_time
            spent[event.name][1] += 1
    total = sum(us for us, _ in spent.values())
    print(f"device busy {total / 1e3:.1f} ms")
    for name, (us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:24]:
        print(f"  {us / total:5.1%} {us / 1e3:8.2f} ms {count:6.0f} x {us / count:8.1f} us  {name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--breakdown", nargs="*", choices=list(CASES), default=[], metavar="CASE")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="also write a breakdown's timeline, for Perfetto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    ceiling = None
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            begin = time.perf_counter()
            llm = LLM(
                checkpoint(name, Path(folder)), platform=args.platform, load_format="dummy", skip_tokenizer_init=True,
                max_model_len=8192, enforce_eager=args.enforce_eager, disable_log_stats=True,
                tensor_parallel_size=args.tensor_parallel_size,
            )  # fmt: skip
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
            start = time.perf_counter() - begin
            ceiling = ceiling or ceilings(torch.device(llm.info.device))
            print(f"{name}: first tokens after {start:.1f} s (peer ready after {PEER['start'][name]} s)", flush=True)
            found.append({"model": name, "case": "start", "ours": start, "peer": PEER["start"][name]})
            for label in args.cases:
                case = CASES[label]
                ours = measure(llm, case, args.repeats)
                peer, best = PEER[label][name], floor(name, case, llm.info.weight_bytes, ceiling)
                ratio = peer / ours if case.unit == "ms" else ours / peer
                share = None if best is None else best / ours if case.unit == "ms" else ours / best
                shown = "" if share is None else f", {share:.0%} of the floor's"
                print(f"{name:8} {label:10} {ours:12,.1f} {case.unit:13} {ratio:.2f} x the peer{shown}", flush=True)
                found.append(
                    {"model": name, "case": label, "ours": ours, "peer": peer, "ratio": ratio, "of_floor": share}
                )
            for label in args.breakdown:
                print(f"== {name} {label}")
                breakdown(llm, CASES[label], args.trace and args.trace / f"{name}-{label}.json.gz")
            del llm
            torch.accelerator.empty_cache()
    if ceiling:
        print(f"ceilings: copy {ceiling[0] / 1e12:.2f} TB/s, bf16 product {ceiling[1] / 1e12:.0f} TFLOP/s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
