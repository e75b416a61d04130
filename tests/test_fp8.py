"""KV caches of 8-bit floats: numbers saturate, output depends on the request alone, and a token takes half the bytes.

The conformance suite compares them with the reference; here is what the suite cannot ask of every platform.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.config import EngineArgs
from engine.errors import ConfigError, UnsupportedCapability
from engine.model.config import resolve_kv_dtype
from engine_conformance.arena import check
from engine_conformance.cases import FLOATS8, Case, Row
from engine_cpu import CpuPlatform
from engine_sdk import (
    AttentionSpec,
    HeadMajor,
    PagedLayout,
    Tiled,
    TokenMajor,
    TorchAttention,
    require_attention,
    to_cache,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0, torch.float8_e4m3fnuz: 240.0, torch.float8_e5m2fnuz: 57344.0}


@pytest.mark.parametrize("dtype", FLOATS8, ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saturates(source: torch.dtype, dtype: torch.dtype) -> None:
    largest = LARGEST[dtype]
    x = torch.tensor([largest, largest * 1.03, largest * 1.1, largest * 2, 6e4, torch.inf, 1.0, 1.0625, 0.0, 1e-30])
    x = torch.cat([x, -x]).to(source)
    got = to_cache(x, dtype).float()
    assert got[:6].max() == got[3] == got[5] == largest
    assert (got[10:16] == -got[:6]).all()
    assert got[6:10].tolist() == [1.0, 1.0, 0.0, 0.0]  # a tie goes to the even one
    assert to_cache(torch.tensor([torch.nan], dtype=source), dtype).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS8, ids=str)
def test_bits_pass(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_cache(every.view(dtype), dtype).view(torch.uint8), every)


@pytest.mark.parametrize("layout", [TokenMajor, HeadMajor, functools.partial(Tiled, lanes=16)], ids=["t", "h", "tiled"])
@pytest.mark.parametrize("dtype", FLOATS8, ids=str)
def test_layouts(layout: Callable[..., PagedLayout], dtype: torch.dtype) -> None:
    """All that plain torch does with a cache, on the host: some of its operations know no 8-bit floats."""
    spec = AttentionSpec(4, 2, 32, 32, 0.2, torch.bfloat16, dtype)
    rows = (Row(70, 1), Row(3, 1), Row(20, 30), Row(0, 40))
    check(CpuPlatform(), TorchAttention(spec, layout=layout), Case(spec, 16, rows, mode="large"))
    made = layout(16, 2, 32, 32, dtype)
    cache = made.bind(torch.randint(0, 256, (4 * made.block_bytes,), dtype=torch.uint8), 4)
    made.copy_blocks(cache, torch.tensor([1]), torch.tensor([3]))
    one, three = (made.export_blocks(cache, torch.tensor([i])) for i in (1, 3))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize(
    ("name", "declared", "want"),
    [
        ("auto", {E4M3}, torch.bfloat16),
        ("float16", {E4M3}, torch.float16),
        ("fp8", {E4M3, E5M2, torch.float32}, E4M3),
        ("fp8", {E5M2}, E5M2),
        ("fp8", {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}, torch.float8_e4m3fnuz),
        ("fp8_e4m3", {E4M3, E5M2}, E4M3),
        ("fp8_e5m2", {E4M3, E5M2}, E5M2),
        ("fp8_e5m2", {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}, torch.float8_e5m2fnuz),
    ],
)
def test_names(name: str, declared: set[torch.dtype], want: torch.dtype) -> None:
    """The platform's own flavour; e4m3, which has a bit more, where both are there and none is named."""
    assert resolve_kv_dtype(name, torch.bfloat16, declared) is want


def test_refusals() -> None:
    with pytest.raises(UnsupportedCapability, match="fp8_e5m2"):
        resolve_kv_dtype("fp8_e5m2", torch.float32, {E4M3})
    with pytest.raises(UnsupportedCapability, match="no KV cache of this kind; use auto"):
        LLM(platform="torch:cpu", kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        EngineArgs.of(kv_cache_dtype="int8")
    spec = AttentionSpec(4, 2, 32, 32, 0.2, torch.bfloat16, torch.float8_e4m3fnuz)
    with pytest.raises(UnsupportedCapability, match="--kv-cache-dtype fp8_e4m3 or --kv-cache-dtype fp8_e5m2"):
        require_attention(CpuPlatform().capabilities(), spec)


PROMPTS = [
    "def fibonacci(n):",
    "class Stack:\n    def push(self, item):\n",
    "import os\nimport sys\n\n\ndef main(argv):\n    if len(argv) < 2:\n        print('usage: main FILE')\n",
    "import os\nimport sys\n\n\ndef main(argv):\n    if len(argv) < 2:\n        raise SystemExit(2)\n",
    "x = [1, 2, 3]\nfor i in x:\n",
]


def tokens(option: str, **options: Any) -> tuple[list[list[int]], int, int]:
    """What the prompts give, twice; how many of their tokens were in the cache; preemptions."""
    llm = LLM(platform="cpu", dtype="float32", kv_cache_dtype=option, max_model_len=128, block_size=16, **options)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = [output for _ in range(2) for output in llm.generate(PROMPTS, params)]
    found = [list(output.outputs[0].token_ids) for output in outputs]
    preemptions = sum(output.metrics.num_preemptions for output in outputs if output.metrics)
    return found, sum(output.num_cached_tokens for output in outputs), preemptions


@pytest.mark.parametrize("option", ["fp8_e4m3", "fp8_e5m2"])
def test_output_depends_on_the_prompt(option: str) -> None:
    """Not on chunks, prefix hits, preemption and neighbours: what a step computes is read as what lies in the cache."""
    want, _, _ = tokens(option, num_blocks=64, max_num_seqs=1, enable_prefix_caching=False)
    for batched in (7, 1024):
        got, cached, _ = tokens(option, num_blocks=64, max_num_batched_tokens=batched)
        assert got == want, batched
        assert cached
    got, _, preemptions = tokens(option, num_blocks=11)
    assert got == want
    assert preemptions


def test_half_the_bytes() -> None:
    eight, sixteen = (
        LLM(
            platform="cpu", dtype="bfloat16", kv_cache_dtype=name, kv_cache_memory_bytes=1 << 24, max_model_len=128
        ).info
        for name in ("fp8", "auto")
    )
    assert eight.kv_bytes / eight.num_blocks * 2 == sixteen.kv_bytes / sixteen.num_blocks
    assert eight.num_blocks == 2 * sixteen.num_blocks
