"""The host's platform: its kernels, how they are built, and that results depend on the request alone."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_conformance.arena import Arena, bind, check, prepare, request_outputs, run
from engine_conformance.cases import Case, Row
from engine_cpu import CpuPlatform, native, swaps, threads
from engine_cpu.attention import CpuAttention
from engine_cpu.linear import PackedLinear
from engine_cpu.operations import Operations
from engine_mutation.host import HostPlatform
from engine_sdk import REFERENCE_OPS, AttentionSpec, TorchAttention

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="there is no C++ compiler"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (Row(600, 1), Row(5, 1), Row(0, 1), Row(70, 33), Row(0, 200), Row(300, 2))


def spec(dtype: torch.dtype = torch.bfloat16, kv_dtype: torch.dtype | None = None, **changes: Any) -> AttentionSpec:
    plain = AttentionSpec(4, 2, 64, 64, 0.125, dtype, kv_dtype or dtype)
    return dataclasses.replace(plain, **changes)


class BuiltPlatform(CpuPlatform):
    """The host's platform on kernels of our own build."""

    kernels: ctypes.CDLL

    def attention(self, spec: AttentionSpec) -> CpuAttention:
        return CpuAttention(spec, self.kernels, self.capabilities())


def cases() -> list[Case]:
    """Shapes that reach every path: all dtypes and pairs of them, odd sizes, every feature, parts, and tiles."""
    found = [Case(spec(a, b), 32, ROWS, mode="needle", lse=True, padding_tokens=3) for a in DTYPES for b in DTYPES]
    for dtype in DTYPES:
        found.append(Case(spec(dtype, head_dim=7, v_head_dim=7), 5, ROWS, mode="needle"))
        found.append(Case(spec(dtype, head_dim=80, v_head_dim=72, num_heads=14), 16, ROWS, empty_rows=2, idle_rows=1))
    for change in (
        {"window": 40},
        {"chunk": 48},
        {"softcap": 5.0},
        {"sinks": True},
        {"alibi": True},
        {"causal": False},
    ):
        found.append(Case(spec(**change), 32, ROWS, mode="sharp", memory="fused", lse=True))
        found.append(Case(spec(torch.float32, **change), 48, ROWS, mode="sharp", memory="transposed", lse=True))
    found.append(Case(spec(num_heads=2, num_kv_heads=1), 32, (Row(4200, 1), Row(8, 1), Row(2100, 40)), mode="needle"))
    found.append(Case(spec(num_heads=80, num_kv_heads=1), 32, (Row(90, 1), Row(30, 3)), reads=True))
    return found


@pytest.fixture
def arena() -> Arena:
    if native.library() is None:
        pytest.skip("there is no C++ compiler")
    platform = CpuPlatform()
    return prepare(platform.attention(spec()), Case(spec(), 32, ROWS), platform.capabilities(), torch.device("cpu"))


@needs_compiler
def test_kernels_are_what_runs() -> None:
    assert isinstance(CpuPlatform().attention(spec()), CpuAttention)


@needs_compiler
@pytest.mark.parametrize("flags", ["", "-mno-amx-bf16 -mno-amx-tile", "-mno-avx512f", "-march=x86-64"])
def test_every_instruction_set_agrees_with_the_reference(flags: str, tmp_path: Path) -> None:
    if flags and os.uname().machine != "x86_64":
        pytest.skip("the flags are those of another processor")
    platform = BuiltPlatform()
    platform.kernels = ctypes.CDLL(str(native.build(["-O1", *flags.split()], tmp_path)))
    for case in cases():
        check(platform, platform.attention(case.spec), case)


SANITIZED = """
import sys
sys.path[:0] = [sys.argv[2]]
import ctypes
from test_cpu import BuiltPlatform, cases
from engine_conformance.arena import check
platform = BuiltPlatform()
platform.kernels = ctypes.CDLL(sys.argv[1])
for case in cases():
    check(platform, platform.attention(case.spec), case)
print("all is well")
"""


