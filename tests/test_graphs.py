"""Captured steps and compiled layers: whatever is replayed or compiled, the tokens stay the same.

The host has no graphs. A stand-in records what a step launches and launches it again, on the tensors of the capture.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import engine.graphs
import engine.runner
from engine import LLM, SamplingParams
from engine.graphs import _round_up
from engine.staging import Staging
from engine_conformance.tiny_models import tiny_model
from engine_cpu import CpuPlatform
from engine_sdk import (
    AttentionBatch,
    AttentionSpec,
    CompilerOptions,
    Graph,
    GraphRuntime,
    Plan,
    TorchAttention,
)

OPTIONS: dict[str, Any] = {
    "platform": "cpu",
    "skip_tokenizer_init": True,
    "max_model_len": 96,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 24,
    "block_size": 4,
    "num_blocks": 256,
}


class HostGraph(Graph):
    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self._launch()


class HostGraphs(GraphRuntime):
    def __init__(self) -> None:
        self.made: list[HostGraph] = []

    def capture(self, launch: Callable[[], None]) -> Graph:
        self.made.append(HostGraph(launch))
        return self.made[-1]


class Refreshed(TorchAttention):
    """Plans in plain torch read the host: a captured one is planned anew before each replay, behind a stable object."""

    def plan(self, batch: AttentionBatch) -> Plan:
        if not batch.captured:
            return super().plan(batch)
        plan = [batch]
        self.refresh(plan, batch)
        return plan

    def refresh(self, plan: Plan, batch: AttentionBatch) -> None:
        lengths = batch.query_start_host.diff()
        num_decodes = int((lengths.cumprod(0) == 1).sum())
        assert batch.captured
        assert int(batch.seq_lens_host.max()) <= batch.max_seq_len
        plan[0] = super().plan(dataclasses.replace(batch, captured=False, num_decodes=num_decodes))

    def forward(self, q: Any, k: Any, v: Any, cache: Any, plan: Any, out: Any, **kwargs: Any) -> None:
        super().forward(q, k, v, cache, plan[0] if isinstance(plan, list) else plan, out, **kwargs)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> HostGraphs:
    runtime = HostGraphs()
    monkeypatch.setattr(CpuPlatform, "graphs", lambda self: runtime)
    monkeypatch.setattr(CpuPlatform, "attention", lambda self, spec: attention(spec))
    return runtime


def attention(spec: AttentionSpec) -> Refreshed:
    return Refreshed(spec)


def declare(monkeypatch: pytest.MonkeyPatch, graphs: Literal["none", "uniform", "full"]) -> None:
    declared = dataclasses.replace(CpuPlatform().capabilities(), graphs=graphs)
    monkeypatch.setattr(CpuPlatform, "capabilities", lambda self: declared)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma2")  # two KV groups
    tiny_model("gemma2").save_pretrained(path)
    return path


def generate(folder: Path, **options: Any) -> list[list[int]]:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 128) for _ in range(n)] for n in (1, 40, 7, 19, 3, 33, 12, 26)]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=6 + i, ignore_eos=True, repetition_penalty=1.2)
        for i in range(len(prompts))
    ]
    llm = LLM(str(folder), **{**OPTIONS, **options})
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("declared", ["uniform", "full"])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5, "num_blocks": 60}], ids=["roomy", "crowded"])
def test_replays_change_nothing(
    folder: Path,
    runtime: HostGraphs,
    monkeypatch: pytest.MonkeyPatch,
    declared: Literal["uniform", "full"],
    overlap: bool,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(engine.graphs, "_SHORTEST", 16)  # so that sequences outgrow a limit
    plain = generate(folder, async_scheduling=overlap, **options)
    assert not runtime.made
    declare(monkeypatch, declared)
    assert generate(folder, async_scheduling=overlap, **options) == plain
    assert len(runtime.made) >= 2
    assert sum(graph.replays for graph in runtime.made) > len(runtime.made)


def test_eager_is_eager(folder: Path, runtime: HostGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "full")
    monkeypatch.setattr(CpuPlatform, "compiler", lambda self: CompilerOptions("no such backend"))
    generate(folder, enforce_eager=True)
    assert not runtime.made


def test_what_cannot_be_captured_runs_eagerly(
    folder: Path, runtime: HostGraphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(launch: Callable[[], None]) -> Graph:
        raise RuntimeError("a copy waits for the device")

    plain = generate(folder)
    declare(monkeypatch, "full")
    monkeypatch.setattr(runtime, "capture", refuse)
    with caplog.at_level(logging.WARNING):
        assert generate(folder) == plain
    assert caplog.text.count("a copy waits for the device") == 1


def test_staging_that_moved_is_captured_anew(
    folder: Path, runtime: HostGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(monkeypatch, "uniform")
    monkeypatch.setattr(engine.runner, "Staging", functools.partial(Staging, capacity=12_000))
    llm = LLM(str(folder), **{**OPTIONS, "max_num_batched_tokens": 96})
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    first = llm.generate([3, 4, 5], params)[0].outputs[0].token_ids
    assert len(runtime.made) == 1
    llm.generate(list(range(3, 90)), SamplingParams(max_tokens=1))
    assert llm.generate([3, 4, 5], params)[0].outputs[0].token_ids == first
    assert len(runtime.made) == 2
    assert runtime.made[1].replays > 0


def test_shapes_waste_little() -> None:
    sizes = sorted({_round_up(n) for n in range(1, 513)})
    assert sizes[:10] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert len(sizes) < 30
    for n in range(1, 513):
        assert n <= _round_up(n) <= max(n + 1, 1.5 * n)


def compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str | Callable[..., Any], **options: Any
) -> list[list[int]]:
    torch._dynamo.reset()
    monkeypatch.setattr(CpuPlatform, "compiler", lambda self: CompilerOptions(backend))  # type: ignore[arg-type]
    monkeypatch.setattr(CpuPlatform, "linear", lambda self, scheme: None)  # its kernels are no compiler's business
    return generate(folder, **options)


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "qwen3_moe", "gpt_oss"])
def test_compiled_layers_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any, **_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = generate(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert compiled(tmp_path, monkeypatch, backend) == plain
    assert "uncompiled" not in caplog.text
    assert 1 <= len(graphs) <= 8, f"{len(graphs)} variants"  # one token or many; layers and activations of experts


def test_what_does_not_compile_runs_eagerly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = generate(folder)
    with caplog.at_level(logging.WARNING):
        assert compiled(folder, monkeypatch, "no such backend") == plain
    assert "runs uncompiled" in caplog.text
    assert "no such backend" in caplog.text
