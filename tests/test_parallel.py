"""Models on several ranks: the channel, what each rank keeps, equal outputs, and what happens when a rank does not."""

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.config import EngineArgs
from engine.errors import ConfigError, EngineDeadError, RequestError, UnsupportedModelError
from engine.extensions.parallel import tensor
from engine.extensions.parallel.channel import Memory, Reader, Writer
from engine.extensions.parallel.collectives import Group, bounds
from engine.extensions.parallel.share import RankShare
from engine.interfaces import Communicator, GroupSpec
from engine.model import adapt
from engine.model.adapt import AdaptedModel, load_model
from engine.plugins import load_platform
from engine_conformance.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
PROMPTS: list[Any] = [{"prompt_token_ids": [(i * k + 3) % 120 + 3 for i in range(4 + 9 * k)]} for k in range(1, 5)]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2)
OPTIONS: dict[str, Any] = {"platform": "cpu", "skip_tokenizer_init": True, "max_num_seqs": 8, "dtype": "float32"}
OPTIONS |= {"kv_cache_memory_bytes": 4 << 20, "disable_log_stats": True, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """In the ranks, which inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A folder with a tiny model."""

    @cache
    def save(name: str, **fields: Any) -> str:
        folder = tmp_path_factory.mktemp(name)
        tiny_model(name, **fields).save_pretrained(folder)
        return str(folder)

    return save


# The channel.


def channel(num_readers: int) -> tuple[Writer, list[Reader]]:
    fd = Memory.create()
    bells = [os.eventfd(0, os.EFD_SEMAPHORE) for _ in range(num_readers)]
    readers = [Reader(Memory(fd, num_readers), bell, rank) for rank, bell in enumerate(bells)]
    return Writer(Memory(fd, num_readers), bells), readers


def test_every_reader_gets_every_message_whatever_its_size() -> None:
    writer, readers = channel(3)
    sent = [os.urandom(size) for size in (1, 0, 5_000_000, 262_136, 262_137, 7)] * 8
    got: list[list[bytes]] = [[], [], []]

    def read(rank: int) -> None:
        for _ in sent:
            got[rank].append(readers[rank].receive())
            time.sleep(0.001 * rank)

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for data in sent:
        writer.send(data)
    for thread in threads:
        thread.join()
    assert got == [sent] * 3


def test_a_writer_does_not_wait_for_a_reader_that_is_gone() -> None:
    def gone() -> None:
        raise EngineDeadError("rank 1 is gone")

    writer, _ = channel(2)
    for _ in range(16):
        writer.send(b"x", gone)
    with pytest.raises(EngineDeadError, match="rank 1"):
        writer.send(b"x", gone)


# What each rank keeps: ranks are threads here.


class Threads:
    """What the communicators of one group of threads share."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.slots = size, threading.Barrier(size, timeout=60), [None] * size
        self.mail: dict[tuple[int, int], queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everything: list[Any] = list(self.slots)
        self.barrier.wait()
        return everything


class ThreadCommunicator(Communicator):
    """Collectives between threads."""

    def __init__(self, threads: Threads, rank: int, role: str = "tp") -> None:
        super().__init__(GroupSpec(role, tuple(range(threads.size)), rank))
        self._threads = threads

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._threads.exchange(self.rank, x.clone())).sum(0)

    def all_gather(self, x: Tensor, dim: int = 0, sizes: Sequence[int] | None = None) -> Tensor:
        every = self._threads.exchange(self.rank, x.clone())
        assert sizes is None or [part.shape[dim] for part in every] == list(sizes)
        return torch.cat(every, dim)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        every = self._threads.exchange(self.rank, x.clone().split(list(send)))
        assert [len(parts[self.rank]) for parts in every] == list(receive)
        return torch.cat([parts[self.rank] for parts in every])

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        result: Tensor = self._threads.exchange(self.rank, x.clone())[src]
        return result

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        raise NotImplementedError

    def send(self, x: Tensor, dst: int) -> None:
        self._threads.mail[self.rank, dst].put(x.clone())

    def receive(self, like: Tensor, src: int) -> Tensor:
        x = self._threads.mail[src, self.rank].get(timeout=60)
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
        return x

    def barrier(self) -> None:
        self._threads.barrier.wait()

    def close(self) -> None:
        pass


def split(
    folder: str, size: int, stages: int = 1, *, experts: bool = False, **options: Any
) -> tuple[Tensor, list[Tensor], list[int]]:
    """The logits of the whole model and of each rank, which count in the last stage, and the bytes of weights of each.

    `size` ranks split each layer, in each of the `stages`.
    """
    args = EngineArgs.of(model=folder, platform="cpu", block_size=16, max_num_seqs=4, **options)
    platform, world = load_platform("cpu"), Threads(size * stages)
    rows, columns = [Threads(size) for _ in range(stages)], [Threads(stages) for _ in range(size)]
    whole = load_model(args, platform)
    tokens = torch.arange(13) * 7 % whole.vocab_size
    logits: list[Any] = [None] * world.size
    nbytes, errors = [0] * world.size, []

    @torch.inference_mode()
    def forward(model: AdaptedModel) -> Tensor:
        return model.forward(tokens, torch.arange(13), torch.arange(13))

    def run(rank: int) -> None:
        try:
            stage, at = divmod(rank, size)
            everyone, tensor = Group(ThreadCommunicator(world, rank)), Group(ThreadCommunicator(rows[stage], at))
            line = Group(ThreadCommunicator(columns[at], stage)) if stages > 1 else None

            def wait() -> None:
                world.barrier.wait()

            device = platform.device()
            share = RankShare(everyone, device, tensor=tensor, stages=line, experts=experts, wait=wait)
            model = load_model(args, platform, share)
            logits[rank] = forward(model)
            nbytes[rank] = sum(p.nbytes for p in model.model.parameters())
        except Exception as error:
            for threads in (world, *rows, *columns):
                threads.barrier.abort()
            errors.append(error)

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(world.size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    causes = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return forward(whole), logits, [*nbytes, sum(p.nbytes for p in whole.model.parameters())]


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers builds models by exchanging functions of torch's, for all threads."""
    lock, build = threading.Lock(), adapt.build

    def locked(*args: Any, **options: Any) -> Any:
        with lock:
            return build(*args, **options)

    monkeypatch.setattr(adapt, "build", locked)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[(name, 2) for name in ("qwen3", "gemma3_text", "llama4_text", "olmo2", "gpt_neox", "opt", "deepseek_v3")],
        *[(name, 4) for name in ("llama", "qwen3_moe", "phi3", "mixtral")],
    ],
)
def test_ranks_agree_with_the_whole(name: str, size: int, saved: Callable[..., str]) -> None:
    want, got, nbytes = split(saved(name), size)
    for logits in got:
        assert torch.equal(logits, got[0]), "ranks differ"
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert max(nbytes[:-1]) < (0.62 if size == 2 else 0.45) * nbytes[-1], "ranks have nearly all weights"


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("size", [2, 3])
def test_experts_are_dealt_out(name: str, size: int, saved: Callable[..., str]) -> None:
    folder = saved(name, num_attention_heads=6, num_key_value_heads=3) if size == 3 and name != "deepseek_v3" else ""
    want, got, nbytes = split(folder or saved(name), size, experts=True)
    for logits in got:
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert max(nbytes[:-1]) < 0.75 * nbytes[-1]


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"vocab_size": 131}, 2),  # a vocabulary that needs padding
        ({"vocab_size": 131, "tie_word_embeddings": True}, 4),
        ({"intermediate_size": 97}, 4),  # columns that do not divide
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}, 8),  # fewer heads of keys than ranks
        ({"num_attention_heads": 8, "num_key_value_heads": 1}, 4),
        ({"attention_bias": True, "mlp_bias": True}, 2),  # a bias of a sum is added once
        ({"pad_token_id": 130, "vocab_size": 131}, 2),
    ],
)
def test_sizes_that_do_not_divide(fields: dict[str, Any], size: int, saved: Callable[..., str]) -> None:
    want, got, _ = split(saved("llama", **fields), size)
    for logits in got:
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("name", "size", "options", "error", "says"),
    [
        ("llama", 3, {}, ConfigError, r"does not divide the 4 heads of model\.layers\.\*\.self_attn.*1, 2, 4"),
        ("gpt2", 2, {}, UnsupportedModelError, "no plan for tensor parallel, and none of our rules.*one rank"),
        ("bloom", 2, {}, UnsupportedModelError, "does not run split over 2 ranks.*with data_parallel_size"),
        ("moshi", 2, {}, UnsupportedModelError, "with data_parallel_size"),  # two halves in one layer, by a known name
        ("gemma3n_text", 2, {}, UnsupportedModelError, "its activation looks at all columns at once"),
        ("llama", 2, {"experts": True}, ConfigError, "has no experts"),
    ],
)
def test_what_cannot_be_split(
    name: str, size: int, options: dict[str, Any], error: type[Exception], says: str, saved: Callable[..., str]
) -> None:
    with pytest.raises(error, match=says):
        split(saved(name), size, **options)


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(
    ("name", "size", "stages"),
    [
        *[(name, 1, 2) for name in ("llama", "qwen3_moe", "gemma3_text", "gpt_neox", "phi3", "gpt2", "opt")],
        ("llama", 1, 4),
        ("llama", 2, 2),
        ("qwen3_moe", 2, 2),
    ],
)
def test_stages_agree_with_the_whole(name: str, size: int, stages: int, saved: Callable[..., str]) -> None:
    want, got, nbytes = split(saved(name), size, stages)
    for logits in got[-size:]:
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert all(logits.shape == want.shape for logits in got), "stages sample alike"
    assert max(nbytes[:-1]) < 0.75 * nbytes[-1], "a stage has nearly all weights"


