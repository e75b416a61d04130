"""The SDK's parts where conformance cannot see them: other layouts, tiny tiles, fake kernels and fake hosts."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import engine.interfaces
import engine_conformance.plugin
import engine_sdk
from engine.config import EngineArgs
from engine.contract import check_platform
from engine_conformance.cases import Case, Row, cases, certify, check
from engine_conformance.reference import excess
from engine_conformance.test_ops import routed, silu_gate
from engine_cpu import CpuPlatform
from engine_cuda import CudaPlatform
from engine_rocm import RocmPlatform, architectures
from engine_sdk import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    CommunicatorError,
    Domain,
    ExpertsSpec,
    ExpertWeights,
    GroupedExperts,
    GroupSpec,
    HeadMajor,
    MemoryInfo,
    TorchAttention,
    TorchExperts,
    TorchMemory,
    TorchPlatform,
    UnsupportedCapability,
    host_memory,
)


class Host(TorchPlatform):
    """What a vendor writes first."""

    name = "host"
    device_type = "cpu"
    contract = "1.0"


class HeadMajorHost(Host):
    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return TorchAttention(spec, layout=HeadMajor, declared=self.capabilities())


class SmallHost(Host):
    def capabilities(self) -> Capabilities:
        return Capabilities(
            dtypes=frozenset({torch.float32, torch.float16}),
            head_dims=Domain.of(64),
            block_sizes=Domain.multiples(16, high=32),
            attention=frozenset({"softcap"}),
        )


def layer(**changes: Any) -> AttentionSpec:
    spec = AttentionSpec(8, 2, 64, 64, 0.125, torch.float16, torch.float16)
    return dataclasses.replace(spec, **changes)


def test_reexports_the_contract() -> None:
    assert set(engine.interfaces.__all__) <= set(engine_sdk.__all__)
    assert all(hasattr(engine_sdk, name) for name in engine_sdk.__all__)


@pytest.mark.parametrize("platform", [Host, HeadMajorHost, SmallHost])
def test_subclasses_keep_the_contract(platform: type[TorchPlatform]) -> None:
    assert check_platform(platform, "host") is None


@pytest.mark.parametrize("platform", [CpuPlatform, CudaPlatform, RocmPlatform])
def test_platforms_keep_the_contract(platform: type[TorchPlatform]) -> None:
    assert check_platform(platform, platform.name) is None
    assert not platform.probe().available or platform is CpuPlatform or platform.probe().devices


def test_platforms_import_no_compiler() -> None:
    code = "import sys, engine_cpu, engine_cuda, engine_rocm; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Attention


@pytest.mark.parametrize("feature", ["causal", "sliding_window", "chunked", "alibi"])
def test_head_major_layout(feature: str) -> None:
    platform = HeadMajorHost()

    @certify(15)
    @given(cases(platform.capabilities(), feature))
    def drawn(case: Case) -> None:
        check(platform, platform.attention(case.spec), case)

    drawn()


@pytest.mark.parametrize("feature", ["causal", "sliding_window", "chunked", "sinks", "bidirectional", "lse"])
def test_small_tiles(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """Long sequences and large batches, in small: every tile has one request and every slice few queries."""
    monkeypatch.setattr("engine_sdk.attention._HOST_TILE_BYTES", 1)
    monkeypatch.setattr("engine_sdk.attention._HOST_SCORES", 500)
    platform = Host()

    @certify(15)
    @given(cases(platform.capabilities(), feature))
    def drawn(case: Case) -> None:
        check(platform, platform.attention(case.spec), case)

    drawn()


def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All decodes in one tile, however much their lengths differ."""
    monkeypatch.setattr("engine_sdk.attention._HOST_TILE_BYTES", 1 << 30)
    rows = tuple(Row(length, 1) for length in (300, 0, 15, 16, 17, 120))
    for spec in (layer(), layer(window=20), layer(chunk=24), layer(alibi=True), layer(window=5, sinks=True)):
        check(Host(), Host().attention(spec), Case(spec, 16, rows, empty_rows=2))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"dtype": torch.bfloat16}, "dtypes"),
        ({"kv_dtype": torch.int8}, "kv_dtypes"),
        ({"head_dim": 80, "v_head_dim": 80}, "head_dims"),
        ({"v_head_dim": 32}, "head_dims"),
        ({"window": 7}, "sliding_window"),
        ({"chunk": 7}, "chunked"),
        ({"sinks": True}, "sinks"),
        ({"alibi": True}, "alibi"),
        ({"causal": False}, "bidirectional"),
    ],
)
def test_refuses_undeclared_layers(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedCapability) as caught:
        SmallHost().attention(layer(**changes))
    assert caught.value.name == name


