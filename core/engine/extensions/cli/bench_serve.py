"""`engine bench serve`: times of many requests against a server that runs, this one or any with OpenAI's API.

A closed loop keeps a number of requests running; an open loop sends them at a rate, as users do, whatever the server
can take, so only it shows how long requests wait. Latencies of an open loop count from when a request was due.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import ConfigError, EngineError

PERCENTILES = (50, 90, 95, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark; lengths and output are those of `engine bench`."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is, without /v1")
    parser.add_argument("--model", help="name of the model; the server's first one otherwise")
    parser.add_argument("--api-key", help="sent as Authorization: Bearer KEY")
    parser.add_argument("--num-prompts", type=int, default=100, help="requests in all")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=int, default=16, help="closed loop: requests that run at once")
    loop.add_argument("--rate", type=float, help="open loop: requests a second, at random intervals")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and intervals")
    parser.add_argument("--plot", type=Path, help="draw the times of all requests into this SVG file")


@dataclass
class Timed:
    """One request: when it was due, and when each piece of its output came; seconds since the beginning."""

    due: float
    pieces: list[float] = field(default_factory=list)
    end: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[Timed]]:
    """Run the load; figures and every request."""
    if args.num_prompts < 1 or args.concurrency < 1 or (args.rate is not None and args.rate <= 0):
        raise ConfigError("num_prompts, concurrency and rate must be above 0")
    timed = asyncio.run(_run(args))
    return _figures(args, timed), timed


async def _run(args: argparse.Namespace) -> list[Timed]:
    client = Client(args.url, args.api_key)
    model = args.model or (await client.get("/v1/models"))["data"][0]["id"]
    draw = random.Random(args.seed)
    texts = [_prompt(draw, draw.randint(*args.input_len)) for _ in range(args.num_prompts)]
    lengths = [draw.randint(*args.output_len) for _ in texts]
    bodies = [
        {
            "model": model,
            "prompt": text,
            "max_tokens": length,
            "temperature": args.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for text, length in zip(texts, lengths, strict=True)
    ]
    for _ in range(args.warmup):
        if (first := await client.timed(bodies[0], time.perf_counter(), 0.0)).error:
            raise EngineError(f"the server at {args.url} does not answer: {first.error}")
    begin = time.perf_counter()
    if args.rate is None:
        gate = asyncio.Semaphore(args.concurrency)

        async def closed(body: dict[str, Any]) -> Timed:
            async with gate:
                return await client.timed(body, begin, time.perf_counter() - begin)

        return await asyncio.gather(*(closed(body) for body in bodies))
    due, tasks = 0.0, []
    for body in bodies:
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - begin)))
        tasks.append(asyncio.create_task(client.timed(body, begin, due)))
        due += draw.expovariate(args.rate)
    return await asyncio.gather(*tasks)


def _prompt(draw: random.Random, length: int) -> str:
    """About `length` tokens of text: a number is a token or two of most vocabularies. The figures count what it was."""
    return " ".join(str(draw.randrange(10, 100)) for _ in range(max(1, length // 2)))


class Client:
    """As much of HTTP as a load needs, a connection a request, so that what is measured is the server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url is http://HOST:PORT, not {url!r}")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def get(self, path: str) -> Any:
        """A JSON answer; raises `EngineError` where there is none, or an error."""
        return await self._json("GET", path, b"")

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """A JSON answer to `body`; raises as `get` does."""
        return await self._json("POST", path, json.dumps(body).encode())

    async def _json(self, method: str, path: str, data: bytes) -> Any:
        try:
            async with self._answer(method, path, data) as (status, lines):
                body = "".join([line async for line in lines])
        except OSError as error:
            raise EngineError(
                f"no server answers at {self._host}:{self._port}: {error}; start one, or see --url"
            ) from error
        if status != 200:
            raise EngineError(f"{path} answers {status}: {body[:300]}")
        return json.loads(body)

    async def timed(self, body: dict[str, Any], begin: float, due: float) -> Timed:
        """Stream one completion, and note when what came."""
        found = Timed(due)
        try:
            async with self._answer("POST", "/v1/completions", json.dumps(body).encode()) as (status, lines):
                async for line in lines:
                    now = time.perf_counter() - begin
                    if status != 200:
                        found.error = f"{status}: {line[:300]}"
                        break
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    data = json.loads(line[6:])
                    if "error" in data:
                        found.error = data["error"]["message"]
                    for choice in data.get("choices", ()):
                        if choice.get("text") or choice.get("token_ids"):
                            found.pieces.append(now)
                    if usage := data.get("usage"):
                        found.input_tokens, found.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        except (OSError, EOFError, ValueError) as error:
            found.error = f"{type(error).__name__}: {error}"
        found.end = time.perf_counter() - begin
        if not found.error and not found.output_tokens:
            found.error = "the stream ended without usage"
        return found

    @asynccontextmanager
    async def _answer(self, method: str, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[str]]]:
        """Status, and the body's lines."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=1 << 24)
        try:
            head = (
                f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n{self._key}"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            status = int((await reader.readline()).split()[1])
            chunked = False
            while (line := await reader.readline()) not in (b"\r\n", b""):
                chunked = chunked or line.lower().startswith(b"transfer-encoding: chunked")
            yield status, _lines(reader, chunked)
        finally:
            writer.close()


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[str]:
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0], 16)
            data = (await reader.readexactly(size + 2))[:-2]
        else:
            data = await reader.read(1 << 16)
        if not data:
            break
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode().rstrip("\r")
    if rest:
        yield rest.decode()


def _figures(args: argparse.Namespace, timed: Sequence[Timed]) -> dict[str, Any]:
    good = [t for t in timed if not t.error]
    if not good:
        raise EngineError(f"all {len(timed)} requests failed; the first one: {timed[0].error}")
    seconds = max(t.end for t in timed)
    tokens_in, tokens_out = sum(t.input_tokens for t in good), sum(t.output_tokens for t in good)
    firsts = [t.pieces[0] - t.due for t in good if t.pieces]
    each = [
        (t.pieces[-1] - t.pieces[0]) / (t.output_tokens - 1) for t in good if len(t.pieces) > 1 and t.output_tokens > 1
    ]
    gaps = [b - a for t in good for a, b in zip(t.pieces, t.pieces[1:], strict=False)]
    failed = [t.error for t in timed if t.error]
    return {
        "loop": "closed" if args.rate is None else "open",
        "concurrency": args.concurrency if args.rate is None else None,
        "rate": args.rate,
        "num_prompts": len(timed),
        "failed": len(failed),
        "first_error": failed[0] if failed else None,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": tokens_out / seconds,
        "total_tokens_per_second": (tokens_in + tokens_out) / seconds,
        "first_token_ms": _summary(firsts),
        "per_token_ms": _summary(each),
        "between_pieces_ms": _summary(gaps),
        "whole_ms": _summary([t.end - t.due for t in good]),
    }


def _summary(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles, in milliseconds."""
    values = sorted(1e3 * s for s in seconds)
    if not values:
        return None
    found = {"mean": sum(values) / len(values)}
    for p in PERCENTILES:
        found[f"p{p}"] = values[min(len(values) - 1, round(p / 100 * (len(values) - 1)))]
    return {name: round(value, 3) for name, value in found.items()}