@pytest.mark.usefixtures("one_at_a_time")
def test_a_stage_keeps_weights_that_it_shares_with_another(saved: Callable[..., str]) -> None:
    want, got, _ = split(saved("llama", tie_word_embeddings=True), 1, 3)
    torch.testing.assert_close(got[-1], want, rtol=0, atol=2e-5 * float(want.abs().max()))


def test_bounds_cover_everything_once() -> None:
    for count in range(20):
        parts = [bounds(count, 6, rank) for rank in range(6)]
        assert [i for begin, end in parts for i in range(begin, end)] == list(range(count))
        assert max(e - b for b, e in parts) - min(e - b for b, e in parts) <= 1


def test_names_as_plans_have_them() -> None:
    assert tensor._generic("model.layers.10.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert tensor._generic("model.layer1.fc2") == "model.layer1.fc2"


# Processes.


def generate(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]


def processes(llm: LLM) -> list[int]:
    runner: Any = llm._core.runner
    return [process.pid for process in runner._ranks._processes]


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < end, f"processes {alive} are left"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enable_expert_parallel": True}, "set tensor_parallel_size"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"distributed_executor_backend": "pm"}, "no distributed_executor_backend 'pm'; there are: mp"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], says: str, saved: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM(saved("llama"), **options, **OPTIONS)


def test_two_ranks_say_what_one_says_and_one_that_is_killed_is_named(saved: Callable[..., str]) -> None:
    alone = LLM(saved("llama"), **OPTIONS)
    both = LLM(saved("llama"), tensor_parallel_size=2, **OPTIONS)
    assert both.info.weight_bytes < 1.2 * alone.info.weight_bytes
    assert both.info.num_blocks == 2 * alone.info.num_blocks, "each rank has the keys of half the heads"
    assert generate(both) == generate(alone)
    drawn = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True, repetition_penalty=1.3)
    assert generate(both, drawn) == generate(alone, drawn)
    with pytest.raises(RequestError, match="cannot reach the processes"):
        generate(both, SamplingParams(logits_processors=[lambda ids, logits: logits]))
    pids = processes(both)
    begin = time.monotonic()
    threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL)).start()
    long = [GREEDY, *[SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)] * 200]
    with pytest.raises(EngineDeadError, match=rf"rank 1 of 2 \(process {pids[1]}\) was killed by signal 9"):
        both.generate([PROMPTS[0]] * len(long), long)
    assert time.monotonic() - begin < 10
    wait_until_gone(pids)
    with pytest.raises(EngineDeadError):
        generate(both)


