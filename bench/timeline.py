"""A picture of a decode's timeline: what the host does, and what the device does meanwhile.

    python bench/accelerator.py --models 30b-a3b --cases decode1 --breakdown decode1 --trace DIR
    python bench/timeline.py DIR/30b-a3b-decode1.json.gz --steps 3 --plot timeline.svg

A step's arrow goes from the host's launch of its graph to the graph's first kernel. Where the next launch lies left of
the end of the device's step, the device never waits for the host. Recording slows the host down, and a graph's launch
most of all, so the picture shows less overlap than there is without it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, LEFT, LANE, GAP = 960, 70, 30, 34
COLOURS = {
    "launch of a step's graph": "#3b6fb5",
    "launch of what follows it": "#8fb3df",
    "wait for sampled ids": "#c9504a",
    "the model": "#4f8f5b",
    "the draw": "#a9cf8f",
    "copies": "#d8a13a",
}


@dataclass(frozen=True)
class Span:
    """Something that ran, in microseconds."""

    begin: float
    end: float
    kind: str


def read(path: Path) -> tuple[list[Span], list[Span]]:
    """What the host called and what the device ran, in order of time, in the kinds of `COLOURS`."""
    with gzip.open(path) as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    graphs = {e["args"]["correlation"] for e in events if "GraphLaunch" in e["name"]}
    host, device = [], []
    for event in events:
        kind = _kind(event, graphs)
        if kind is not None:
            lane = host if event["cat"] in ("cuda_runtime", "cuda_driver") else device
            lane.append(Span(event["ts"], event["ts"] + event["dur"], kind))
    return sorted(host, key=lambda s: s.begin), sorted(device, key=lambda s: s.begin)


def _kind(event: dict[str, Any], graphs: set[int]) -> str | None:
    name, category = event["name"], event.get("cat")
    if category in ("cuda_runtime", "cuda_driver"):
        if "GraphLaunch" in name:
            return "launch of a step's graph"
        if "LaunchKernel" in name:
            return "launch of what follows it"
        if "Memcpy" in name:
            return "copies"
        return "wait for sampled ids" if "EventSynchronize" in name else None
    if category in ("gpu_memcpy", "gpu_memset"):
        return "copies"
    if category == "kernel":
        return "the model" if event["args"]["correlation"] in graphs else "the draw"
    return None


def joined(spans: list[Span], gap: float) -> Iterator[Span]:
    """Neighbours of a kind that are not more than `gap` apart, as one."""
    last: Span | None = None
    for span in spans:
        if last is not None and last.kind == span.kind and span.begin - last.end <= gap:
            last = Span(last.begin, max(last.end, span.end), last.kind)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def draw(host: list[Span], device: list[Span], steps: int, title: str) -> str:
    """Steps from the middle of the recording, as SVG."""
    launches = [s for s in host if s.kind == "launch of a step's graph"]
    models = [s for s in joined([s for s in device if s.kind != "copies"], 10.0) if s.kind == "the model"]
    periods = sorted(b.begin - a.begin for a, b in itertools.pairwise(models))
    typical = periods[len(periods) // 2]
    # The launch of a step comes before its first kernel; the n-th graph is the n-th run of the model.
    at = min(range(len(models) // 4, len(models) - steps - 1),
             key=lambda i: abs(models[i + steps].begin - models[i].begin - steps * typical))  # fmt: skip
    begin, end = min(launches[at].begin, models[at].begin), models[at + steps - 1].end
    scale = (WIDTH - LEFT - 10) / (end - begin)

    def x(time: float) -> float:
        return LEFT + (time - begin) * scale

    body = [f'<text x="{LEFT}" y="18" font-size="14" fill="#333">{title}</text>']
    rows = {"host": (36, host), "device": (36 + LANE + GAP, device)}
    for name, (y, spans) in rows.items():
        body.append(f'<text x="8" y="{y + 19}">{name}</text>')
        body.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{LANE}" fill="#f0f1f3"/>')
        for span in joined(spans, 10.0 if name == "device" else 1.0):
            if span.end > begin and span.begin < end:
                left, right = max(x(span.begin), LEFT), min(x(span.end), WIDTH - 10)
                body.append(
                    f'<rect x="{left:.1f}" y="{y}" width="{max(right - left, 0.8):.1f}" height="{LANE}" '
                    f'fill="{COLOURS[span.kind]}"/>'
                )
    for index in range(at, at + steps):
        body.append(
            f'<line x1="{x(launches[index].begin):.1f}" y1="{36 + LANE}" x2="{x(models[index].begin):.1f}" '
            f'y2="{36 + LANE + GAP}" stroke="#63666c" stroke-dasharray="3 3"/>'
        )
    y = 36 + 2 * LANE + GAP
    for tick in range(int((end - begin) / 1e3) + 1):
        body.append(f'<text x="{x(begin + 1e3 * tick):.1f}" y="{y + 18}" text-anchor="middle">{tick} ms</text>')
    for index, (kind, colour) in enumerate(COLOURS.items()):
        left, top = LEFT + index % 3 * 260, y + 34 + index // 3 * 20
        body.append(f'<rect x="{left}" y="{top}" width="12" height="12" fill="{colour}"/>')
        body.append(f'<text x="{left + 18}" y="{top + 11}">{kind}</text>')
    height = y + 80
    body.insert(0, f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#63666c">{"".join(body)}</svg>\n'
    )


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--title", default="")
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    host, device = read(args.trace)
    args.plot.write_text(draw(host, device, args.steps, args.title))


if __name__ == "__main__":
    main()