def test_refuses_undeclared_calls() -> None:
    backend = SmallHost().attention(layer(softcap=3.0))
    with pytest.raises(UnsupportedCapability, match="block_sizes: 48"):
        backend.layout(48)
    with pytest.raises(UnsupportedCapability, match="lse"):
        check(SmallHost(), backend, Case(backend.spec, 16, (Row(3, 1),), lse=True))


def test_refuses_a_window_without_a_mask() -> None:
    with pytest.raises(UnsupportedCapability, match="not defined"):
        Host().attention(layer(causal=False, window=4))


# Experts


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_ways_through_experts_agree(transposed: bool, bias: bool) -> None:
    """Those of a host, and both that do not wait for an accelerator."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    experts, hidden, inner = 5, 32, 48
    up, down = draw(experts, 2 * inner, hidden) / 6, draw(experts, hidden, inner) / 6
    up_bias, down_bias = (draw(experts, 2 * inner), draw(experts, hidden)) if bias else (None, None)
    stored = (up.mT.contiguous(), down.mT.contiguous()) if transposed else (up, down)
    weights = ExpertWeights(*stored, silu_gate, up_bias, down_bias)
    spec = ExpertsSpec(experts, 3, True, transposed, torch.bfloat16)
    x, ids = draw(40, hidden), torch.randint(0, experts + 2, (40, 3), generator=generator)
    scores = torch.rand(40, 3, generator=generator)
    want, bound = routed(x, ids, scores, up, down, up_bias, down_bias, silu_gate)
    here = TorchExperts(spec)
    assert excess(here.apply(x, ids, scores, weights), want, bound) <= 1
    assert excess(engine_sdk.combine(here._all(x, ids, weights), ids, scores, experts), want, bound) <= 1
    assert excess(GroupedExperts(spec).apply(x, ids, scores, weights), want, bound) <= 1


def test_experts_without_tokens() -> None:
    weights = ExpertWeights(torch.ones(2, 4, 8), torch.ones(2, 8, 4), F.relu)
    method = TorchExperts(ExpertsSpec(2, 1, False, False, torch.float32))
    nothing = method.apply(torch.ones(0, 8), torch.zeros(0, 1, dtype=torch.int64), torch.ones(0, 1), weights)
    assert nothing.shape == (0, 8)


# Memory


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"


def test_host_memory_without_groups(tmp_path: Path) -> None:
    write(tmp_path, proc__meminfo=MEMINFO)
    assert host_memory(tmp_path) == MemoryInfo(600 * 1024, 1000 * 1024)


def test_host_memory_under_version_2(tmp_path: Path) -> None:
    """The tightest group around the process counts, and what it may drop counts as free."""
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n")
    group = tmp_path / "sys/fs/cgroup/a"
    for folder, limit, used, cache in ((group, "400000", "300000", 50000), (group / "b", "max", "100", 0)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cache}\n")
    assert host_memory(tmp_path) == MemoryInfo(150000, 400000)


def test_host_memory_under_version_1(tmp_path: Path) -> None:
    """In a container the group's path is the host's, and the limit lies at the mount itself."""
    write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="5:cpu:/x\n4:memory:/docker/123\n0::/\n")
    mount = tmp_path / "sys/fs/cgroup/memory"
    mount.mkdir(parents=True)
    (mount / "memory.limit_in_bytes").write_text("500000")
    (mount / "memory.usage_in_bytes").write_text("600000")
    assert host_memory(tmp_path) == MemoryInfo(0, 500000)


def test_peak_where_it_cannot_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_sdk.memory._reset_resident_peak", lambda: False)
    with TorchMemory(Host().device()).peak() as extra:
        pass
    assert extra == [0]


# Platforms


@pytest.mark.parametrize("device_type", ["nonsense", "xpu"])
def test_probe_says_why_not(device_type: str) -> None:
    class Absent(Host):
        pass

    Absent.device_type = device_type
    probe = Absent.probe()
    assert not probe.available
    assert device_type in probe.reason


def test_probe_counts_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda name: module)

    class Npu(Host):
        device_type = "npu"

    assert [device.name for device in Npu.probe().devices] == ["npu:0", "npu:1"]
    assert Npu.probe().accelerator


def test_graphs_on_a_host() -> None:
    assert Host().graphs() is None


def test_cpu_comes_after_accelerators_and_leaves_memory_to_others() -> None:
    assert not CpuPlatform.probe().accelerator
    defaults = CpuPlatform().configure(dict.fromkeys(f.name for f in dataclasses.fields(EngineArgs))).defaults
    EngineArgs.of(**defaults)
    assert defaults["kv_cache_memory_bytes"] <= min(4 << 30, host_memory().total // 4)


@pytest.mark.parametrize(
    ("platform", "cuda", "hip", "count", "reason"),
    [
        (CudaPlatform, None, None, 0, "built without CUDA: pip install torch"),
        (CudaPlatform, None, "7.2", 1, "built for ROCm, whose platform is rocm"),
        (CudaPlatform, "13.0", None, 0, "no NVIDIA GPU is visible; CUDA_VISIBLE_DEVICES is '7'"),
        (CudaPlatform, "13.0", None, 2, ""),
        (RocmPlatform, None, None, 0, "built without ROCm: pip install torch"),
        (RocmPlatform, "13.0", None, 1, "built for CUDA, whose platform is cuda"),
        (RocmPlatform, None, "7.2", 0, "no AMD GPU is visible; HIP_VISIBLE_DEVICES is '7'"),
        (RocmPlatform, None, "7.2", 2, ""),
    ],
)
def test_gpu_probes(
    monkeypatch: pytest.MonkeyPatch,
    platform: type[TorchPlatform],
    cuda: str | None,
    hip: str | None,
    count: int,
    reason: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "7")
    probe = platform.probe()
    assert probe.available == (not reason)
    assert reason in probe.reason
    assert len(probe.devices) == (0 if reason else count)


def test_amd_architectures(tmp_path: Path) -> None:
    for node, version in enumerate((0, 90402, 90010, 110000, 120001)):
        folder = tmp_path / str(node)
        folder.mkdir()
        (folder / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")
    assert list(architectures(tmp_path)) == ["gfx942", "gfx90a", "gfx1100", "gfx1201"]


# Communicator of one rank; conformance has those of several.


def test_communicator_of_one() -> None:
    alone = Host().communicator(GroupSpec("tp", (3,), 3))
    x = torch.arange(6.0).view(2, 3)
    assert (alone.rank, alone.size, alone.capturable) == (0, 1, False)
    calls: list[Callable[[Tensor], Tensor]] = [
        alone.all_reduce,
        alone.all_gather,
        alone.reduce_scatter,
        alone.broadcast,
        lambda x: alone.all_to_all(x, [2], [2]),
    ]
    for call in calls:
        got = call(x)
        assert torch.equal(got, x)
        assert got.data_ptr() != x.data_ptr()
    alone.barrier()
    with pytest.raises(CommunicatorError, match="every rank's size"):
        alone.all_gather(x, 0, [3])
    with pytest.raises(CommunicatorError, match="do not fit"):
        alone.all_to_all(x, [1], [1])
    alone.close()
    with pytest.raises(CommunicatorError, match="was closed"):
        alone.all_reduce(x)


def test_communicator_needs_processes() -> None:
    with pytest.raises(CommunicatorError, match="not initialised"):
        Host().communicator(GroupSpec("tp", (0, 1), 0))


def test_communicator_that_is_not_declared() -> None:
    with pytest.raises(UnsupportedCapability, match="collectives"):
        SmallHost().communicator(GroupSpec("tp", (0,), 0))


# The conformance suite's own rules


pytest_plugins = ["pytester"]


def test_a_skip_is_a_failure(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.fixture
        def conformance_platform(request):
            return request.param

        def test_lazy(conformance_platform):
            pytest.skip("not today")
    """)
    result = pytester.runpytest_subprocess("--platform=cpu")
    result.assert_outcomes(failed=1)


@pytest.mark.parametrize(
    ("platform", "reason"), [("cuda", "*cannot run here: torch*"), ("npv", "*no platform 'npv' is installed*")]
)
def test_a_platform_that_cannot_run_ends_the_session(pytester: pytest.Pytester, platform: str, reason: str) -> None:
    if platform == "cuda" and CudaPlatform.probe().available:
        platform = "rocm"
    result = pytester.runpytest_subprocess(f"--platform={platform}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([reason])


def test_plugin_is_light() -> None:
    """It is loaded in every pytest run of the environment."""
    code = f"import sys, {engine_conformance.plugin.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