def test_four_ranks_with_experts_and_keys_on_several(saved: Callable[..., str]) -> None:
    want = generate(LLM(saved("qwen3_moe"), **OPTIONS))
    four = LLM(saved("qwen3_moe"), tensor_parallel_size=4, enable_expert_parallel=True, **OPTIONS)
    assert generate(four) == want
    pids = processes(four)
    del four
    wait_until_gone(pids)


def test_replicas_share_the_work(saved: Callable[..., str]) -> None:
    want = generate(LLM(saved("qwen3"), **OPTIONS))
    two = LLM(saved("qwen3"), data_parallel_size=2, **OPTIONS)
    core: Any = two._core
    seen: list[tuple[int, ...]] = []
    step = core.step

    def watched() -> Any:
        seen.append(tuple(c.scheduler.num_running for c in core._cores))
        return step()

    core.step = watched
    assert generate(two) == want
    assert (2, 2) in seen, "four requests, two for each"
    assert not core.has_work()
    assert (core.num_running, core.num_waiting, core.usage()) == (0, 0, 0.0)
    assert core._owner == {}


def test_stages_say_what_one_rank_says_and_one_that_hangs_is_named(saved: Callable[..., str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    alone, two = (
        LLM(saved("llama"), distributed_timeout_seconds=3.0, pipeline_parallel_size=stages, **OPTIONS)
        for stages in (1, 2)
    )
    for one, other in zip(alone.generate(PROMPTS, params), two.generate(PROMPTS, params), strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        for want, got in zip(entries(one), entries(other), strict=True):
            assert got == pytest.approx(want, abs=1e-4)
    assert two.info.weight_bytes == alone.info.weight_bytes
    pids = processes(two)
    os.kill(pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(EngineDeadError, match=rf"no progress for 3 s, and rank 1 \(process {pids[1]}\) is behind"):
        generate(two)
    assert time.monotonic() - begin < 12
    wait_until_gone(pids)


def entries(output: Any) -> list[dict[int, float]]:
    found = [*output.outputs[0].logprobs, *filter(None, output.prompt_logprobs)]
    return [{token: entry.logprob for token, entry in logprobs.items()} for logprobs in found]


def test_a_simulated_accelerator(saved: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has collectives of its own, and this process never loads it: its ranks do."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("its code is compiled on first use, and there is no compiler")
    distribution(tmp_path, "engine-plugin-npu", "engine.platforms", "npu = engine_npu:NpuPlatform")
    paths = [tmp_path, ROOT / "examples/engine-plugin-npu", *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    want = generate(LLM(saved("qwen3_moe"), **OPTIONS))
    llm = LLM(saved("qwen3_moe"), tensor_parallel_size=2, **{**OPTIONS, "platform": "npu"})
    assert llm.info.platform == "npu"
    assert generate(llm) == want


def distribution(folder: Path, name: str, group: str, entry: str) -> None:
    """An installed distribution with one entry point."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


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
    return {"LlamaForCausalLM": adapt}
"""


def test_an_exception_of_a_rank_comes_with_its_traceback(
    saved: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "boom", "engine.plugins", "boom = boom")
    (tmp_path / "boom.py").write_text(BOOM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    llm = LLM(saved("llama"), tensor_parallel_size=2, **OPTIONS)
    with pytest.raises(EngineDeadError, match="rank 1 of 2: ArithmeticError: boom") as caught:
        llm.generate([{"prompt_token_ids": list(range(3, 27))}], GREEDY)
    (note,) = caught.value.__notes__
    assert 'raise ArithmeticError("boom")' in note
    assert note.count("Traceback") == 1
    wait_until_gone(processes(llm))


def test_ranks_end_with_their_driver(saved: Callable[..., str]) -> None:
    code = f"""
import os, signal
from engine import LLM
llm = LLM({saved("llama")!r}, tensor_parallel_size=2, **{OPTIONS!r})
print(*[process.pid for process in llm._core.runner._ranks._processes], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pids = [int(word) for word in ended.stdout.split()]
    assert len(pids) == 2, ended.stderr
    wait_until_gone(pids)


def test_what_a_rank_refuses_comes_as_it_is(saved: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="max_model_len 5000 is beyond the model's limit"):
        LLM(saved("llama"), distributed_executor_backend="mp", max_model_len=5000, **OPTIONS)
