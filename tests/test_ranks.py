"""Ranks as processes: compiled as on an accelerator, behind the asynchronous engine, and sharing a host's memory."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.extensions.parallel.processes import rank_environment
from engine.extensions.serving import AsyncLLM
from engine_conformance.tiny_models import tiny_model
from engine_cpu import CpuPlatform
from engine_sdk import MemoryInfo

PROMPTS: list[Any] = [{"prompt_token_ids": [(i * k + 3) % 120 + 3 for i in range(4 + 9 * k)]} for k in range(1, 5)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {"platform": "cpu", "skip_tokenizer_init": True, "max_num_seqs": 8, "dtype": "float32"}
OPTIONS |= {"num_blocks": 40, "disable_log_stats": True, "max_num_batched_tokens": 32}

COMPILED = """
import os
from torch._dynamo.backends.debugging import aot_eager
from engine_cpu import CpuPlatform
from engine_sdk import CompilerOptions

def backend(graph, inputs, **options):
    with open(os.environ["COMPILED"], "a") as log:
        log.write(f"{os.getpid()}\\n")
    return aot_eager(graph, inputs)

class Compiled(CpuPlatform):
    name = "compiled"

    def compiler(self):
        return CompilerOptions(os.environ.get("BACKEND", backend))

    def linear(self, scheme):  # its kernels are no compiler's business
        return None
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], str]:
    def save(name: str) -> str:
        tiny_model(name).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def generate(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(("name", "options"), [("qwen3_moe", {"tensor_parallel_size": 2})])
def test_compiled_ranks_say_what_one_eager_rank_says(
    name: str,
    options: dict[str, Any],
    folder: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = folder(name)
    info = tmp_path / "compiled-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: compiled\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[engine.platforms]\ncompiled = compiled:Compiled\n")
    (tmp_path / "compiled.py").write_text(COMPILED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setenv("COMPILED", str(tmp_path / "log"))
    want = generate(LLM(model, **OPTIONS, enforce_eager=True))
    llm = LLM(model, **{**OPTIONS, "platform": "compiled"}, **options)
    assert generate(llm) == want
    compiled = (tmp_path / "log").read_text().split()
    assert len(set(compiled)) == 2, "each rank compiles"
    assert len(compiled) <= 16, "and not every layer for itself"
    assert "uncompiled" not in capfd.readouterr().err


def test_a_rank_that_ends_while_nothing_runs_is_noticed(folder: Callable[[str], str]) -> None:
    model = folder("llama")

    async def run() -> list[int]:
        async with AsyncLLM(model, tensor_parallel_size=2, **OPTIONS) as llm:
            async for _ in llm.generate(PROMPTS[0], GREEDY):
                pass
            ranks = children(llm.process_id)
            assert len(ranks) == 2
            os.kill(ranks[1], signal.SIGKILL)
            error = await asyncio.wait_for(llm.ended(), 30)
            assert f"rank 1 of 2 (process {ranks[1]}) was killed by signal 9" in str(error)
            return ranks

    until_gone(asyncio.run(run()))


def test_ranks_on_one_host_share_its_memory_and_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_sdk.platform.host_memory", lambda: MemoryInfo(8 << 30, 16 << 30))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS")

    def default() -> int:
        found: int = CpuPlatform().configure({}).defaults["kv_cache_memory_bytes"]
        return found

    assert default() == 2 << 30
    environment = rank_environment(4)
    assert environment["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", environment["LOCAL_WORLD_SIZE"])
    assert default() == (2 << 30) / 4
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(100)["OMP_NUM_THREADS"] == "7", "the user's word counts"


def children(parent: int) -> list[int]:
    """Processes that a process has started, in their order."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text()
        except OSError:  # it has ended meanwhile
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            found.append(int(path.parent.name))
    return sorted(found)


def until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"{left} are left"
        time.sleep(0.05)
