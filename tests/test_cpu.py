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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_conformance.arena import Arena, bind, check, prepare, request_outputs, run
from engine_conformance.cases import Case, Row
from engine_cpu import CpuPlatform, layers, native, swaps, threads
from engine_cpu.attention import CpuAttention
from engine_cpu.linear import Packed as LinearPacked
from engine_cpu.linear import PackedLinear
from engine_cpu.memory import HostMemory
from engine_cpu.operations import Operations
from engine_cpu.quantised import CpuQuantized
from engine_cpu.quantised import Packed as CpuPacked
from engine_mutation.host import HostPlatform
from engine_sdk import REFERENCE_OPS, AttentionSpec, DecoderLayer, Norm, QuantScheme, QuantWeight, TorchAttention

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
        {"causal": False, "window": 40},
        {"causal": False, "window": 2**31 - 1},
        {"causal": False, "relative": 20},
    ):
        found.append(Case(spec(**change), 32, ROWS, mode="sharp", memory="fused", lse=True))
        found.append(Case(spec(torch.float32, **change), 48, ROWS, mode="sharp", memory="transposed", lse=True))
    found += [Case(spec(), size, ROWS, mode="needle") for size in (20, 64)]  # panels: one of 20 tokens, and four of 16
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
    for asked in (spec(), spec(causal=False, window=3), spec(causal=False, relative=3)):
        assert isinstance(CpuPlatform().attention(asked), CpuAttention), asked


class Apart(HostMemory):
    """Each weight is an allocation of its own, so that a sanitizer sees a byte beyond it."""

    def for_weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)


def alone_in_memory() -> HostMemory:
    return Apart(CpuPlatform().device())


def check_products(kernels: ctypes.CDLL) -> None:
    """Packed products are right, have one row's bits for any number of rows, and touch nothing that is not theirs."""
    method, draw = PackedLinear(alone_in_memory(), kernels), torch.Generator().manual_seed(0)
    for outputs, width in ((64, 64), (100, 96), (5, 40), (33, 31), (40, 520)):
        weight, bias = (torch.randn(shape, generator=draw).bfloat16() for shape in ((outputs, width), (outputs,)))
        x = torch.full((68, width), torch.nan).bfloat16()  # what is read beyond the rows shows in the result
        x[1:-1] = torch.randn(66, width, generator=draw)
        for some in (None, bias):
            packed = method.pack(weight, some)
            assert packed.product is not None
            whole = method.apply(x[1:-1], packed)
            want = F.linear(x[1:-1].double(), weight.double(), None if some is None else some.double())
            scale = F.linear(x[1:-1].double().abs(), weight.double().abs())
            assert bool(((whole - want).abs() <= 2**-8 * want.abs() + 2**-20 * scale).all()), (outputs, width)
            for rows in (0, 1, 2, 15, 16, 17, 31, 32, 33, 49, 65):
                guarded = torch.full((rows + 2, outputs), 7.0).bfloat16()
                last, out = x[-1 - rows : -1], guarded[1 : rows + 1]
                method.multiply(last, packed, out=out)
                assert torch.equal(out, whole[66 - rows :]), (outputs, width, rows)
                assert bool((guarded[[0, -1]] == 7).all()), (outputs, width, rows)
                check_surroundings(method, Operations(kernels), last, packed)
            ids = torch.randint(outputs, (2, 9), generator=draw)
            assert torch.equal(method.look_up(ids, packed), weight[ids])
            for beyond in (-1, outputs):
                with pytest.raises(IndexError, match=r"token ids beyond the embedding.s .* rows: 1"):
                    method.look_up(torch.tensor([0, beyond]), packed)