@needs_compiler
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Out-of-bounds accesses of torch's memory are found too, as the sanitizer serves its allocations."""
    compiler = native._compiler()[0]
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{compiler} has no address sanitizer")
    library = native.build(["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"], tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), str(Path(__file__).parent)],
        env={**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "all is well", done.stderr[-4000:]


# The same bits, whatever else is in the batch.


def alone(arena: Arena, index: int, chunk: int) -> Tensor:
    """The output of one request of `arena`, computed by itself in chunks of its new tokens."""
    row, request, size = arena.case.rows[index], arena.requests[index], arena.case.block_size
    backend = CpuPlatform().attention(arena.case.spec)
    layout = backend.layout(size)
    _, _, _, cache = bind(layout, arena.num_blocks, 0, torch.device("cpu"))
    blocks = torch.arange(arena.num_blocks)
    layout.import_blocks(cache, blocks, *arena.layout.export_blocks(arena.after_cache, blocks))
    pieces = []
    for begin in range(row.computed, row.length, chunk):
        end = min(begin + chunk, row.length)
        batch = dataclasses.replace(
            arena.batch,
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            query_start_host=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            seq_lens_host=torch.tensor([end], dtype=torch.int32),
            block_table=torch.tensor([request.blocks], dtype=torch.int32),
            slots=torch.zeros(end - begin, dtype=torch.int64),
            num_decodes=int(end - begin == 1),
            max_query_len=end - begin,
            max_seq_len=end,
        )
        q = request.q[begin - row.computed : end - row.computed]
        out = torch.empty_like(q)
        backend.forward(q, None, None, cache, backend.plan(batch), out)
        pieces.append(out)
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_depend_on_the_request_alone(dtype: torch.dtype, threads: int, arena: Arena) -> None:
    """Neither on the batch, nor on how the prompt is cut, decodes of single tokens included, nor on threads."""
    platform, plain = CpuPlatform(), spec(dtype)
    arena = prepare(platform.attention(plain), Case(plain, 32, ROWS), platform.capabilities(), torch.device("cpu"))
    outs = request_outputs(arena, run(platform.attention(plain), arena)[0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for index, out in enumerate(outs):
            for chunk in (1, 7, 32, 1000):
                assert torch.equal(alone(arena, index, chunk), out), (index, chunk)
    finally:
        torch.set_num_threads(before)


# Building.


def test_without_a_compiler_torch_serves_and_one_warning_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            platform = CpuPlatform()
            assert type(platform.attention(spec())) is TorchAttention
            platform.attention(spec(window=3))
    finally:
        native.library.cache_clear()
    assert [native.REMEDY in r.getMessage() for r in caplog.records] == [True]


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo no good >&2; exit 1; }\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(native.BuildError, match=r"broken\+\+ failed: no good; install"):
        native.build(folder=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(native.BuildError, match="XDG_CACHE_HOME"):
        native.build(folder=tmp_path / "file" / "cache")


@needs_compiler
def test_a_build_is_kept_and_follows_from_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as pool:  # at once, as several processes may
        first, second = pool.map(lambda _: native.build(["-O0"], tmp_path), range(2))
    assert first == second
    assert list(tmp_path.iterdir()) == [first]
    made = first.stat().st_mtime_ns
    assert native.build(["-O0"], tmp_path).stat().st_mtime_ns == made
    monkeypatch.setattr(native, "_processor", lambda: "another")
    assert native.build(["-O0"], tmp_path) != first


@needs_compiler
def test_the_process_keeps_subnormal_numbers() -> None:
    assert native.library() is not None
    assert torch.tensor(1e-40).mul(0.5).item() > 0


# Parts of a model that the host computes in one kernel.


@pytest.fixture
def operations() -> Operations:
    if (kernels := native.library()) is None:
        pytest.skip("there is no C++ compiler")
    return Operations(kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_take_views(operations: Operations, dtype: torch.dtype) -> None:
    whole = torch.randn(5, 3, 2 * 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(72).to(dtype)
    close: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    for x in (whole[..., :72], whole[:, 1, 72:], whole[0, 0, :72], whole[None, :, None, :, 72:], whole[:0, :, :72]):
        torch.testing.assert_close(
            operations.rms_norm(x, weight, 1e-6), REFERENCE_OPS.rms_norm(x, weight, 1e-6), **close
        )
    gate, up = whole.split(72, -1)
    torch.testing.assert_close(operations.silu_and_mul(gate, up), REFERENCE_OPS.silu_and_mul(gate, up), **close)
    extreme = torch.tensor([-1e4, -0.0, 0.0, 1e4, torch.inf, torch.nan]).to(dtype)
    ones = torch.ones_like(extreme)
    assert operations.silu_and_mul(extreme, ones).isnan().tolist() == (F.silu(extreme) * ones).isnan().tolist()


@pytest.mark.parametrize(("outputs", "width"), [(16, 32), (100, 96), (1000, 256), (5, 64), (64, 40)])
def test_products_with_few_rows(operations: Operations, outputs: int, width: int) -> None:
    weight = torch.randn(outputs, width).bfloat16()
    for shape in ((1, width), (3, width), (2, 8, width), (33, width), (64, width), (65, width), (0, width)):
        x = torch.randn(shape).bfloat16()
        got, want = operations.few_rows(x, weight), x.double() @ weight.double().T
        assert got.shape == want.shape
        assert bool(((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-4).all()), shape
        if x.shape[:1] == (3,):
            assert torch.equal(operations.few_rows(x[:1], weight), got[:1]), "a row's bits depend on the others"


def test_parts_are_exchanged_where_they_compute_the_same(operations: Operations) -> None:
    class PlainRMSNorm(nn.Module):
        def __init__(self, plus: float) -> None:
            super().__init__()
            self.weight, self.eps, self.plus = nn.Parameter(torch.rand(64)), 1e-6, plus

        def forward(self, x: Tensor) -> Tensor:
            return REFERENCE_OPS.rms_norm(x, self.weight + self.plus, self.eps)

    class PlainMLP(nn.Module):
        def __init__(self, act: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]

    model = nn.ModuleList([PlainRMSNorm(0), PlainRMSNorm(1), PlainMLP(F.silu), PlainMLP(F.gelu)])
    [parts] = swaps.engine_swaps()["cpu"](model, None, True)
    x = torch.randn(4, 64)
    with torch.inference_mode():
        before = [m(x) for m in model]
        parts.pack(HostPlatform().linear(None) or object())
        assert not any("forward" in vars(m) for m in model), "another platform's model was changed"
        parts.pack(PackedLinear())
        assert ["forward" in vars(m) for m in model] == [True, False, True, False]
        for m, want in zip(model, before, strict=True):
            torch.testing.assert_close(m(x), want)


# Linear layers.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_packed_weights_are_the_only_copy(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(48, 40, dtype=dtype), torch.randn(48, dtype=dtype)
    method = PackedLinear()
    packed = method.pack(weight, bias)
    for shape in ((40,), (1, 40), (2, 3, 40), (70, 40), (0, 40), (2, 0, 40)):
        x = torch.randn(shape, dtype=dtype)
        got = method.apply(x, packed)
        assert got.shape == (*shape[:-1], 48)
        torch.testing.assert_close(got, F.linear(x, weight, bias))
    held = [t for t in vars(packed).values() if isinstance(t, Tensor) and t.shape == weight.shape]
    assert len(held) == 1


# Threads.


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "max 100000"}, math.inf),
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1.5),
        ("0::/of/the/host", {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            "4:cpu,cpuacct:/x",
            {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("5:memory:/x", {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000"}, math.inf),
    ],
)
def test_quotas_of_control_groups_count(group: str, files: dict[str, str], quota: float, tmp_path: Path) -> None:
    for name, content in {"proc/self/cgroup": group, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert threads.quota(tmp_path) == quota
    assert threads.usable_cores({0, 1, 2, 3}, tmp_path) == min(4, math.ceil(quota) if quota < 4 else 4)


def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for processor, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.usable_cores({0, 1, 2, 3}, tmp_path) == 2
    assert threads.usable_cores({0, 2}, tmp_path) == 1


def test_more_threads_than_processors_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    threads.choose.cache_clear()
    try:
        CpuPlatform(), CpuPlatform()
    finally:
        threads.choose.cache_clear()
    assert ["set OMP_NUM_THREADS=" in r.getMessage() for r in caplog.records] == [True]
