"""What the server costs over the offline engine: the same requests to both in turn, on the same machine.

    python bench/server_overhead.py [--model FOLDER] [--rounds 7] [--requests 16] [--output-len 64]

Prints throughput and first-token times of both, and the ratio of the medians over all rounds; a round has one batch and
several lone requests of each. The two alternate, so that what else the machine does falls on both alike. Processor time
is told apart from the clock: the core's own beside that of the offline engine, and what the front process takes a
token, which runs beside the core where there is a processor for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from engine.extensions.cli.bench_serve import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--lone", type=int, default=5)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    args = parser.parse_args()
    # Both have a KV cache that the first batch fills: on a host, memory costs time when it is first written.
    length = args.input_len + args.output_len
    sizes = {"max_model_len": length, "block_size": 16, "num_blocks": 1 + args.requests * -(-length // 16)}
    llm = LLM(args.model, **sizes)
    draw = random.Random(0)
    command = [sys.executable, "-c", "import sys; from engine.extensions.cli import main; sys.exit(main())", "serve"]
    command += ([args.model] if args.model else []) + ["--port", "0", "--no-access-log"]
    command += [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = next(found[1] for line in process.stderr if (found := re.search(r"listening on (\S+)", line)))
            next(line for line in process.stderr if "serves on" in line)
            print(json.dumps(asyncio.run(measure(llm, url, process.pid, args, draw)), indent=2))
        finally:
            process.terminate()


async def measure(llm: LLM, url: str, pid: int, args: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    client = Client(url, None)
    core = int(subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout)
    spent = {"offline": 0.0, "core": 0.0, "front": 0.0}
    figures: dict[str, list[float]] = {"offline": [], "server": [], "offline_first": [], "server_first": []}
    for i in range(-1, args.rounds):
        for count in (*[1] * args.lone, args.requests):
            prompts = [[draw.randrange(3, llm.info.vocab_size) for _ in range(args.input_len)] for _ in range(count)]
            tokens = 2 if count == 1 else args.output_len
            before = (time.process_time(), processor(core), processor(pid))
            offline = run_offline(llm, prompts, tokens)
            llm.reset_prefix_cache()
            between = time.process_time()
            server = await run_server(client, prompts, tokens)
            if i >= 0 and count > 1:
                spent["offline"] += between - before[0]
                spent["core"] += processor(core) - before[1]
                spent["front"] += processor(pid) - before[2]
            if i >= 0:
                name = "_first" if count == 1 else ""
                figures["offline" + name].append(offline)
                figures["server" + name].append(server)
    median = {name: statistics.median(values) for name, values in figures.items()}
    tokens = args.requests * args.output_len
    return {
        "requests": args.requests,
        "output_len": args.output_len,
        "rounds": args.rounds,
        "offline_tokens_per_second": tokens / median["offline"],
        "server_tokens_per_second": tokens / median["server"],
        "throughput_overhead": median["server"] / median["offline"] - 1,
        "core_processor_time_overhead": spent["core"] / spent["offline"] - 1,
        "front_processor_us_per_token": 1e6 * spent["front"] / (tokens * args.rounds),
        "front_processor_share": spent["front"] / spent["core"],
        "offline_first_token_ms": 1e3 * median["offline_first"],
        "server_first_token_ms": 1e3 * median["server_first"],
        "first_token_overhead": median["server_first"] / median["offline_first"] - 1,
    }


def processor(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_offline(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    """Seconds; of one prompt, until its first token."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    begin = time.perf_counter()
    if len(prompts) == 1:
        next(llm.stream(prompts[0], params))
        return time.perf_counter() - begin
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin


async def run_server(client: Client, prompts: list[list[int]], tokens: int) -> float:
    """The same over HTTP: one prompt as a stream, several as whole answers, of which the client costs nothing."""
    begin = time.perf_counter()
    body: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if len(prompts) == 1:
        # with token ids, an event comes even where the first token is half a character only
        body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        timed = await client.timed(body | {"prompt": prompts[0]}, begin, 0.0)
        if timed.error:
            raise SystemExit(timed.error)
        return timed.pieces[0]
    await asyncio.gather(*(client.post("/v1/completions", body | {"prompt": prompt}) for prompt in prompts))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
