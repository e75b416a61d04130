"""The simulated device behaves like one: memory of its own, work that runs late, streams, graphs, errors, limits."""

import copy
import gc
import signal
import threading
from collections.abc import Callable

import npu_sim
import pytest
import torch
import torch.nn.functional as F
from conftest import Run
from torch import Tensor

MIB = 1 << 20


def npu(*shape: int, fill: float = 1.0, index: int = 0) -> Tensor:
    return torch.full(shape, float(fill), device=f"npu:{index}")


def pinned(*shape: int) -> Tensor:
    return torch.zeros(shape, pin_memory=True)


# ------------------------------------------------------------------------------------------------ memory


@pytest.fixture
def settled() -> None:
    """Nothing runs, and nothing that is of no use holds memory."""
    gc.collect()
    torch.npu.synchronize()


def test_the_host_cannot_read_device_memory(run: Run) -> None:
    code = "npu_sim.load(); import ctypes; x = torch.ones(4, device='npu'); ctypes.string_at(x.data_ptr(), 4)"
    assert run(code).returncode == -signal.SIGSEGV
    with pytest.raises(TypeError, match="can't convert npu:0 device type tensor to numpy"):
        npu(4).numpy()


@pytest.mark.parametrize(
    "mix",
    [
        lambda: npu(4) + torch.ones(4),
        lambda: torch.ones(4) @ npu(4),
        lambda: npu(4) + npu(4, index=1),
        lambda: npu(4)[torch.tensor([0, 1])],
        lambda: torch.cat((npu(4), torch.ones(4))),
        lambda: F.embedding(torch.tensor([1]), npu(4, 2)),
        lambda: torch.add(npu(4), 1, out=torch.empty(4)),
    ],
)
def test_mixed_devices_fail(mix: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=r"same device|device type|expected device"):
        mix()


def test_a_number_on_the_host_counts_as_it_is_at_the_call() -> None:
    number = torch.tensor(2.0)
    with torch.npu.held():
        result = npu(3) * number
        number.fill_(9)
    assert result.tolist() == [2, 2, 2]


