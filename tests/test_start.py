"""From the start of a command to a model: what is imported when, and memory that is written ahead."""

import gc
import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineArgs
from engine.extensions import checkpoints
from engine.extensions.cli import main
from engine_cpu import CpuPlatform, memory, native
from engine_cpu.linear import PackedLinear
from engine_cpu.memory import HostMemory, Slab
from engine_sdk import MemoryInfo

MIB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted as Linux does")
needs_compiler = pytest.mark.skipif(native.library() is None, reason=native.REMEDY)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def written(slab: Slab | None) -> None:
    """Wait until a slab's thread has written all of it, or was stopped."""
    assert slab is not None
    assert slab._writer is not None
    slab._writer.join()


def test_parts_follow_each_other_and_stay_what_they_become(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken while the thread still writes, as it is slow here."""
    monkeypatch.setattr(memory, "_AT_ONCE", 4096)
    slab = Slab(64 * MIB, ahead=True)
    parts = [slab.take(shape, torch.bfloat16) for shape in ((3, 5), (1000, 4096), (7,), (24 * MIB,))]
    end = 0
    for number, part in enumerate(parts, 1):
        assert part is not None
        assert part.data_ptr() % 64 == 0
        assert part.data_ptr() >= end
        end = part.data_ptr() + part.nbytes
        part.fill_(number)
    written(slab)
    for number, part in enumerate(parts, 1):
        assert part is not None
        assert bool((part == number).all())


def test_what_does_not_fit_is_none() -> None:
    slab = Slab(64 * MIB)
    assert slab.take((64 * MIB + 1,), torch.uint8) is None
    assert slab.take((64 * MIB - 64,), torch.uint8) is not None
    assert slab.take((65,), torch.uint8) is None
    assert slab.take((64,), torch.uint8) is not None


@needs_proc
def test_it_is_written_before_it_is_taken_and_given_back_after() -> None:
    before = resident()
    slab = Slab(64 * MIB, ahead=True)
    written(slab)
    assert resident() - before > 60 * MIB
    kept = slab.take((16 * MIB,), torch.uint8)
    assert kept is not None
    kept.fill_(1)
    slab.end()
    assert 12 * MIB < resident() - before < 24 * MIB
    assert bool((kept == 1).all())


EARLY = """
import sys
from engine_cpu import memory

memory._AT_ONCE = 4096
memory.Slab(1 << 30, ahead=True)
sys.exit(3)
"""


def test_a_process_may_end_while_memory_is_written() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


def host(monkeypatch: pytest.MonkeyPatch, free: int) -> HostMemory:
    found = CpuPlatform().memory()
    assert isinstance(found, HostMemory)
    monkeypatch.setattr(found._device, "memory_info", lambda: MemoryInfo(free, free))
    return found


@needs_proc
def test_no_more_is_written_than_a_machine_can_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MOST_AHEAD", 8 * MIB)
    little = host(monkeypatch, 7 * MIB)
    little.expect(4 * MIB)
    assert little._slab is None
    enough = host(monkeypatch, 100 * MIB)
    enough.expect(0)
    assert enough._slab is None
    before = resident()
    enough.expect(400 * MIB)
    written(enough._slab)
    assert resident() - before < 20 * MIB, "no more than the limit"


@needs_proc
def test_weights_beyond_what_was_expected_find_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = resident(), host(monkeypatch, 400 * MIB)
    found.expect(64 * MIB)
    written(found._slab)
    sizes = (24 * MIB, 48 * MIB, 80 * MIB, 64, 0)
    parts = [found.for_weight((size,), torch.uint8).fill_(n) for n, size in enumerate(sizes)]
    assert resident() - before < 166 * MIB, "what was expected and not taken went back"
    assert all(bool((part == n).all()) for n, part in enumerate(parts))


def test_where_no_large_pages_are_left_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    found = host(monkeypatch, 100 * MIB)
    found.expect(MIB)
    assert found.for_weight((3, 5), torch.bfloat16).shape == (3, 5)
    with pytest.raises(RuntimeError, match="memory"):
        found.for_weight((1 << 60,), torch.uint8)


@needs_proc
@pytest.mark.parametrize("then", [lambda m: m.kv_budget(0.1), lambda m: m.allocate(1)], ids=["kv_budget", "allocate"])
def test_a_cache_finds_what_was_not_needed(then: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = resident(), host(monkeypatch, 400 * MIB)
    found.expect(64 * MIB)
    then(found)
    assert resident() - before < 16 * MIB


@needs_compiler
@pytest.mark.parametrize("rows", [(64, 32, 32), (64, 32, 5), (64, 5, 32), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_packed_apart_are_those_packed_together(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    platform = CpuPlatform()
    platform.memory().expect(MIB)
    method, alone = platform.linear(None), PackedLinear(HostMemory(platform.device()), native.library())
    assert isinstance(method, PackedLinear)
    weights = [torch.randn(n, 40).to(dtype) for n in rows]
    bias, x = torch.randn(sum(rows)).to(dtype), torch.randn(3, 40).to(dtype)
    got, want = method.pack_joined(weights, bias), alone.pack(torch.cat(weights), bias)
    assert torch.equal(method.apply(x, got), alone.apply(x, want))


def test_the_size_of_files_is_what_to_expect(tmp_path: Path) -> None:
    args, nbytes = EngineArgs(model=str(tmp_path)), checkpoints.engine_load_formats()["auto"].nbytes  # type: ignore[attr-defined]
    assert nbytes(args) == 0, "there is no model"
    (tmp_path / "model-1.safetensors").write_bytes(bytes(30))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(12))
    for wrong in ("{", "[]"):
        (tmp_path / "config.json").write_text(wrong)
        assert nbytes(args) == 0
    (tmp_path / "config.json").write_text("{}")
    assert nbytes(args) == 42
    assert nbytes(replace(args, quantization="int8")) == 0
    assert nbytes(replace(args, dtype="float32")) == 0
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    assert nbytes(args) == 0


ORDER = """
import sys
from engine_cpu.memory import HostMemory
from engine.llm import LLM

def expect(self, nbytes):
    print("transformers" in sys.modules, nbytes > 0)

HostMemory.expect = expect
LLM(platform="cpu")
print("transformers" in sys.modules)
"""


def test_the_platform_hears_of_weights_before_transformers_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", ORDER], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize("words", [["--max-tokens", "1"], ["--model", "/nowhere"]])
def test_a_command_searches_for_garbage_again(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", "--platform", "cpu", *words, "1 2"])
    assert gc.isenabled()
    assert bool(code) == ("/nowhere" in words)
    assert ("does not exist" in capsys.readouterr().err) == bool(code)
