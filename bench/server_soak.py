"""Many streams with random disconnects for a long time: no block may leak, and memory must not grow.

    python bench/server_soak.py [--minutes 10] [--streams 100] [--url http://127.0.0.1:8000]

Without ``--url`` it starts a server of its own on the small model. Prints a line every ten seconds: requests so far,
load, and the memory of both processes. Ends with status 1 where blocks are held when all is over, a request got an
answer of 5xx, or memory grew by more than a fifth in the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--url")
    args = parser.parse_args()
    if args.url:
        return asyncio.run(soak(args.url, None, args))
    command = [sys.executable, "-c", "import sys; from engine.extensions.cli import main; sys.exit(main())", "serve"]
    command += [
        "--port",
        "0",
        "--no-access-log",
        "--num-blocks",
        "400",
        "--max-num-seqs",
        "32",
        "--max-model-len",
        "512",
    ]
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
    memory: list[int] = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        workers = [asyncio.create_task(work(client, random.Random(i), end, counts)) for i in range(args.streams)]
        while time.monotonic() < end:
            await asyncio.sleep(min(10, args.minutes * 6))
            memory.append(resident(pid))
            load = (await client.get("/status")).json()["load"]
            print(json.dumps({**counts, "mib": memory[-1] >> 20, **load}), flush=True)
        await asyncio.gather(*workers)
        await asyncio.sleep(1)
        load = (await client.get("/status")).json()["load"]
    print(json.dumps({**counts, "at_the_end": load}))
    leaked = load["kv_usage"] or load["num_running"] or load["num_waiting"] or load["in_flight"]
    failed = any(kind.startswith("5") for kind in counts)
    grew = bool(pid) and memory[-1] > 1.2 * memory[len(memory) // 2]
    for what, wrong in (("blocks leaked", leaked), ("5xx", failed), ("memory grew", grew)):
        if wrong:
            print(what)
    return int(bool(leaked or failed or grew))


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


def resident(pid: int | None) -> int:
    """Bytes that the server's processes hold."""
    if pid is None:
        return 0
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    status = (Path(f"/proc/{p}/status").read_text() for p in (pid, *children))
    return sum(int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) << 10 for text in status)  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
