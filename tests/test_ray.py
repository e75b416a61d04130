"""Ranks on several nodes: a cluster of two on this machine, which Ray takes for two machines."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from engine import LLM, SamplingParams
from engine.config import EngineArgs
from engine.errors import ConfigError, EngineDeadError
from engine.extensions.parallel import cluster, messages, worker
from engine.extensions.parallel.network import Door, NetworkLine, Pulse
from engine_conformance.tiny_models import tiny_model
from engine_sdk import DeviceInfo, Probe, TorchPlatform

PROMPTS: list[Any] = [{"prompt_token_ids": [(i * k + 3) % 120 + 3 for i in range(4 + 9 * k)]} for k in range(1, 5)]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
OPTIONS: dict[str, Any] = {"platform": "cpu", "skip_tokenizer_init": True, "max_num_seqs": 8, "dtype": "float32"}
OPTIONS |= {"kv_cache_memory_bytes": 4 << 20, "disable_log_stats": True, "max_num_batched_tokens": 32}

BOOM = """
import torch.distributed as dist
from engine.hooks import hookimpl

def adapt(model, context):
    forward = model.model.forward
    def fail(*args, **options):
        if options["input_ids"].shape[1] == 24 and dist.is_initialized() and dist.get_rank() == 1:
            raise ArithmeticError("boom")
        return forward(*args, **options)
    model.model.forward = fail

@hookimpl
def engine_models():
    return {"LlamaForCausalLM": adapt}
"""


NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of two nodes with a processor each; a plugin is installed on both, and not here."""
    from ray.cluster_utils import Cluster

    site = tmp_path_factory.mktemp("site")
    info = site / "boom-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: boom\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[engine.plugins]\nboom = boom\n")
    (site / "boom.py").write_text(BOOM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with patch.context() as theirs:
            theirs.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))
            found = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
            found.add_node(**NODE)
        yield found
        ray.shutdown()
        found.shutdown()


@pytest.fixture(scope="module")
def address(nodes: Any) -> str:
    """Of the cluster."""
    found: str = nodes.address
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def alone(folder: str) -> list[list[int]]:
    """What one rank says."""
    return generate(LLM(folder, **OPTIONS))


@pytest.fixture
def start(address: str, folder: str) -> Callable[..., LLM]:
    return lambda **options: LLM(folder, **OPTIONS, distributed_executor_backend="ray", ray_address=address, **options)


def generate(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


def seats(llm: LLM) -> list[Any]:
    runner: Any = llm._core.runner
    found: list[Any] = runner._ranks._seats
    return found


def nothing_is_left(pids: list[int]) -> None:
    """Neither processes nor reservations."""
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    until(lambda: ray.available_resources().get("CPU") == 2)
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}