def plot(timed: Sequence[Timed]) -> str:
    """An SVG: a line a request, in the order in which they were due, from due over first token to end."""
    width, left, row = 860, 60, 5
    seconds = max(t.end for t in timed) or 1.0
    height = row * len(timed) + 70
    colours = {"wait": "#c9c9c2", "make": "#3350c9", "fail": "#b3261e"}

    def x(at: float) -> float:
        return round(left + (width - left - 20) * at / seconds, 2)

    marks = []
    for i in range(6):
        at = seconds * i / 5
        marks.append(f'<line x1="{x(at)}" x2="{x(at)}" y1="30" y2="{height - 36}" stroke="#e4e4de"/>')
        marks.append(f'<text x="{x(at)}" y="{height - 18}" text-anchor="middle">{at:.3g} s</text>')
    for i, t in enumerate(sorted(timed, key=lambda t: t.due)):
        y = 34 + row * i
        first = t.pieces[0] if t.pieces else t.end
        kinds = [(t.due, first, colours["fail"] if t.error else colours["wait"]), (first, t.end, colours["make"])]
        marks += [
            f'<rect x="{x(a)}" y="{y}" width="{max(0.5, x(b) - x(a)):.2f}" height="{row - 1}" fill="{colour}"/>'
            for a, b, colour in kinds
            if b > a
        ]
    legend = (
        f'<text x="{left}" y="18">each line is a request: '
        f'<tspan fill="#8a8a82">until its first token</tspan>, <tspan fill="{colours["make"]}">until its end</tspan>'
        "</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#63666c">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{legend}{"".join(marks)}</svg>\n'
    )
