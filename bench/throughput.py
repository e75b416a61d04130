"""Offline throughput of the engine beside Transformers, on the same model and prompts, in one run.

    python bench/throughput.py --shape qwen3-0.6b --num-prompts 16 --input-len 128 --output-len 64

Each contestant runs in a process of its own, one after the other: the engine, Transformers' continuous batching
(`generate_batch`), and its plain batched `generate` with padding. Weights are random and shared through one checkpoint;
decoding is greedy and ignores the end of sequence, so everybody produces the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "demo": {},
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
}  # fmt: skip


def prompts(args: argparse.Namespace, vocab: int) -> list[list[int]]:
    draw = random.Random(0)
    low, _, high = args.input_len.partition("-")
    return [
        [draw.randrange(vocab) for _ in range(draw.randint(int(low), int(high or low)))]
        for _ in range(args.num_prompts)
    ]


def run_engine(args: argparse.Namespace) -> tuple[float, int]:
    from engine import LLM, SamplingParams

    llm = LLM(args.model, dtype=args.dtype, platform=args.platform, skip_tokenizer_init=True, max_model_len=4096)
    work = prompts(args, llm.info.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True, detokenize=False)
    llm.generate(work[:2], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
    llm.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = llm.generate(work, params, use_tqdm=False)
    return time.perf_counter() - begin, sum(len(o.outputs[0].token_ids) for o in outputs)


def load_transformers(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device).eval()


def run_generate(args: argparse.Namespace) -> tuple[float, int]:
    import torch

    model = load_transformers(args)
    work = prompts(args, model.config.vocab_size)
    width = max(map(len, work))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in work], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work], device=model.device)

    def generate(rows: int, tokens: int) -> Any:
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        return model.generate(ids[:rows], attention_mask=mask[:rows], do_sample=False, pad_token_id=0, **length)

    generate(2, 2)
    begin = time.perf_counter()
    out = generate(len(work), args.output_len)
    return time.perf_counter() - begin, out.shape[0] * (out.shape[1] - width)


def run_generate_batch(args: argparse.Namespace) -> tuple[float, int]:
    from transformers import GenerationConfig

    model = load_transformers(args)
    work = prompts(args, model.config.vocab_size)

    def generate(rows: int, tokens: int) -> Any:
        config = GenerationConfig(max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0, do_sample=False)
        return model.generate_batch(work[:rows], generation_config=config)

    generate(2, 2)
    begin = time.perf_counter()
    outputs = generate(len(work), args.output_len)
    return time.perf_counter() - begin, sum(len(o.generated_tokens) for o in outputs.values())


CONTESTANTS = {"engine": run_engine, "generate_batch": run_generate_batch, "generate": run_generate}


def checkpoint(args: argparse.Namespace, folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    if args.shape == "demo":
        from engine.config import DEMO_MODEL

        return str(DEMO_MODEL)
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[args.shape], max_position_embeddings=4096, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--input-len", default="128", help="N or A-B")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--platform", default=None)
    parser.add_argument("--only", choices=CONTESTANTS, nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        seconds, tokens = CONTESTANTS[args.run](args)
        print(json.dumps({"seconds": seconds, "tokens": tokens}))
        return
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(args, Path(folder))
        for name in args.only:
            command = [sys.executable, __file__, *sys.argv[1:], "--model", model, "--run", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{name:<16} failed", flush=True)
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            rates[name] = figures["tokens"] / figures["seconds"]
            ratio = f"engine is {rates['engine'] / rates[name]:.2f} x" if name != "engine" and "engine" in rates else ""
            print(f"{name:<16} {figures['seconds']:8.2f} s {rates[name]:10.1f} output tokens/s   {ratio}", flush=True)


if __name__ == "__main__":
    main()