def check_surroundings(method: PackedLinear, operations: Operations, x: Tensor, packed: LinearPacked) -> None:
    """What is done on the way has the bits of separate operations: a norm before, a sum after, a feed-forward layer."""
    draw = torch.Generator().manual_seed(1)
    width, eps = x.shape[-1], 0.25
    norm = Norm(torch.rand(width, generator=draw).bfloat16(), eps)
    normed = operations.rms_norm(x, norm.weight, eps) if x.numel() else x
    assert torch.equal(method.multiply(x, packed, norm=norm), method.multiply(normed, packed))
    added = torch.randn(len(x), packed.rows, generator=draw).bfloat16()
    assert torch.equal(method.multiply(x, packed, added=added), added + method.multiply(x, packed))
    if packed.gates:
        weight, bias = torch.randn(width, packed.rows // 2, generator=draw).bfloat16(), added.new_ones(width)
        down = method.pack(weight, bias)
        inner = operations.silu_and_mul(*method.multiply(normed, packed).chunk(2, -1))
        assert torch.equal(method.feed_forward(x, norm, packed, down), x + method.multiply(inner, down))


def check_quantised(kernels: ctypes.CDLL) -> None:
    """Quantised products are right, with zeros too, and have one row's bits for any number of rows."""
    draw = torch.Generator().manual_seed(0)
    for bits, outputs, width, group in (
        *((4, 96, 256, 32), (4, 33, 128, 128), (4, 70, 384, 64)),
        *((8, 5, 64, None), (8, 40, 416, None), (8, 64, 256, 128)),
    ):
        scheme = QuantScheme(f"int{bits}", bits, group)
        method, groups = CpuQuantized(scheme, alone_in_memory(), kernels), width // (group or width)
        limit = 1 << (bits - 1)
        values, zeros = (
            torch.randint(-limit, limit, size, generator=draw).to(torch.int8)
            for size in ((outputs, width), (outputs, groups))
        )
        for dtype, some in zip(DTYPES, (None, zeros, zeros), strict=True):
            scales = torch.rand(outputs, groups, generator=draw).to(dtype)
            packed = method.pack_quantized(QuantWeight(values, scales, some), None)
            assert isinstance(packed, CpuPacked)
            shifted = values.double() - (0 if some is None else some.double().repeat_interleave(width // groups, 1))
            weight = shifted * scales.double().repeat_interleave(width // groups, 1)
            ids = torch.tensor([[outputs - 1, 0]])
            torch.testing.assert_close(method.rows(ids, packed).double(), weight[ids], rtol=1e-6, atol=0)
            for beyond in (-1, outputs):
                with pytest.raises(IndexError, match=f"beyond the embedding's {outputs} rows"):
                    method.rows(torch.tensor([0, beyond]), packed)
            x = torch.full((74, width), torch.nan).to(dtype)  # what is read beyond the rows shows in the result
            x[1:-1] = torch.randn(72, width, generator=draw)
            whole, want = method.apply(x[1:-1], packed), x[1:-1].double() @ weight.T
            spread = (values.double().abs() + 2 * limit) * scales.double().repeat_interleave(width // groups, 1)
            bound = torch.finfo(dtype).eps * want.abs() + 2**-20 * (x[1:-1].double().abs() @ spread.T)
            assert bool(((whole - want).abs() <= bound).all()), (bits, outputs, dtype)
            for rows in (0, 1, 2, 15, 16, 17, 32, 33, 65):
                guarded = torch.full((rows + 2, outputs), 7.0).to(dtype)
                method.multiply(x[-1 - rows : -1], packed, out=guarded[1 : rows + 1])
                assert torch.equal(guarded[1:-1], whole[72 - rows :]), (bits, outputs, dtype, rows)
                assert bool((guarded[[0, -1]] == 7).all()), (bits, outputs, dtype, rows)
                check_around_quantised(method, Operations(kernels), x[-1 - rows : -1], packed)
            # From below the smallest normal number to near the largest: where one row's kernel might round otherwise.
            least, most = (-136, 110) if dtype == torch.bfloat16 else (-20, 0)
            exponents = torch.linspace(least, most, 72).round()[:, None].double()
            apart = (x[1:-1].double() * 2**exponents).to(dtype)
            alone = [method.apply(row, packed) for row in apart]
            assert torch.equal(torch.stack(alone), method.apply(apart, packed)), (bits, outputs, dtype)


def check_around_quantised(method: CpuQuantized, operations: Operations, x: Tensor, packed: CpuPacked) -> None:
    """What is done on the way has the bits of separate operations: a norm before, a sum after, and a gate."""
    draw = torch.Generator().manual_seed(1)
    norm = Norm(torch.rand(x.shape[-1], generator=draw).to(x.dtype), 0.25)
    plain = method.multiply(operations.rms_norm(x, norm.weight, norm.eps) if x.numel() else x, packed)
    assert torch.equal(method.multiply(x, packed, norm=norm), plain)
    added = torch.randn(plain.shape, generator=draw).to(x.dtype)
    assert torch.equal(method.multiply(x, packed, norm=norm, added=added), added + plain)
    if packed.gates:
        inner = operations.silu_and_mul(*plain.chunk(2, -1))
        assert torch.equal(method.multiply(x, packed, norm=norm, gated=True), inner)


def check_all(kernels: ctypes.CDLL) -> None:
    """All kernels of a build are right; ``tests/aarch64`` has this done on another processor."""
    platform = BuiltPlatform()
    platform.kernels = kernels
    for case in cases():
        check(platform, platform.attention(case.spec), case)
    check_products(kernels)
    check_quantised(kernels)
    check_operations(Operations(kernels))
    check_heads(Operations(kernels))
    check_draw(Operations(kernels))
    check_layers(kernels)


@needs_compiler
@pytest.mark.parametrize("flags", ["", "-mno-amx-bf16 -mno-amx-tile", "-mno-avx512f", "-march=x86-64"])
def test_every_instruction_set_agrees_with_the_reference(flags: str, tmp_path: Path) -> None:
    if flags and os.uname().machine != "x86_64":
        pytest.skip("the flags are those of another processor")
    check_all(ctypes.CDLL(str(native.build(["-O1", *flags.split()], tmp_path))))


SANITIZED = """
import sys
sys.path[:0] = [sys.argv[2]]
import ctypes
from test_cpu import check_all
check_all(ctypes.CDLL(sys.argv[1]))
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


@needs_compiler
def test_threads_wait_for_what_others_write() -> None:
    """All of them write a head's keys, 64 tokens at a time, and none reads before all are there."""
    platform = CpuPlatform()
    backend = platform.attention(spec(torch.float32, num_heads=2, num_kv_heads=1, head_dim=256, v_head_dim=256))
    case, before = Case(backend.spec, 32, (Row(0, 130),)), torch.get_num_threads()
    arena = prepare(backend, case, platform.capabilities(), torch.device("cpu"))
    torch.set_num_threads(1)
    want = run(backend, arena)[0]
    torch.set_num_threads(2)
    try:
        for _ in range(1000):
            arena.cache.raw.fill_(1)
            assert torch.equal(run(backend, arena)[0], want)
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


def check_operations(operations: Operations) -> None:
    """Operations on rows take views of all kinds, and agree with the references."""
    for dtype in DTYPES:
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
        q, k = whole[None, ..., :72].transpose(1, 2), whole[None, :, :1, 72:].transpose(1, 2)
        cos, sin = torch.randn(2, 1, 5, 72).to(dtype)
        assert operations.turned(q, k, cos, sin) is not None
        assert operations.turned(q, k, cos[..., :36], sin[..., :36]) is None, "only a part of it is turned"
        for got, want in zip(operations.rotary(q, k, cos, sin), rotated(q, k, cos, sin), strict=True):
            torch.testing.assert_close(got, want, rtol=close["rtol"], atol=4 * torch.finfo(dtype).eps)


def check_heads(operations: Operations) -> None:
    """Heads are normed and turned in place, as separate operations would; values stay."""
    for dtype, width in zip(DTYPES, (72, 64, 6), strict=True):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(7, 5 + 2 * 2, width, generator=draw).to(dtype)
        cos, sin = torch.randn(2, 1, 7, width, generator=draw).to(dtype)
        norms = Norm(torch.rand(width).to(dtype), 0.1), Norm(torch.rand(width).to(dtype), 0.5)
        for some in (None, norms):
            q, k, v = x.split((5, 2, 2), 1)
            if some is not None:
                q, k = (operations.rms_norm(t, n.weight, n.eps) for t, n in zip((q, k), some, strict=True))
            q, k = operations.rotary(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
            got = x.clone()
            operations.heads(5, 2, width, some)(got, cos, sin)
            assert torch.equal(got, torch.cat((q[0].transpose(0, 1), k[0].transpose(0, 1), v), 1)), (dtype, some)
        with pytest.raises(ValueError, match="are turned by"):
            operations.heads(5, 2, width, None)(x.clone(), cos[..., :2], sin[..., :2])


def check_draw(operations: Operations) -> None:
    """The largest of each row, as torch has it: the first of several, the first NaN before all."""
    for dtype in DTYPES:
        for width in (1, 7, 40, 8192, 8193, 30_000):
            x = torch.randn(5, width + 3, generator=torch.Generator().manual_seed(width)).to(dtype)[:, :width]
            x[1] = -torch.inf
            x[2, width // 3] = x[2, -1] = 9  # two of the largest
            x[3, width // 2] = x[3, -1] = torch.nan
            x[3, 0] = x[4, -1] = torch.inf
            for rows in (x, x[:1], x[:0], x.t()[:, :2].t()):
                assert torch.equal(operations.draw(rows, None), rows.max(-1).indices), (dtype, width)


def check_layers(kernels: ctypes.CDLL) -> None:
    """A layer in one call has the bits of its parts one by one, and writes the same to the cache."""
    platform = BuiltPlatform()
    platform.kernels = kernels
    for rows in (ROWS, (Row(300, 1),)):
        for dtype, scheme in (
            (torch.bfloat16, None),
            (torch.bfloat16, QuantScheme("int4", 4, 32)),
            (torch.float16, QuantScheme("int8", 8, None)),
        ):
            memory = alone_in_memory()
            method = PackedLinear(memory, kernels) if scheme is None else CpuQuantized(scheme, memory, kernels)
            check_layer(platform, method, Case(spec(dtype), 32, rows))


def check_layer(platform: BuiltPlatform, method: PackedLinear | CpuQuantized, case: Case) -> None:
    draw, dtype, eps = torch.Generator().manual_seed(0), case.spec.dtype, (0.1, 0.2, 0.3, 0.4)
    backend = platform.attention(case.spec)
    arena = prepare(backend, case, platform.capabilities(), torch.device("cpu"))
    plan, count = backend.plan(arena.batch), int(arena.batch.query_start_host[-1])
    attention = nn.Module()
    vars(attention)["engine_step"] = lambda: (backend, arena.cache, plan)

    def linears(width: int, *outputs: int) -> list[nn.Linear]:
        weight = torch.randn(sum(outputs), width, generator=draw).to(dtype)
        made = [nn.Linear(width, rows, bias=False, dtype=dtype) for rows in outputs]
        for one in made:
            vars(one)["projection"] = SimpleNamespace(members=made, method=method, packed=method.pack(weight, None))
        return made

    norms = [Norm(torch.rand(size, generator=draw).to(dtype), e) for size, e in zip((96, 96, 64, 64), eps, strict=True)]
    qkv, [o], gate_up, [down] = linears(96, 256, 128, 128), linears(256, 96), linears(96, 64, 64), linears(64, 96)
    of = (norms[0], norms[1]), (norms[2], norms[3]), qkv, o, gate_up, down
    forward = layers._whole(DecoderLayer(nn.Module(), attention, *of, 4, 2, 64), platform.kernels)
    assert forward is not None
    x, before = torch.randn(1, count, 96, generator=draw).to(dtype), arena.buffer.clone()
    cos, sin = torch.randn(2, 1, count, 64, generator=draw).to(dtype)
    got, after = forward(x, cos, sin), arena.buffer.clone()

    arena.buffer.copy_(before)
    packed = [vars(one)["projection"].packed for one in (qkv[0], o, gate_up[0], down)]
    parts = method.multiply(x, packed[0], norm=norms[0]).view(count, 8, 64)
    Operations(platform.kernels).heads(4, 2, 64, (norms[2], norms[3]))(parts, cos, sin)
    attended = torch.empty(count, 4, 64, dtype=dtype)
    q, k, v = parts.split((4, 2, 2), 1)
    backend.forward(q, k, v, arena.cache, plan, attended)
    h = method.multiply(attended.view(1, count, 256), packed[1], added=x)
    assert torch.equal(got, method.feed_forward(h, norms[1], packed[2], packed[3]))
    assert torch.equal(after, arena.buffer)
    assert not torch.equal(after, before)
    for wrong in (
        (x.double(), cos, sin),
        (x[..., :64], cos, sin),
        (x, cos[..., :2], sin[..., :2]),
        (x[:, :0], cos, sin),
    ):
        with pytest.raises(ValueError, match=r"the layer takes|are turned by"):
            forward(*wrong)


def rotated(*inputs: Tensor) -> list[Tensor]:
    """The reference, rounded once."""
    return [x.to(inputs[0].dtype) for x in REFERENCE_OPS.rotary(*(x.double() for x in inputs))]


def test_operations_agree_with_the_references(operations: Operations) -> None:
    check_operations(operations)
    check_heads(operations)
    check_draw(operations)


@needs_compiler
def test_a_layer_in_one_call_has_the_bits_of_its_parts() -> None:
    kernels = native.library()
    assert kernels is not None
    check_layers(kernels)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    return REFERENCE_OPS.rotary(q, k, cos, sin)


class Turns(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_rotary_functions_are_exchanged_where_they_compute_the_same(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [torch.randn(1, *shape) for shape in ((4, 3, 64), (2, 3, 64), (3, 64), (3, 64))]
    made: list[Tensor] = []
    monkeypatch.setattr(Operations, "turned", lambda *args: made.append(args[1]))
    for function, same in ((apply_rotary_pos_emb, True), (lambda q, k, cos, sin: (q * cos[0], k), False)):
        monkeypatch.setitem(globals(), "apply_rotary_pos_emb", function)
        model = nn.ModuleList([Turns()])
        want = model[0](*inputs)
        swaps.engine_swaps()["cpu"](model, None, True)[0].pack(PackedLinear(alone_in_memory()))
        made.clear()
        for got, right in zip(model[0](*inputs), want, strict=True):  # what the kernel does not take is the function's
            torch.testing.assert_close(got, right)
        assert len(made) == same


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
        parts.pack(PackedLinear(alone_in_memory()))
        assert ["forward" in vars(m) for m in model] == [True, False, True, False]
        for m, want in zip(model, before, strict=True):
            torch.testing.assert_close(m(x), want)


# Linear layers.


def test_a_weight_shared_with_an_embedding_is_packed_once(operations: Operations) -> None:
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self, shared: int) -> None:
            super().__init__()
            self.embed, self.head, self.other = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False), nn.Module()
            if shared > 0:
                self.head.weight = self.embed.weight
            if shared > 1:
                self.other.weight = self.embed.weight

    method, ids = CpuPlatform().linear(None), torch.tensor([[0, 99, 5]])
    for shared, packs in ((0, False), (1, True), (2, False)):
        model = Model(shared).bfloat16()
        x = model.embed(ids)
        want = model.head(x)
        swaps.engine_swaps()["cpu"](model, None, True)[0].pack(method)
        assert torch.equal(model.embed(ids), x)
        torch.testing.assert_close(model.head(x), want)
        assert model.embed.weight.is_meta == packs == model.head.weight.is_meta, shared


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("ours", [False, True])
def test_packed_weights_are_the_only_copy(dtype: torch.dtype, ours: bool, operations: Operations) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 96, dtype=dtype), torch.randn(64, dtype=dtype)
    method = CpuPlatform().linear(None) if ours else PackedLinear(alone_in_memory())
    assert isinstance(method, PackedLinear)
    packed = method.pack(weight, bias)
    for shape in ((96,), (1, 96), (2, 3, 96), (70, 96), (0, 96), (2, 0, 96)):
        x = torch.randn(shape, dtype=dtype)
        got = method.apply(x, packed)
        assert got.shape == (*shape[:-1], 64)
        torch.testing.assert_close(got, F.linear(x, weight, bias))
    assert (packed.product is not None) == (ours and dtype == torch.bfloat16)
    held = [t for t in vars(packed).values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in held) == weight.numel() + bias.numel()


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


@pytest.mark.parametrize(("asked", "ranks"), [(1000, ""), (3, "2")])
def test_more_threads_than_processors_are_warned_of_once(
    asked: int, ranks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(asked))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked)
    monkeypatch.setattr(threads, "available_processors", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "quota", lambda root=None: math.inf)
    threads.choose.cache_clear()
    try:
        CpuPlatform(), CpuPlatform()
    finally:
        threads.choose.cache_clear()
    assert ["set OMP_NUM_THREADS=" in r.getMessage() for r in caplog.records] == [True]


def test_ranks_share_the_processors(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "usable_cores", lambda processors: 4)
    monkeypatch.setattr(threads, "available_processors", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "quota", lambda root=None: math.inf)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for ranks in ("", "2", "3", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        threads.choose.__wrapped__()
    assert chosen == [2, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    threads.choose.__wrapped__()
    assert not caplog.records
