"""Many streams with random disconnects for a long time: no block may leak, and memory must not grow.

    python bench/server_soak.py [--minutes 10] [--streams 100] [--url http://127.0.0.1:8000]

Without ``--url`` it starts a server of its own on the small model. Prints a line every ten seconds: requests so far,
load, and MiB of memory: of the server's process, of the engine's, and of the KV cache, which is in the engine's and
grows to its size as blocks are first used. Ends with status 1 where blocks are held when all is over, a request got an
answer of 5xx, or memory without the KV cache grew: its level in the last quarter against that in the third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ALLOWED = 1.02
"""How much the level may rise: what allocators do, over hours, is less."""


class Memory(NamedTuple):
    """Bytes that a server holds; those of the KV cache are not in `core`."""

    front: int
    core: int
    kv: int

    @classmethod
    def of(cls, pid: int, kv_bytes: int) -> Memory:
        """Of a server's process and its only child, whose KV cache has a mapping of its own."""
        child = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout
        regions = list(mapped(int(child)))
        # it asks for huge pages, as few others do; of those that do, it is the one that it fits best
        _, kv = min(((size, held) for size, held, huge in regions if huge and size >= kv_bytes), default=(0, 0))
        return cls(sum(held for _, held, _ in mapped(pid)), sum(held for _, held, _ in regions) - kv, kv)


def mapped(pid: int) -> Iterator[tuple[int, int, bool]]:
    """Of each mapping its size and what is resident of it, in bytes, and whether huge pages were asked for."""
    for region in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
        size, held = (re.search(rf"^{name}: +(\d+) kB", region, re.MULTILINE) for name in ("Size", "Rss"))
        if size and held:
            huge = re.search(r"^VmFlags:.* hg\b", region, re.MULTILINE)
            yield int(size[1]) << 10, int(held[1]) << 10, bool(huge)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--url")
    args = parser.parse_args()
    if args.url:
        return asyncio.run(soak(args.url, None, args))
    command = [sys.executable, "-c", "import sys; from engine.extensions.cli import main; sys.exit(main())", "serve"]
    command += ["--port", "0", "--no-access-log"]
    command += ["--num-blocks", "400", "--max-num-seqs", "32", "--max-model-len", "512"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = next(found[1] for line in process.stderr if (found := re.search(r"listening on (\S+)", line)))
            next(line for line in process.stderr if "serves on" in line)
            return asyncio.run(soak(url, process.pid, args))
        finally:
            process.terminate()


async def soak(url: str, pid: int | None, args: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * args.minutes
    counts: dict[str, int] = {}
    memory: list[Memory] = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        workers = [asyncio.create_task(work(client, random.Random(i), end, counts)) for i in range(args.streams)]
        while time.monotonic() < end:
            await asyncio.sleep(min(10, args.minutes * 6))
            status = (await client.get("/status")).json()
            line: dict[str, Any] = {**counts, **status["load"]}
            if pid is not None:
                memory.append(Memory.of(pid, status["engine"]["kv_bytes"]))
                line |= {f"{name}_mib": value >> 20 for name, value in memory[-1]._asdict().items()}
            print(json.dumps(line), flush=True)
        await asyncio.gather(*workers)
        await asyncio.sleep(1)
        load = (await client.get("/status")).json()["load"]
    rises = {name: rise([getattr(m, name) for m in memory]) for name in ("front", "core")} if len(memory) > 3 else {}
    print(json.dumps({**counts, "at_the_end": load, "rises": rises}))
    wrong = {
        "blocks leaked": load["kv_usage"] or load["num_running"] or load["num_waiting"] or load["in_flight"],
        "5xx": any(kind.startswith("5") for kind in counts),
        "memory grew": any(value > ALLOWED for value in rises.values()),
    }
    for what, found in wrong.items():
        if found:
            print(what)
    return int(any(wrong.values()))


def rise(values: Sequence[int]) -> float:
    """The median of the last quarter over that of the third."""
    quarter = len(values) // 4
    return round(statistics.median(values[-quarter:]) / statistics.median(values[-2 * quarter : -quarter]), 4)


async def work(client: httpx.AsyncClient, draw: random.Random, end: float, counts: dict[str, int]) -> None:
    """Requests one after the other, most of them left before their end."""
    while time.monotonic() < end:
        prompt = f"# {draw.randrange(50)}\n" * draw.randrange(1, 30)
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": draw.randrange(1, 100), "ignore_eos": True}
        body |= {"stream": draw.random() < 0.7, "n": draw.choice((1, 1, 1, 2, 3))}
        kind = "left"
        try:
            async with asyncio.timeout(draw.choice((0.01, 0.2, 1, 3, 120))):
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for _ in response.aiter_bytes():
                        pass
                kind = str(response.status_code)
        except TimeoutError:
            pass
        counts[kind] = counts.get(kind, 0) + 1
        if kind == "429":
            await asyncio.sleep(draw.random())


if __name__ == "__main__":
    sys.exit(main())
