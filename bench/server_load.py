"""The server under load beside vLLM's: `engine bench serve` against both, one at a time, on one model and machine.

    python bench/server_load.py --vllm VLLM/bin/python [--model FOLDER] [--plot load.svg] [--output load.json]

The peer is named by the Python of an environment apart from this one. Without ``--model``, weights are random, of
Qwen3-0.6B's shape. The vocabulary becomes one of numbers, a token each, so that both read and write text. Each load has
prompts of its own, which no cache has seen. Prints a table of medians, with the 99th percentile behind a stroke.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOADS: dict[str, list[str]] = {
    "1 at once": ["--concurrency", "1", "--num-prompts", "4"],
    "4 at once": ["--concurrency", "4", "--num-prompts", "12"],
    "16 at once": ["--concurrency", "16", "--num-prompts", "16"],
    "1/2 a second": ["--rate", "0.5", "--num-prompts", "8"],
    "1 a second": ["--rate", "1", "--num-prompts", "12"],
}
"""Closed loops and open ones, by what the table calls them."""

WARM_UP = ["--concurrency", "16", "--num-prompts", "16"]
"""Goes before: it fills the KV cache, of which a system hands out each page when it is first written."""

Figures = dict[str, dict[str, Any]]
"""What `engine bench serve` found, by load."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--model", help="a folder with config.json and weights")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = prepare(Path(folder), args.model)
        servers = {"engine": [*ENGINE, model, *OURS]}
        if args.vllm:
            servers["vLLM"] = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        found: dict[str, Figures] = {}
        for name, command in servers.items():
            with serving(command) as (url, seconds):
                print(f"{name} was ready after {seconds:.1f} s", file=sys.stderr)
                measured(url, WARM_UP, len(LOADS), args)
                found[name] = {load: measured(url, flags, i, args) for i, (load, flags) in enumerate(LOADS.items())}
    print(table(found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    if args.plot:
        args.plot.write_text(plot(found))


def prepare(folder: Path, model: str | None) -> str:
    """The model's files beside a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if model is None:
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        config = Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    else:
        for file in (*Path(model).glob("*.json"), *Path(model).glob("*.safetensors")):
            (folder / file.name).symlink_to(file.resolve())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    numbers = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=numbers).save_pretrained(folder)
    return str(folder)


ENGINE = [sys.executable, "-c", "import sys; from engine.extensions.cli import main; sys.exit(main())", "serve"]
OURS = ["--no-access-log", "--kv-cache-memory-bytes", str(320 << 20)]
COMMON = ["--dtype", "bfloat16", "--max-model-len", "2048", "--served-model-name", "it"]
PEERS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
"""The peer's environment: the least KV cache that it takes, and threads that the system places, as ours are."""


@contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[str, float]]:
    """A server that answers, at its URL, and how long it took to."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    begin, url = time.perf_counter(), f"http://127.0.0.1:{port}"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [*command, *COMMON, "--port", str(port)]
    with subprocess.Popen(words, env={**os.environ, **PEERS}, **quiet) as process:
        try:
            while not healthy(url):
                if process.poll() is not None:
                    sys.exit(f"it ended with {process.returncode}; run it by hand: {' '.join(words)}")
                time.sleep(0.2)
            yield url, time.perf_counter() - begin
        finally:
            process.terminate()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def measured(url: str, load: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one load; a pair of digits is a token here, of which the benchmark's prompts count two."""
    lengths = ["--input-len", str(2 * args.input_len), "--output-len", str(args.output_len)]
    command = [*ENGINE[:-1], "bench", "serve", "--url", url, "--json", "--seed", str(seed), *lengths, *load]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    if figures["failed"]:
        sys.exit(f"{figures['failed']} requests failed: {figures['first_error']}")
    return figures


PANELS: dict[str, str] = {
    "first_token_ms": "First token, ms",
    "per_token_ms": "Each further token, ms",
    "output_tokens_per_second": "Output tokens a second",
}


def spread(figures: Mapping[str, Any], panel: str) -> tuple[float, float]:
    """Median and 99th percentile, or the one number that there is, twice."""
    value = figures[panel]
    return (value["p50"], value["p99"]) if isinstance(value, dict) else (value, value)


def table(found: Mapping[str, Figures]) -> str:
    """Markdown."""
    rows = [["load", *(f"{title}: {name}" for title in PANELS.values() for name in found)]]
    rows.append(["---"] * len(rows[0]))
    for load in LOADS:
        cells = []
        for panel in PANELS:
            for figures in found.values():
                low, high = spread(figures[load], panel)
                cells.append(f"{low:.0f}" if low == high else f"{low:.0f} / {high:.0f}")
        rows.append([load, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


COLOURS = ("#3350c9", "#c2571a", "#1d7a46")
WIDTH, ROW, TOP, LEFT, PANEL = 900, 40, 66, 92, 240


def plot(found: Mapping[str, Figures]) -> str:
    """An SVG: a panel a figure, a row a load; a dot is the median, and its line ends at the 99th percentile."""
    height = TOP + ROW * len(LOADS) + 34
    marks = [f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>']
    for i, name in enumerate(found):
        marks.append(f'<circle cx="{LEFT + 110 * i + 4}" cy="14" r="4" fill="{COLOURS[i]}"/>')
        marks.append(f'<text x="{LEFT + 110 * i + 14}" y="18" fill="{COLOURS[i]}">{name}</text>')
    note = "dots are medians, lines end at the 99th percentile"
    marks.append(f'<text x="{WIDTH - 16}" y="18" text-anchor="end">{note}</text>')
    for row, load in enumerate(LOADS):
        marks.append(f'<text x="{LEFT - 14}" y="{TOP + ROW * row + 24}" text-anchor="end">{load}</text>')
    for column, (panel, title) in enumerate(PANELS.items()):
        marks += _panel(found, panel, title, LEFT + column * (PANEL + 25), height)
    body = "".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#63666c">{body}</svg>\n'
    )


def _panel(found: Mapping[str, Figures], panel: str, title: str, left: float, height: float) -> list[str]:
    """One figure, from the smallest to the largest of all, by powers of ten."""
    values = [v for figures in found.values() for load in LOADS for v in spread(figures[load], panel)]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1

    def x(value: float) -> float:
        return round(left + PANEL * (math.log10(value) - low) / (high - low), 1)

    marks = [f'<text x="{left}" y="{TOP - 22}" fill="#1b1c1e">{title}</text>']
    for tick in (m * 10**e for e in range(-1, 6) for m in (1, 2, 5)):
        if low <= math.log10(tick) <= high:
            marks.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{height - 30}" stroke="#e4e4de"/>')
            marks.append(f'<text x="{x(tick)}" y="{height - 14}" text-anchor="middle" font-size="11">{tick:g}</text>')
    for i, figures in enumerate(found.values()):
        for row, load in enumerate(LOADS):
            y = TOP + ROW * row + 14 + 12 * i
            middle, end = map(x, spread(figures[load], panel))
            line = f'x1="{middle}" x2="{end}" y1="{y}" y2="{y}"'
            marks.append(f'<line {line} stroke="{COLOURS[i]}" stroke-width="3" stroke-linecap="round" opacity=".45"/>')
            marks.append(f'<circle cx="{middle}" cy="{y}" r="4" fill="{COLOURS[i]}"/>')
    return marks


if __name__ == "__main__":
    main()