def test_two_nodes_say_what_one_rank_says_and_a_rank_that_is_killed_is_named(
    start: Callable[..., LLM], alone: list[list[int]]
) -> None:
    llm = start(tensor_parallel_size=2)
    assert generate(llm) == alone
    first, second = seats(llm)
    assert first.node.id != second.node.id
    os.kill(second.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(
        EngineDeadError, match=rf"rank 1 of 2 \(process {second.pid} on node {second.node.id[:8]}, .*worker process"
    ):
        generate(llm)
    assert time.monotonic() - begin < 60
    nothing_is_left([first.pid, second.pid])


def test_stages_on_two_nodes_and_an_exception_with_its_traceback(
    start: Callable[..., LLM], alone: list[list[int]]
) -> None:
    llm = start(pipeline_parallel_size=2)
    assert generate(llm) == alone
    pids = [seat.pid for seat in seats(llm)]
    with pytest.raises(
        EngineDeadError, match=r"rank 1 of 2 \(process \d+ on node .*\): ArithmeticError: boom"
    ) as caught:
        llm.generate([{"prompt_token_ids": list(range(3, 27))}], GREEDY)
    (note,) = caught.value.__notes__
    assert 'raise ArithmeticError("boom")' in note
    assert note.count("Traceback") == 1
    nothing_is_left(pids)


def test_replicas_on_two_nodes_and_one_that_hangs_is_named(start: Callable[..., LLM], alone: list[list[int]]) -> None:
    llm = start(data_parallel_size=2, distributed_timeout_seconds=3.0)
    core: Any = llm._core
    first, second = (seat for own in core._cores for seat in own.runner._ranks._seats)
    assert first.node.id != second.node.id
    assert generate(llm) == alone
    os.kill(second.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(
        EngineDeadError,
        match=rf"for [34] s, and rank 0 \(process {second.pid} on node {second.node.id[:8]}, .* is stopped",
    ):
        generate(llm)
    assert time.monotonic() - begin < 15
    del llm, core
    nothing_is_left([first.pid, second.pid])


def test_a_node_that_is_lost_is_named(nodes: Any, start: Callable[..., LLM], alone: list[list[int]]) -> None:
    third = nodes.add_node(**NODE)
    llm = start(pipeline_parallel_size=3)
    assert generate(llm) == alone
    pids = [seat.pid for seat in seats(llm)]
    (lost,) = (seat for seat in seats(llm) if seat.node.id == third.node_id)
    for pid in (third.all_processes["raylet"][0].process.pid, lost.pid):
        os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    says = rf"rank {pids.index(lost.pid)} of 3 \(process {lost.pid} on node {lost.node.id[:8]}, .*lost with its node"
    with pytest.raises(EngineDeadError, match=says):
        generate(llm)
    assert time.monotonic() - begin < 10
    nodes.remove_node(third)
    nothing_is_left(pids)


def test_a_cluster_with_too_few_devices_says_what_it_has(start: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)4 ranks need .*and the cluster has 2: 1 on node \w{8}, .*ray start"):
        start(tensor_parallel_size=4)


def test_a_process_is_in_one_cluster(address: str) -> None:
    found = cluster.connect(address)
    for same in (None, "auto", address):
        assert cluster.connect(same) is found
    for other in ("local", "127.0.0.1:1"):
        with pytest.raises(
            ConfigError, match=rf"has joined Ray's cluster at {address}, and ray_address asks .*{other}"
        ):
            cluster.connect(other)


def test_devices_that_are_in_use_are_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cluster.connect(address)
    group = cluster.place(found, EngineArgs(), "CPU").group
    monkeypatch.setattr(cluster, "_FREE", 0.5)
    try:
        with pytest.raises(ConfigError, match=r"of which 1 are free for 0\.5 s now, and the cluster has 2"):
            cluster.place(found, EngineArgs(pipeline_parallel_size=2), "CPU")
    finally:
        ray.util.remove_placement_group(group)


@pytest.mark.parametrize(
    ("address", "says"),
    [("ray://head:10001", "Ray's client.*on a node of the cluster"), ("127.0.0.1:1", "no Ray cluster answers at")],
)
def test_addresses_that_cannot_work(address: str, says: str) -> None:
    ray.shutdown()
    with pytest.raises(ConfigError, match=says):
        cluster.connect(address)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "engine\[ray\]"'):
        LLM(distributed_executor_backend="ray")


def test_nodes_have_the_same_versions() -> None:
    worker.check_versions({"node a": worker.versions()})
    with pytest.raises(ConfigError, match=r"(?s)node b has torch 1\.0, here .*install the same versions"):
        worker.check_versions({"node a": worker.versions(), "node b": worker.versions() | {"torch": "1.0"}})


# Where ranks go, on clusters that are not there.


class Cluster:
    """What `place` asks Ray."""

    def __init__(self, *counts: int) -> None:
        self.util = self
        self._counts = counts
        self.bundles: list[dict[str, int]] = []

    def nodes(self) -> list[dict[str, Any]]:
        kept = ("NodeID", "NodeManagerHostname", "NodeManagerAddress", "NodeManagerPort")
        return [
            dict.fromkeys(kept, f"n{i}") | {"Alive": True, "Resources": {"CHIP": count}}
            for i, count in enumerate(self._counts)
        ]

    def placement_group(self, bundles: list[dict[str, int]], strategy: str) -> Any:
        assert strategy == "PACK"
        self.bundles = bundles
        return SimpleNamespace(wait=lambda seconds: True)


@pytest.mark.parametrize(
    ("counts", "width", "stages", "bundles", "places"),
    [
        ((8, 8), 4, 2, [4, 4], [0, 0, 0, 0, 1, 1, 1, 1]),
        ((8,), 2, 1, [2], [0, 0]),
        ((3, 3), 2, 2, [2, 2], [0, 0, 1, 1]),
        ((3, 1), 2, 2, [1, 1, 1, 1], [0, 1, 2, 3]),
        ((1, 1), 2, 1, [1, 1], [0, 1]),
    ],
)
def test_a_stage_is_on_one_node_where_one_is_large_enough(
    counts: tuple[int, ...],
    width: int,
    stages: int,
    bundles: list[int],
    places: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster.Node, "answers", lambda self: True)
    found = Cluster(*counts)
    args = EngineArgs(tensor_parallel_size=width, pipeline_parallel_size=stages)
    assert cluster.place(found, args, "CHIP").bundles == places
    assert found.bundles == [{"CHIP": n} for n in bundles]


@pytest.mark.parametrize(
    ("accelerator", "devices", "ids", "position", "index"),
    [
        (True, 8, ["5"], 0, 5),  # all are to be seen
        (True, 1, ["5"], 0, 0),  # only its own is
        (True, 1, ["GPU-5d0a"], 0, 0),
        (True, 4, [], 3, 3),  # Ray does not number them
        (False, 1, [], 3, 3),  # a host's ranks share it
    ],
)
def test_a_ranks_device_is_the_one_that_ray_gave_it(
    accelerator: bool, devices: int, ids: list[str], position: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(True, devices=tuple(DeviceInfo(i, "chip") for i in range(devices)), accelerator=accelerator)
    monkeypatch.setattr(worker, "select_platform", lambda name: SimpleNamespace(probe=probe, plugin="chip"))
    assert worker.own_device(EngineArgs(), ids, position) == index
    if accelerator:
        with pytest.raises(ConfigError, match=r"Ray has a device 8 for this rank, and chip sees"):
            worker.own_device(EngineArgs(), [], 8)


def test_a_platform_says_what_ray_calls_its_devices() -> None:
    class Chip(TorchPlatform):
        name = "chip"
        device_type = "chip"
        contract = "1.0"

    assert cluster.resource_of(Chip) == "CHIP"
    assert cluster.resource_of(type("Named", (Chip,), {"cluster_resource": "TILE"})) == "TILE"
    for name in ("cuda", "rocm"):
        assert cluster.resource_of(cluster.platform_class(name)[1]) == "GPU"
    assert cluster.request(ray, "CHIP") == {"num_cpus": 0, "resources": {"CHIP": 1}}
    assert cluster.request(ray, "GPU") == {"num_cpus": 0, "num_gpus": 1}
    assert cluster.request(ray, "CPU") == {"num_cpus": 1}


# The connections.


def test_only_who_knows_the_token_comes_in_and_ends_with_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    lines: dict[int, NetworkLine] = {}

    def connect() -> None:
        for rank in (1, 0):
            lines[rank] = NetworkLine(rank, 2, door.address, door.token)

    with Door("127.0.0.1") as door, socket.create_connection(door.address) as stranger:
        stranger.sendall(b"x" * 37)
        ranks = threading.Thread(target=connect)
        ranks.start()
        steps, watch = door.admit(2, lambda: None)
        ranks.join()
        assert stranger.recv(1) == b"", "it was turned away"
    for sock, data in zip(steps, (b"zero", b"one"), strict=True):
        sock.sendall(messages.frame(data))
    assert [lines[rank].receive() for rank in range(2)] == [b"zero", b"one"]
    lines[0].entered()
    pulse = Pulse(watch[0], 0.01)
    until(lambda: pulse.counters() == (1, 1))
    for sock in (*steps, *watch):
        sock.close()
    until(lambda: ended == [0, 0])
    for line in lines.values():
        line._steps.close()
        line._watch.close()


def test_a_driver_that_waits_hears_why_nobody_comes() -> None:
    def gone() -> None:
        raise EngineDeadError("rank 1 is gone")

    with Door("127.0.0.1") as door, pytest.raises(EngineDeadError, match="rank 1"):
        door.admit(2, gone)


def test_a_rank_that_does_not_answer_is_stopped() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pulse = Pulse(ours, 0.1)
        assert pulse.counters() == (0, 0)
        assert not pulse.stopped()
        until(pulse.stopped)


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_an_address_without_ray_is_refused() -> None:
    with pytest.raises(ConfigError, match="distributed_executor_backend='ray'"):
        LLM(platform="cpu", ray_address="local")
