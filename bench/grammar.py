"""What structured output costs a step on the host, by vocabulary and rows, beside a step that the engine takes.

    python bench/grammar.py [--vocab 151936] [--rows 1 8 32 128]

The vocabulary is made up: all bytes, and random words of them, as large as asked. Each row follows a JSON schema with
tokens that are drawn from what is allowed, and the times are of: `accept`, the mask of all rows, and the mask applied
to logits on this machine. `--step` is the time in ms of a step to compare with.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.extensions.grammar.masks import Grammars, State
from engine.plugins import load_platform
from engine.request import CoreRequest, SamplingParams
from engine.staging import Staging

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 8},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 200}, "minItems": 4},
    },
    "required": ["name", "age", "tags", "notes"],
    "additionalProperties": False,
}


class Words:
    """A vocabulary of the size of large models', as llguidance takes one."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]

    def __init__(self, size: int) -> None:
        draw = random.Random(0)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = {bytes([i]): None for i in range(256)} | {b"<end>": None}
        words |= dict.fromkeys(b'": |", |{"|"}|"]|"],|": "|": ["|}, {|, "'.split(b"|"))
        while len(words) < size:
            text = "".join(draw.choices(letters, weights=range(26, 0, -1), k=draw.randint(2, 9)))
            style = draw.random()
            words[(" " * (style < 0.5) + (text.title() if style > 0.8 else text)).encode()] = None
        self.tokens = list(words)[:size]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class Benched(Grammars):
    """With a vocabulary of our own."""

    def _load(self, ends: tuple[int, ...]) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(Words(self._vocab_size)), n_vocab=self._vocab_size, eos_token=256)


def timed(work: Callable[[], Any], into: list[float]) -> Any:
    begin = time.perf_counter()
    result = work()
    into.append(1e6 * (time.perf_counter() - begin))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--step", type=float, default=10.0, help="ms of a step to compare with")
    args = parser.parse_args()
    request = CoreRequest("r", [1], SamplingParams(structured_outputs={"json": SCHEMA}), eos_token_ids=(256,))
    grammars = Benched({}, args.vocab)
    for what in ("first request: vocabulary and schema", "another schema"):
        begin = time.perf_counter()
        if (coming := grammars.prepare(request)) is not None:
            coming.result()
        print(f"{what}: {1e3 * (time.perf_counter() - begin):.0f} ms")
        request.params.structured_outputs = {"json": {**SCHEMA, "title": "another"}}
    staging = Staging(load_platform("cpu").device())
    print("rows   accept us/row   mask us (p50, p99)   apply us   all of a step")
    for rows in args.rows:
        draw = random.Random(1)
        states = {i: grammars.start(request, []) for i in range(rows)}
        accept: list[float] = []
        mask: list[float] = []
        apply: list[float] = []
        logits = torch.randn(rows, args.vocab)
        for _ in range(args.steps):
            staging.begin(rows * (args.vocab // 8 + 80))
            ban = timed(lambda: grammars.plan(states, staging), mask)  # noqa: B023 - called at once
            staging.upload()
            x = logits.clone()
            timed(lambda: ban(x), apply)  # noqa: B023
            for row, state in states.items():
                follow(state, x[row], draw, accept)
        p50, p99 = np.percentile(mask, [50, 99])
        whole = rows * statistics.median(accept) + p50 + statistics.median(apply)
        share = whole / 1e3 / args.step
        print(
            f"{rows:4}   {statistics.median(accept):13.1f}   {p50:8.0f} {p99:8.0f}   {statistics.median(apply):8.0f}   "
            f"{whole:6.0f} us, {share:.1%} of {args.step:g} ms"
        )


def follow(state: State, logits: torch.Tensor, draw: random.Random, into: list[float]) -> None:
    """Produce a token that is allowed; an output that is whole begins again."""
    allowed = torch.isfinite(logits).nonzero().flatten()
    token = int(allowed[draw.randrange(len(allowed))])
    if state.ended or token == 256:
        state.matcher.reset()
        return
    assert timed(lambda: state.accept(token), into)


if __name__ == "__main__":
    main()
