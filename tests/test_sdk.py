"""The SDK's parts where conformance cannot see them: other layouts, tiny tiles, fake kernels and fake hosts."""

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import engine.hooks
import engine.interfaces
import engine_conformance.plugin
import engine_sdk
from engine.config import EngineArgs
from engine.contract import check_platform
from engine_conformance.arena import check
from engine_conformance.cases import SCALES, Case, Row, cases
from engine_conformance.reference import excess
from engine_conformance.test_ops import routed, silu_gate
from engine_cpu import CpuPlatform
from engine_cuda import CudaPlatform
from engine_rocm import RocmPlatform, architectures
from engine_sdk import (
    AttentionBackend,
    AttentionBatch,
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
    PagedLayout,
    Tiled,
    TokenMajor,
    TorchAttention,
    TorchDevice,
    TorchExperts,
    TorchGraphs,
    TorchMemory,
    TorchPlatform,
    UnsupportedCapability,
    after_decodes,
    host_memory,
    require_attention,
)


class Host(TorchPlatform):
    """What a vendor writes first."""

    name = "host"
    device_type = "cpu"
    contract = "1.0"


class HeadMajorHost(Host):
    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return TorchAttention(spec, layout=HeadMajor, declared=self.capabilities())


class TiledHost(Host):
    """Keys and values apart, in tiles of 8 lanes, of which head sizes are multiples."""

    def capabilities(self) -> Capabilities:
        return dataclasses.replace(super().capabilities(), head_dims=Domain.multiples(8, high=256))

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return TorchAttention(spec, layout=partial(Tiled, lanes=8), declared=self.capabilities())