@pytest.mark.usefixtures("settled")
def test_out_of_memory_is_an_error_that_passes() -> None:
    before = torch.accelerator.memory_allocated()
    total = torch.accelerator.get_memory_info()[1]
    kept = torch.empty(total // 2, dtype=torch.uint8, device="npu")
    with pytest.raises(torch.OutOfMemoryError, match="npu:0 out of memory"):
        torch.empty(total // 2 + MIB, dtype=torch.uint8, device="npu")
    torch.empty(total // 2 + MIB, dtype=torch.uint8, device="npu:1")
    del kept
    torch.empty(total // 2 + MIB, dtype=torch.uint8, device="npu")
    assert torch.accelerator.memory_allocated() == before


@pytest.mark.usefixtures("settled")
def test_memory_is_counted() -> None:
    torch.accelerator.reset_peak_memory_stats()
    before, (free, total) = torch.accelerator.memory_allocated(), torch.accelerator.get_memory_info()
    x = torch.zeros(MIB, dtype=torch.uint8, device="npu")
    y = x + 1
    assert torch.accelerator.memory_allocated() - before == 2 * MIB
    del y
    assert torch.accelerator.memory_allocated() - before == MIB
    assert torch.accelerator.max_memory_allocated() - before == 2 * MIB
    torch.npu.synchronize()
    assert torch.accelerator.get_memory_info() == (free - MIB, total)
    assert torch.npu.memory_stats()["allocated_bytes.all.current"] == before + MIB


@pytest.mark.usefixtures("settled")
def test_an_emptied_cache_leaves_what_lives() -> None:
    """Free memory goes back in whole pages, and small tensors share theirs with others."""
    kept = [npu(128, fill=i) for i in range(128)]
    del kept[::2]
    torch.accelerator.empty_cache()
    assert [x.tolist() for x in kept] == [[i] * 128 for i in range(1, 128, 2)]


@pytest.mark.usefixtures("settled")
def test_memory_in_use_by_late_work_is_not_given_away() -> None:
    with torch.npu.held():
        x = npu(1024, fill=3)
        total = x.sum()
        x.record_stream(torch.accelerator.current_stream())
        allocated = torch.accelerator.memory_allocated()
        del x
        assert torch.accelerator.memory_allocated() < allocated
        other = npu(1024, fill=5)
    assert total.item() == 3 * 1024
    assert other.sum().item() == 5 * 1024


@pytest.mark.usefixtures("settled")
def test_exhausted_memory_waits_for_what_late_work_holds() -> None:
    size = torch.accelerator.get_memory_info()[0] * 2 // 3
    for _ in range(4):
        torch.empty(size, dtype=torch.uint8, device="npu")[:MIB].fill_(1)


def test_storage_grows() -> None:
    x = torch.arange(4.0, device="npu")
    x.resize_(2, 4)
    assert x[0].tolist() == [0, 1, 2, 3]
    out = torch.empty(0, device="npu")
    torch.add(npu(3), 1, out=out)
    assert out.tolist() == [2, 2, 2]
    found = torch.empty(0, dtype=torch.int64, device="npu")
    torch.nonzero(torch.tensor([0, 1, 1], device="npu"), out=found)
    assert found.tolist() == [[1], [2]]


# ------------------------------------------------------------------------------------------------ late work


def test_work_is_late() -> None:
    event, host = torch.Event("npu"), pinned(4)
    with torch.npu.held():
        x = npu(4, fill=2) * 3
        host.copy_(x, non_blocking=True)
        event.record()
        assert not event.query()
        assert not torch.accelerator.current_stream().query()
        assert host.tolist() == [0, 0, 0, 0], "an unsynchronised read must not see what has not been copied yet"
    event.synchronize()
    assert event.query()
    assert host.tolist() == [6, 6, 6, 6]


def test_a_late_copy_reads_pinned_memory_late_and_other_memory_at_once() -> None:
    page_locked, pageable = pinned(2), torch.zeros(2)
    with torch.npu.held():
        late, early = (x.to("npu", non_blocking=True) for x in (page_locked, pageable))
        page_locked.fill_(7)
        pageable.fill_(7)
    assert late.tolist() == [7, 7]
    assert early.tolist() == [0, 0]


@pytest.mark.usefixtures("no_waits")
def test_a_decoder_layers_operators_do_not_wait() -> None:
    x, weight = npu(6, 64), npu(64, 64)
    index, mask = torch.arange(6, device="npu"), torch.ones(6, 6, dtype=torch.bool, device="npu").tril()
    cache = torch.zeros(32, 64, device="npu")
    with torch.npu.held(), torch.inference_mode():
        y = F.silu(F.linear(x, weight)) * x.float().square().mean(-1, keepdim=True).rsqrt()
        cache[index] = y
        cache.index_copy_(0, index + 6, y)
        heads = y.view(6, 4, 16).transpose(0, 1)
        attended = F.scaled_dot_product_attention(heads, heads, heads, mask)
        logits = torch.cat((attended[:, -1], attended[:, 0]), -1).softmax(-1)
        logits.argmax(-1)
        logits.topk(3)
        logits.cumsum(-1).sort(-1)
        torch.where(logits > 0, logits, 0.0).masked_fill_(logits < 0.5, -1)
        logits.sum().add_(1)
        torch.arange(6, device="npu").clamp(max=3).to(torch.int32)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device="npu"),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_the_host_must_know_waits(call: Callable[[Tensor], object]) -> None:
    x, waits = npu(4), torch.npu.waits()
    call(x)
    assert torch.npu.waits() > waits
    torch.npu.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="waits for the device"):
            call(x)
        torch.npu.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="waits for the device"):
            call(x)
    finally:
        torch.npu.set_sync_debug_mode("default")


def test_streams_run_apart_and_in_order() -> None:
    main, side = torch.accelerator.current_stream(), torch.Stream("npu")
    x = npu(4)
    main.synchronize()
    with torch.npu.held():
        x.add_(1)
        with torch.npu.stream(side):
            y = npu(4, fill=5) + 1  # the side stream is not held
        side.synchronize()
        assert side.query()
        assert not main.query()
        side.wait_stream(main)
        with torch.npu.stream(side):
            x.mul_(10)
        assert not side.query()
        main.wait_stream(side)
        x.sub_(1)
    assert x.tolist() == [19] * 4
    assert y.tolist() == [6] * 4


def test_an_event_marks_what_was_launched_when_it_was_recorded() -> None:
    first, second = torch.Event("npu", enable_timing=True), torch.Event("npu", enable_timing=True)
    first.record()
    with torch.npu.held():
        first.synchronize()
        npu(4)
        second.record()
        assert not second.query()
    second.synchronize()
    assert first.elapsed_time(second) > 0


def test_errors_of_late_work_are_raised_when_the_host_waits() -> None:
    x = npu(4)
    with torch.npu.held():
        x.index_select(0, torch.full((1,), 9, device="npu"))
    with pytest.raises(IndexError):
        torch.npu.synchronize()
    assert (x + 1).tolist() == [2, 2, 2, 2]


def test_wrong_arguments_are_an_error_at_the_call() -> None:
    with pytest.raises(RuntimeError, match="size"):
        npu(3) + npu(4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        npu(3, 2) @ npu(3, 2)


# ------------------------------------------------------------------------------------------------ graphs


def test_a_graph_replays_after_its_inputs_changed() -> None:
    x, out = npu(4), npu(4, fill=0)
    graph = torch.npu.Graph()
    stream = torch.Stream("npu")
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        graph.capture_begin()
        y = x * 2
        out.copy_(y + x)
        graph.capture_end()
        assert out.tolist() == [0] * 4, "capture must not run anything"
        for value in (1.0, 7.0):
            x.fill_(value)
            graph.replay()
            assert out.tolist() == [3 * value] * 4
            assert y.tolist() == [2 * value] * 4


def test_graphs_as_context_managers_share_a_pool() -> None:
    x, stream = npu(4), torch.Stream("npu")
    first = torch.npu.Graph()
    with stream, first:
        x.add_(1)
    second = torch.npu.Graph(pool=first.pool())
    with stream, second:
        x.mul_(10)
    for graph in (second, first, second):
        graph.replay()
    assert x.tolist() == [110] * 4


@pytest.mark.usefixtures("settled")
def test_a_graph_keeps_its_memory() -> None:
    x, graph = npu(MIB), torch.npu.Graph()
    torch.npu.synchronize()
    with torch.npu.stream(torch.Stream("npu")):
        graph.capture_begin()
        y = (x + 1).sum()
        graph.capture_end()
        npu(MIB, fill=-5)
        graph.replay()
        assert y.item() == 2 * MIB
    reserved = torch.npu.memory_reserved()
    graph.reset()
    assert reserved - torch.npu.memory_reserved() >= 4 * MIB


def test_a_capture_cannot_wait() -> None:
    x, graph = npu(4), torch.npu.Graph()
    torch.npu.synchronize()
    with torch.npu.stream(torch.Stream("npu")):
        graph.capture_begin()
        try:
            for wait in (x.sum().item, x.nonzero, x.cpu, torch.npu.synchronize, torch.Event("npu").record):
                with pytest.raises(RuntimeError, match="captured in a graph"):
                    wait()
        finally:
            graph.capture_end()
    assert x.tolist() == [1] * 4


# ------------------------------------------------------------------------------------------------ devices, threads


def test_devices_are_apart() -> None:
    assert torch.npu.device_count() == 2
    assert torch.accelerator.current_accelerator() == torch.device("npu")
    torch.accelerator.set_device_index(1)
    try:
        x = torch.ones(4, device="npu")
        assert x.device == torch.device("npu:1")
    finally:
        torch.accelerator.set_device_index(0)
    with torch.npu.device(1):
        assert torch.accelerator.current_device_index() == 1
    y = (x * 3).to("npu:0")
    assert y.device == torch.device("npu:0")
    assert y.tolist() == [3] * 4
    with pytest.raises(RuntimeError, match="npu:2 does not exist"):
        torch.ones(1, device="npu:2")


def test_a_copy_between_devices_is_ordered_with_both() -> None:
    y = npu(4, fill=0, index=1)
    torch.npu.synchronize(1)
    with torch.npu.held():  # device 0 is
        y.copy_(npu(4, fill=6), non_blocking=True)
        y.add_(1)
    assert y.tolist() == [7] * 4


def test_eight_threads() -> None:
    results: dict[int, list[float]] = {}

    def work(number: int) -> None:
        index = number % 2
        torch.accelerator.set_device_index(index)
        x = npu(64, 64, fill=1 / 64, index=index)
        y = torch.eye(64, device=f"npu:{index}") * number
        with torch.npu.stream(torch.Stream(f"npu:{index}")):
            torch.accelerator.current_stream().wait_stream(torch.Stream(f"npu:{index}"))
            torch.npu.synchronize(index)
            for _ in range(50):
                y = x @ y
            results[number] = [torch.accelerator.current_device_index(), y.sum().item()]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [n % 2, pytest.approx(64 * n, rel=1e-4)] for n in range(8)}


def test_a_fork_cannot_use_the_device(run: Run) -> None:
    code = """
import os
npu_sim.load()
assert not torch.npu.is_initialized()
if os.fork() == 0:
    torch.ones(2, device="npu").sum().item()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, "a process that has not used the device may be forked"
torch.ones(2, device="npu")
assert torch.npu.is_initialized()
if os.fork() == 0:
    try:
        torch.ones(2, device="npu")
    except RuntimeError as error:
        os._exit(0 if "fork" in str(error) else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_process_may_end_with_work_in_flight(run: Run) -> None:
    code = """
npu_sim.load()
@npu_sim.kernel("mine::slow(Tensor(a!) x) -> ()")
def slow(x):
    import time
    time.sleep(0.05)
    x.add_(1)
x = torch.zeros(1, device="npu")
for _ in range(10):
    slow(x)
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------ torch


def test_kernels_see_host_tensors_and_run_late() -> None:
    seen = []

    @npu_sim.kernel("npu_test::scale(Tensor x, float by, Tensor(a!) out) -> ()")
    def scale(x: Tensor, by: float, out: Tensor) -> None:
        """Doubles."""
        seen.append(x.device.type)
        if x.sum() > 0:
            torch.mul(x, by, out=out)

    out = npu(3, fill=0)
    with torch.npu.held():
        scale(npu(3), 4.0, out)
        assert not seen
    assert out.tolist() == [4, 4, 4]
    assert seen == ["cpu"]
    with pytest.raises(RuntimeError, match="same device"):
        scale(npu(3), 4.0, torch.zeros(3))


def test_random_numbers_are_the_hosts() -> None:
    torch.manual_seed(3)
    host = torch.randn(100), torch.rand(10), torch.randperm(9)
    torch.manual_seed(3)
    for want, draw in zip(host, (torch.randn, torch.rand, torch.randperm), strict=True):
        assert torch.equal(draw(*want.shape, device="npu").cpu(), want)
    generator = torch.Generator(device="npu")
    first, second = (torch.rand(4, generator=generator.manual_seed(5), device="npu") for _ in range(2))
    assert torch.equal(first, second)
    state = torch.npu.get_rng_state()
    x = torch.rand(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="npu"), x)


