"""Ranks as processes: compiled as on an accelerator, behind the asynchronous engine, and sharing a host's memory."""

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.errors import EngineDeadError
from engine.extensions.parallel.channel import Memory
from engine.extensions.parallel.processes import rank_environment
from engine.extensions.parallel.rank import LocalLine
from engine.extensions.serving import AsyncLLM, core_process
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

BOOM = """
import sys
from engine.hooks import hookimpl

def adapt(model, context):
    forward = model.model.forward
    def fail(*args, **options):
        if options["input_ids"].shape[1] == 24 and sys.argv[1:2] == ["1"]:
            raise ArithmeticError("boom")
        return forward(*args, **options)
    model.model.forward = fail

@hookimpl
def engine_models():
    return {"Qwen3MoeForCausalLM": adapt}
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


def test_compiled_ranks_say_what_one_eager_rank_says_and_an_exception_comes_with_its_traceback(
    folder: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = folder("qwen3_moe")
    install(tmp_path, "compiled", COMPILED, "[engine.platforms]\ncompiled = compiled:Compiled\n")
    install(tmp_path, "boom", BOOM, "[engine.plugins]\nboom = boom\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.setenv("COMPILED", str(tmp_path / "log"))
    want = generate(LLM(model, **OPTIONS, enforce_eager=True))
    llm = LLM(model, tensor_parallel_size=2, **{**OPTIONS, "platform": "compiled"})
    assert generate(llm) == want
    compiled = (tmp_path / "log").read_text().split()
    assert len(set(compiled)) == 2, "each rank compiles"
    assert len(compiled) <= 16, "and not every layer for itself"
    assert "uncompiled" not in capfd.readouterr().err
    runner: Any = llm._core.runner
    pids = [process.pid for process in runner._ranks._processes]
    with pytest.raises(EngineDeadError, match=rf"rank 1 of 2 \(process {pids[1]}\): ArithmeticError: boom") as caught:
        llm.generate([{"prompt_token_ids": list(range(3, 27))}], GREEDY)
    (note,) = caught.value.__notes__
    assert 'raise ArithmeticError("boom")' in note
    assert note.count("Traceback") == 1
    until_gone(pids)


def install(site: Path, name: str, code: str, entries: str) -> None:
    """A distribution of one module."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    (site / f"{name}.py").write_text(code)


def test_replicas_serve_and_a_rank_that_ends_while_nothing_runs_is_noticed(folder: Callable[[str], str]) -> None:
    model = folder("llama")

    async def run() -> tuple[list[int], list[list[int]]]:
        async with AsyncLLM(model, data_parallel_size=2, **OPTIONS) as llm:

            async def last(prompt: Any) -> list[int]:
                (tokens,) = [list(o.outputs[0].token_ids) async for o in llm.generate(prompt, GREEDY, final_only=True)]
                return tokens

            said = await asyncio.gather(*map(last, PROMPTS))
            ranks = children(llm.process_id)
            assert len(ranks) == 2
            os.kill(ranks[1], signal.SIGKILL)
            error = await asyncio.wait_for(llm.ended(), 30)
            assert f"rank 0 of 1 (process {ranks[1]}) was killed by signal 9" in str(error)
            return ranks, said

    ranks, said = asyncio.run(run())
    until_gone(ranks)
    assert said == generate(LLM(model, **OPTIONS))


@pytest.mark.parametrize("process", ["a rank", "the core"])
def test_a_process_ends_with_who_started_it_and_has_not_read_all(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    ours, theirs = socket.socketpair()
    theirs.send(b"unread")
    reads: Any
    if process == "a rank":
        reads = LocalLine(0, 1, Memory.create(), os.eventfd(0), theirs.detach())._sock
    else:
        reads = core_process._Inbox(theirs)._file
    ours.close()
    assert ended.wait(10)
    for sock in (reads, theirs):
        sock.close()


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