class Strange(PagedLayout):
    """A vendor's own: tokens from the last to the first, values before keys, and no tensor of four dimensions."""

    def bind(self, storage: Tensor, num_blocks: int) -> Tensor:
        blocks = storage.view(self.kv_dtype).view(num_blocks, -1)
        width = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        tokens: Tensor = blocks[:, : self.block_size * width].unflatten(1, (self.block_size, width))
        return tokens

    def write(self, cache: Tensor, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        tokens = torch.cat((values.flatten(1), keys.flatten(1)), 1)
        cache.index_put_((blocks, self.block_size - 1 - offsets), tokens.to(cache.dtype))

    def gather(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        both = cache[blocks].flip(1).split((values[0, 0].numel(), keys[0, 0].numel()), 2)
        values.copy_(both[0].view_as(values))
        keys.copy_(both[1].view_as(keys))


class StrangeHost(Host):
    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return TorchAttention(spec, layout=Strange, declared=self.capabilities())


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


def test_every_name_is_documented() -> None:
    """Each exported class and function says what it is, and a page of the reference has its module."""
    folder = Path(__file__).parents[1] / "docs"
    pages = "".join((folder / p).read_text() for p in ("vendors/contract.md", "reference/sdk.md", "errors.md"))
    for name in engine_sdk.__all__:
        value = getattr(engine_sdk, name)
        if (inspect.isclass(value) or inspect.isfunction(value)) and value is not Any:
            assert inspect.getdoc(value), name
            assert f"::: {value.__module__}\n" in pages, name


def test_the_marker_of_hooks_is_the_engines() -> None:
    """A module of hooks that imports nothing else is registered, and called."""
    assert engine_sdk.hookimpl.project_name == engine.hooks.PROJECT
    manager = pluggy.PluginManager(engine.hooks.PROJECT)
    manager.add_hookspecs(engine.hooks)
    manager.register(SimpleNamespace(engine_models=engine_sdk.hookimpl(lambda: {"Mine": print})))
    assert manager.hook.engine_models() == [{"Mine": print}]


@pytest.mark.parametrize("platform", [Host, TiledHost, SmallHost])
def test_subclasses_keep_the_contract(platform: type[TorchPlatform]) -> None:
    assert check_platform(platform, "host") is None


@pytest.mark.parametrize("platform", [CpuPlatform, CudaPlatform, RocmPlatform])
def test_platforms_keep_the_contract(platform: type[TorchPlatform]) -> None:
    assert check_platform(platform, platform.name) is None
    assert not platform.probe().available or platform is CpuPlatform or platform.probe().devices


def test_a_deprecation_warns_when_the_class_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine_sdk.deprecation.DEPRECATED, "Platform.compiler", "use compilers(), from 1.4 on")
    with pytest.warns(
        DeprecationWarning, match=r"Late\.compiler will be removed: use compilers\(\), from 1\.4 on"
    ) as told:

        class Late(Host):
            def compiler(self) -> None:
                return None

    assert told[0].filename == __file__

    class Fine(Host):
        pass


def test_platforms_import_no_compiler() -> None:
    code = "import sys, engine_cpu, engine_cuda, engine_rocm; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Attention


@pytest.mark.parametrize("host", [HeadMajorHost, TiledHost, StrangeHost])
@pytest.mark.parametrize("feature", ["causal", "sliding_window", "alibi", "v_head_dim"])
def test_other_layouts(host: type[TorchPlatform], feature: str) -> None:
    platform = host()

    @SCALES["smoke"].certify(15)
    @given(cases(platform.capabilities(), feature))
    def drawn(case: Case) -> None:
        check(platform, platform.attention(case.spec), case)

    drawn()


@pytest.mark.parametrize("layout", [TokenMajor, HeadMajor, partial(Tiled, lanes=16), Strange])
@pytest.mark.parametrize("value_dim", [32, 16, 64])
def test_layouts_keep_every_bit(layout: Callable[..., PagedLayout], value_dim: int) -> None:
    """What is written token by token is exported, copied and imported, in blocks with padding, and nowhere else."""
    made, blocks, padding = layout(8, 2, 32, value_dim, torch.float16), 5, 256
    storage = torch.zeros(blocks * (made.block_bytes + padding), dtype=torch.uint8)
    cache = made.bind(storage, blocks)
    keys, values = torch.randn(16, 2, 32), torch.randn(16, 2, value_dim)
    order = torch.randperm(16)
    at = torch.tensor([3, 1])[order // 8], order % 8
    made.write(cache, *at, keys[order], values[order])
    expected = keys.half().view(2, 8, 2, 32), values.half().view(2, 8, 2, value_dim)
    assert all(map(torch.equal, made.export_blocks(cache, torch.tensor([3, 1])), expected))
    made.copy_blocks(cache, torch.tensor([3, 1]), torch.tensor([2, 4]))
    assert all(map(torch.equal, made.export_blocks(cache, torch.tensor([2, 4])), expected))
    assert not any(part.any() for part in made.export_blocks(cache, torch.tensor([0])))
    made.import_blocks(cache, torch.tensor([0, 3]), *made.export_blocks(cache, torch.tensor([1, 2])))
    assert all(map(torch.equal, made.export_blocks(cache, torch.tensor([3, 0])), expected))
    assert int((storage.view(torch.float16) != 0).sum()) == blocks * 8 * 2 * (32 + value_dim), "nothing but the blocks"


def test_tiles_fit_their_lanes() -> None:
    with pytest.raises(UnsupportedCapability, match=r"head_dims: 40 .*multiples"):
        Tiled(16, 2, 40, 40, torch.float16)


def test_decodes_and_the_rest_apart() -> None:
    """A backend that hands all but the decodes on, as one with a decode kernel of its own does."""

    class Apart(TorchAttention):
        def plan(self, batch: AttentionBatch) -> Any:
            num = batch.num_decodes
            decodes = dataclasses.replace(
                batch,
                query_start=batch.query_start[: num + 1],
                seq_lens=batch.seq_lens[:num],
                slots=batch.slots[:num],
                query_start_host=batch.query_start_host[: num + 1],
                seq_lens_host=batch.seq_lens_host[:num],
            )
            return num, super().plan(decodes), super().plan(after_decodes(batch))

        def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
            num, decodes, rest = plan
            super().forward(q[num:], k[num:], v[num:], cache, rest, out[num:])
            super().forward(q[:num], k[:num], v[:num], cache, decodes, out[:num])

    rows = (Row(40, 1), Row(0, 1), Row(17, 1), Row(30, 30), Row(64, 10))
    check(Host(), Apart(layer()), Case(layer(), 16, rows, empty_rows=1))


@pytest.mark.parametrize(
    "feature",
    ["causal", "sliding_window", "chunked", "sinks", "bidirectional", "two_sided_window", "relative_bias", "lse"],
)
def test_small_tiles(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """Long sequences and large batches, in small: every tile has one request and every slice few queries."""
    monkeypatch.setattr("engine_sdk.attention._HOST_TILE_BYTES", 1)
    monkeypatch.setattr("engine_sdk.attention._HOST_SCORES", 500)
    platform = Host()

    @SCALES["smoke"].certify(15)
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
        ({"v_head_dim": 32}, "v_head_dim"),
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


def test_values_have_sizes_of_their_own() -> None:
    """As in latent attention, whose keys are longer than its values."""
    keys, values = Domain.of(192, 576), Domain.of(128, 512)
    declared = Capabilities(attention=frozenset({"v_head_dim"}), head_dims=keys, v_head_dims=values)
    require_attention(declared, layer(head_dim=192, v_head_dim=128))
    require_attention(declared, layer(head_dim=576, v_head_dim=576))
    for changes, name in (({"head_dim": 128}, "head_dims"), ({"head_dim": 192, "v_head_dim": 64}, "v_head_dims")):
        with pytest.raises(UnsupportedCapability) as caught:
            require_attention(declared, layer(**changes))
        assert caught.value.name == name


def test_a_refused_dtype_has_a_remedy() -> None:
    with pytest.raises(UnsupportedCapability, match="use --dtype float16 or --dtype float32"):
        SmallHost().attention(layer(dtype=torch.bfloat16))
    with pytest.raises(UnsupportedCapability, match="or --kv-cache-dtype float16 or"):
        SmallHost().attention(layer(kv_dtype=torch.int8))


def test_refuses_undeclared_calls() -> None:
    backend = SmallHost().attention(layer(softcap=3.0))
    with pytest.raises(UnsupportedCapability, match="block_sizes: 48"):
        backend.layout(48)
    with pytest.raises(UnsupportedCapability, match="lse"):
        check(SmallHost(), backend, Case(backend.spec, 16, (Row(3, 1),), lse=True))


def test_refuses_a_chunk_without_a_mask() -> None:
    with pytest.raises(UnsupportedCapability, match="not defined"):
        Host().attention(layer(causal=False, chunk=4))


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


def test_a_hosts_cache_costs_nothing_until_it_is_used_but_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchDevice, "memory_info", lambda self: MemoryInfo(8 << 30, 16 << 30))  # whatever else runs
    memory = CpuPlatform().memory()
    before, size = memory.kv_budget(0.5), 1 << 30
    with memory.peak() as grown:
        cache = memory.allocate(size)
    assert grown[0] < size // 8
    assert memory.kv_budget(0.5) < before - 0.4 * size
    del cache
    assert memory.kv_budget(0.5) > before - 0.4 * size


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


def test_graphs_share_the_pool_of_those_that_are_alive() -> None:
    """A pool ends with its last graph, and capturing into one that ended is an error of torch's."""
    pools: list[object] = []

    class Captured:
        def pool(self) -> object:
            return self._pool

        def __init__(self, pool: object) -> None:
            pools.append(pool)
            self._pool = pool or object()

        def capture_end(self) -> None:
            pass

    class Graphs(TorchGraphs):
        def _begin(self, pool: Any) -> Any:
            return Captured(pool)

    graphs = Graphs(CpuPlatform().device())
    first = graphs.capture(lambda: None)
    second = graphs.capture(lambda: None)
    del first
    third = graphs.capture(lambda: None)
    del second, third
    graphs.capture(lambda: None)
    assert pools[0] is None
    assert pools[1] is pools[2] is not None
    assert pools[3] is None


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_waits_within_a_capture(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """What would spoil it is refused before, where the device's module can; afterwards all is as before."""
    modes: list[object] = [1]
    module = SimpleNamespace(get_sync_debug_mode=lambda: modes[0], set_sync_debug_mode=modes.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    graph = SimpleNamespace(capture_end=lambda: modes.append("ended"), pool=lambda: 1)

    class Graphs(TorchGraphs):
        def _begin(self, pool: Any) -> Any:
            return graph

    def launch() -> None:
        modes.append("launched")
        if fails:
            raise RuntimeError("called a synchronizing operation")

    with pytest.raises(RuntimeError) if fails else nullcontext():
        Graphs(CpuPlatform().device()).capture(launch)
    assert modes == [1, "error", "launched", 1, "ended"]