def test_modules_move() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Conv1d(8, 8, 3, padding=1))
    x = torch.randn(8, 8)
    want = module(x)
    moved = copy.deepcopy(module).to("npu")
    assert torch.equal(moved(x.to("npu")).cpu(), want)
    again = copy.deepcopy(moved)
    assert all(p.device.type == "npu" for p in again.parameters())
    again.load_state_dict({k: v.cpu() for k, v in moved.state_dict().items()})
    with torch.device("meta"):
        empty = torch.nn.Linear(8, 8)
    assert empty.to_empty(device="npu").weight.device.type == "npu"
    loss = (npu(3).requires_grad_() * npu(3, fill=2)).sum()
    loss.backward()


def test_generation_one_has_no_bfloat16(run: Run) -> None:
    code = """
npu_sim.load()
x = torch.ones(3, device="npu", dtype=torch.float16) + 1
assert not torch.npu.is_bf16_supported()
try:
    torch.ones(3, device="npu").bfloat16() + 1
except RuntimeError as error:
    assert "generation 1 cannot compute in bfloat16" in str(error)
else:
    raise AssertionError
"""
    done = run(code, NPU_SIM_GENERATION="1")
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_error_says_so(run: Run, tmp_path: object) -> None:
    done = run("npu_sim.load()", CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert "there is no C++ compiler: install g++ or set CXX" in done.stderr


CASES: list[Callable[..., Tensor]] = [
    lambda x, w: x @ w,
    lambda x, w: torch.addmm(w[0], x, w),
    lambda x, w: torch.baddbmm(x[None], x[None], w[None], alpha=0.5),
    lambda x, w: F.linear(x, w, w[1]).relu_(),
    lambda x, w: x.softmax(-1).log_softmax(0),
    lambda x, w: F.layer_norm(x, (16,), w[0], w[1]),
    lambda x, w: F.rms_norm(x, (16,), w[0]),
    lambda x, w: F.gelu(x, approximate="tanh") + F.silu(x),
    lambda x, w: x.t().contiguous().view(4, -1).unfold(0, 2, 1),
    lambda x, w: torch.einsum("ij,kj->ik", x, w),
    lambda x, w: x.sort(-1, descending=True).values.cumsum(-1),
    lambda x, w: x.topk(3, -1).indices.float(),
    lambda x, w: x.scatter_add(1, x.argsort(-1), w),
    lambda x, w: torch.where(x > w, x, 0.0).logsumexp(-1),
    lambda x, w: x.masked_select(x > 0),
    lambda x, w: x[[1, 3], :][:, x[0].argmax()],
    lambda x, w: x.bfloat16().float().half().sum(0, dtype=torch.float32),
    lambda x, w: F.scaled_dot_product_attention(x[None], w[None], x[None], is_causal=True),
    lambda x, w: F.conv1d(x[None], w[:, :, None].expand(-1, -1, 3), padding=1),
    lambda x, w: torch.stack((x, w)).amax(0).pow(2).rsqrt().nan_to_num(),
    lambda x, w: x.index_put((torch.zeros(2, dtype=torch.int64, device=x.device),), w[:2], accumulate=True),
    lambda x, w: torch.linalg.svdvals(x),
    lambda x, w: torch.repeat_interleave(x, torch.arange(16, device=x.device), 0),
    lambda x, w: x.view(torch.int32).bitwise_and(255).float(),
]


def test_results_follow_the_default_dtype() -> None:
    x = torch.arange(4, device="npu")
    assert (x / 2).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert (x / 2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.npu.synchronize()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grad", [True, False])
def test_results_are_the_hosts_to_the_bit(case: Callable[..., Tensor], grad: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(16, 16, generator=generator) for _ in range(2))
    with torch.inference_mode(not grad):
        for _ in range(2):  # the second time the shapes are known
            got = case(x.to("npu"), w.to("npu"))
            assert got.device.type == "npu"
            assert torch.equal(got.cpu(), case(x, w))
