"""Models on several ranks: the channel, what each rank keeps, equal outputs, and what happens when a rank does not."""

import itertools
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine import LLM, SamplingParams
from engine.batch import Rows
from engine.config import EngineArgs
from engine.errors import ConfigError, EngineDeadError, RequestError, UnsupportedModelError
from engine.extensions.parallel import driver, messages, pipeline, replicas, tensor
from engine.extensions.parallel import rank as rank_module
from engine.extensions.parallel.channel import Memory, Reader, Writer
from engine.extensions.parallel.collectives import Group, bounds
from engine.extensions.parallel.context import ContextPlatform
from engine.extensions.parallel.driver import Ranks
from engine.extensions.parallel.processes import Processes
from engine.extensions.parallel.share import RankShare
from engine.interfaces import AttentionBackend, AttentionBatch, AttentionSpec, Capabilities, Communicator, GroupSpec
from engine.model import adapt
from engine.model.adapt import AdaptedModel, load_model
from engine.plugins import load_platform
from engine.request import CoreRequest
from engine.step import StepResult, Work
from engine_conformance.tiny_models import tiny_model
from engine_sdk import TorchPlatform

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
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_round_their_part_of_a_weight(tied: bool, saved: Callable[..., str]) -> None:
    """Groups lie within the parts, and the head has a scale for each row: ranks round as the whole does."""
    folder = saved("qwen2", intermediate_size=128, tie_word_embeddings=tied)
    want, got, nbytes = split(folder, 2, quantization="int4")
    for logits in got:
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert max(nbytes[:-1]) < 0.62 * nbytes[-1]


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(("size", "stages", "fits"), [(2, 1, True), (1, 2, True), (4, 1, False)])
def test_ranks_read_their_part_of_stored_integers(
    size: int, stages: int, fits: bool, saved: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(saved("llama", intermediate_size=128), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        grouped = tensors[name].unflatten(1, (-1, 32))
        scales = grouped.abs().amax(-1) / 127
        tensors[f"{name}_scale"] = scales
        tensors[name] = (grouped / scales[..., None]).round().flatten(1).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not fits:
        with pytest.raises(
            ConfigError, match=r"o_proj.weight_scale cannot be split at .*, since 32 of them are stored"
        ):
            split(str(tmp_path), size)
        return
    want, got, nbytes = split(str(tmp_path), size, stages)
    for logits in got[-size:]:
        torch.testing.assert_close(logits, want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert max(nbytes[:-1]) < 0.75 * nbytes[-1]


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
    assert all(logits.shape == (len(want), 1) for logits in got[:-size]), "no stage but the last has logits"
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


# Whole engines, with threads for ranks: the driver, its messages and the ranks' loop are the real ones.


class ThreadLine:
    """What connects a rank with its driver: a queue and a socket."""

    def __init__(self, rank: int, size: int, sock: socket.socket) -> None:
        self.rank, self.size, self._sock = rank, size, sock
        self.inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.read = self.count = 0

    def receive(self) -> bytes:
        if (data := self.inbox.get()) is None:
            raise SystemExit
        self.read += 1
        return data

    def send(self, message: messages.FromRank) -> None:
        messages.send(self._sock, message)

    def entered(self) -> None:
        self.count += 1


class ThreadRanks(Ranks):
    """See `Ranks`."""

    def __init__(self, args: EngineArgs) -> None:
        pairs = [socket.socketpair() for _ in range(args.world_size)]
        super().__init__(args, [ours for ours, _ in pairs], "127.0.0.1")
        self.lines = [ThreadLine(rank, len(pairs), theirs) for rank, (_, theirs) in enumerate(pairs)]
        self._threads = [
            threading.Thread(target=self._live, args=(line,), daemon=True, name=f"ranks of {id(self)}")
            for line in self.lines
        ]
        self._finalizer = weakref.finalize(self, end, self.lines, self._threads, [s for pair in pairs for s in pair])
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _live(line: ThreadLine) -> None:
        try:
            with suppress(SystemExit):
                rank_module._run(line, lambda args: 0)
        except Exception as error:
            for threads in WORLDS.values():
                threads.barrier.abort()
            with suppress(OSError):
                line.send(messages.Failed(type(error).__name__, str(error), traceback.format_exc()))

    def _write(self, data: bytes) -> None:
        for line in self.lines:
            line.inbox.put(data)

    def _progress(self) -> tuple[list[int], list[int]]:
        return [line.read for line in self.lines], [line.count for line in self.lines]

    def _stopped(self) -> list[int]:
        return []

    def _where(self, rank: int) -> str:
        return f"thread {rank}"

    def _how(self, rank: int) -> str:
        return "ended"

    def _kill(self) -> None:
        self._finalizer()


def end(lines: list[ThreadLine], threads: list[threading.Thread], sockets: list[socket.socket]) -> None:
    for line in lines:
        line.inbox.put(None)
    for thread in threads:
        thread.join(timeout=5)
    for sock in sockets:
        sock.close()


WORLDS: dict[tuple[str, str, tuple[int, ...]], Threads] = {}
"""By the executor whose threads they are, and the group."""


@pytest.fixture
def ranks_are_threads(one_at_a_time: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()
    WORLDS.clear()

    def communicator(platform: object, group: GroupSpec) -> ThreadCommunicator:
        with lock:
            threads = WORLDS.setdefault(
                (threading.current_thread().name, group.role, group.ranks), Threads(len(group.ranks))
            )
        return ThreadCommunicator(threads, group.ranks.index(group.rank), group.role)

    monkeypatch.setattr("torch.distributed.init_process_group", lambda **options: None)
    monkeypatch.setattr(TorchPlatform, "communicator", communicator)
    monkeypatch.setattr("engine.extensions.parallel.processes.Processes", ThreadRanks)


def crowd() -> list[CoreRequest]:
    """Prompts that begin alike, of every kind of sampling, some of which needs the tokens before."""
    shared = [i * 7 % 110 + 3 for i in range(44)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 1, "prompt_logprobs": 1},
        {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6},
    ]
    return [
        CoreRequest(
            str(i),
            [*shared[: 3 + 6 * i], i + 3, 2 * i + 9],
            SamplingParams(max_tokens=17 + i, ignore_eos=True, **kinds[i % 4]),
            bad_token_ids=[[5, 6]] if i % 3 == 0 else [],
        )
        for i in range(8)
    ]


def play(llm: LLM) -> tuple[dict[str, list[int]], int]:
    """Tokens of a crowd, one of which is aborted in mid-flight and comes again; and the most steps under way."""
    core, deepest = llm._core, 0
    found: dict[str, list[int]] = defaultdict(list)
    asked = crowd()
    for request in asked:
        core.add(request)
    for count in itertools.count():
        if count == 7:
            core.abort(["3"])
        if count == 9:
            found.pop("3", None)
            core.add(asked[3])
        if not core.has_work():
            break
        for output in core.step():
            found[output.request_id] += output.token_ids
        deepest = max(deepest, 1 + len(core._in_flight))
        pairs = [pair for step, seqs in core.scheduler._in_flight for pair in zip(step.work, seqs, strict=True)]
        drawing = [seq for work, seq in pairs if work.sample]
        assert len(drawing) == len(set(drawing)), "a step waits for a token of one under way"
    assert core.kv.usage() == 0
    return dict(found), deepest


TIGHT: dict[str, Any] = {**OPTIONS, "block_size": 8, "num_blocks": 13, "max_model_len": 80, "max_num_seqs": 5}
TIGHT |= {"max_num_batched_tokens": 24}
ONE_KEY = {"num_key_value_heads": 1}


@pytest.mark.usefixtures("ranks_are_threads")
@pytest.mark.parametrize(
    ("name", "fields", "forms"),
    [
        ("llama", {}, {"pipeline": 2}),
        ("llama", {}, {"pipeline": 4}),
        ("qwen3_moe", {"use_sliding_window": False}, {"pipeline": 2, "tensor": 2, "experts": True}),
        ("llama", {}, {"tensor": 4, "decode_context": 2}),
        ("llama", ONE_KEY, {"tensor": 4, "decode_context": 4}),
        ("llama", ONE_KEY, {"tensor": 2, "decode_context": 2, "pipeline": 2}),
        ("qwen3_moe", {**ONE_KEY, "use_sliding_window": False}, {"tensor": 2, "decode_context": 2, "experts": True}),
    ],
)
def test_forms_and_their_combinations(
    name: str, fields: dict[str, Any], forms: dict[str, Any], saved: Callable[..., str]
) -> None:
    folder = saved(name, **fields)
    want, _ = play(LLM(folder, **TIGHT))
    options: dict[str, Any] = {f"{form}_parallel_size": size for form, size in forms.items() if form != "experts"}
    llm = LLM(folder, enable_expert_parallel="experts" in forms, **options, **TIGHT)
    got, deepest = play(llm)
    assert got == want
    assert llm._core.scheduler.num_preemptions > 0
    assert llm._core.kv.num_hit > 0
    assert deepest == forms.get("pipeline", 1)


@pytest.mark.usefixtures("ranks_are_threads")
def test_sinks_go_with_their_heads(saved: Callable[..., str]) -> None:
    alone, two = (LLM(saved("gpt_oss"), tensor_parallel_size=size, **OPTIONS) for size in (1, 2))
    assert generate(two) == generate(alone)


@pytest.mark.usefixtures("ranks_are_threads")
@pytest.mark.parametrize(
    "forms",
    [
        {"tensor": 2, "experts": True},
        {"pipeline": 2},
        {"tensor": 2, "decode_context": 2},
    ],
)
def test_replicas_of_every_form(forms: dict[str, Any], saved: Callable[..., str]) -> None:
    folder = saved("qwen3_moe", **ONE_KEY, use_sliding_window=False)
    options: dict[str, Any] = {f"{form}_parallel_size": size for form, size in forms.items() if form != "experts"}
    llm = LLM(folder, data_parallel_size=2, enable_expert_parallel="experts" in forms, **options, **OPTIONS)
    assert generate(llm) == generate(LLM(folder, **OPTIONS))


def test_stages_keep_to_a_form(ranks_are_threads: None) -> None:
    """Which the last one does alone, and its next step needs all tokens before."""
    options = {name: value for name, value in OPTIONS.items() if name != "skip_tokenizer_init"}
    params = SamplingParams(temperature=0, max_tokens=16, structured_outputs={"regex": "[ab]{9}c"})
    alone, staged = (
        [
            output.outputs[0].text
            for output in LLM(pipeline_parallel_size=size, **options).generate(["x", "y z"], params)
        ]
        for size in (1, 2)
    )
    assert alone == staged
    assert all(re.fullmatch("[ab]{9}c", text) for text in staged)


def test_pooling_on_ranks(ranks_are_threads: None, saved: Callable[..., str]) -> None:
    options: dict[str, Any] = {**OPTIONS, "runner": "pooling"}
    folder, both = saved("llama", **ONE_KEY), {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    alone, split = (LLM(folder, **sizes, **options).embed(PROMPTS) for sizes in ({}, both))
    for one, other in zip(alone, split, strict=True):
        assert other.outputs.embedding == pytest.approx(one.outputs.embedding, abs=1e-5)
    with pytest.raises(UnsupportedModelError, match=r"no plan for stages.*use tensor_parallel_size"):
        LLM(folder, pipeline_parallel_size=2, **options)


def test_a_token_that_comes_late_is_not_the_next_owners() -> None:
    rows, gone, stays = Rows(2, 16, []), object(), object()
    runner: Any = SimpleNamespace(builder=SimpleNamespace(rows=rows), requests={0: object(), 1: stays})
    work = [Work(row, 3, 1, [], True) for row in (0, 1)]
    batch = SimpleNamespace(work=work, order=[1, 0], sampled=[0, 1])
    rows.sampled_at[:] = 4
    pipeline.learn(runner, cast(Any, SimpleNamespace(batch=batch, requests=[gone, stays])), [8, 9])
    assert rows.token_ids[:, 4].tolist() == [0, 8]
    assert rows.sampled_at.tolist() == [4, -1]


def test_all_stages_work_at_once(
    ranks_are_threads: None, saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer takes 20 ms here. One stage after the other, each would be busy for a quarter of the time."""
    spans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    forward: Any = LlamaDecoderLayer.forward

    def slow(self: Any, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        begin = time.monotonic()
        if not hidden_states.is_meta:
            time.sleep(0.02)
        output = forward(self, hidden_states, *args, **options)
        spans[threading.get_ident()].append((begin, time.monotonic()))
        return output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", slow)
    llm = LLM(saved("llama"), pipeline_parallel_size=4, **{**OPTIONS, "platform": "torch:cpu"})
    spans.clear()
    llm.generate([PROMPTS[0]] * 8, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    begin, end = min(s[0][0] for s in spans.values()), max(s[-1][1] for s in spans.values())
    busy = [sum(b - a for a, b in stage) / (end - begin) for stage in spans.values()]
    assert len(busy) == 4
    assert min(busy) > 0.35, "bubbles"


@pytest.mark.parametrize(
    ("width", "read", "entered", "named"),
    [
        (1, [9, 7, 7], [9, 8, 7], "rank 1 (thread 1)"),  # rank 2 waits for it, rank 0 runs on
        (1, [8, 9, 9], [4, 4, 4], "rank 0 (thread 0)"),
        (2, [9, 9, 9, 9], [40, 39, 22, 22], "rank 1 (thread 1)"),  # stages enter other numbers of collectives
        (2, [9, 9, 8, 8], [40, 40, 22, 22], "rank 2 (thread 2), rank 3 (thread 3)"),
        (2, [9, 9], [40, 40], "no rank more than others"),
    ],
)
def test_who_is_behind(width: int, read: list[int], entered: list[int], named: str) -> None:
    ranks = ThreadRanks.__new__(ThreadRanks)
    vars(ranks).update(_size=len(read), _width=width, _idle=1.0, _finalizer=lambda: None, _dead=None)
    assert f"for 1 s, and {named} is behind" in str(ranks._hung(read, entered))


def test_who_is_stopped_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """But a driver that was stopped itself, with its ranks, gives them time to go on."""
    monkeypatch.setattr(ThreadRanks, "_stopped", lambda self: [1])
    monkeypatch.setattr(ThreadRanks, "_progress", lambda self: ([5, 5], [7, 7]))
    now, ranks = 1000.0, ThreadRanks.__new__(ThreadRanks)
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: now))
    vars(ranks).update(_size=2, _width=2, _timeout=300.0, _finalizer=lambda: None, _dead=None)
    vars(ranks).update(_looked=now, _idle=0.0, _seen=([5, 5], [7, 7]))
    for passed in (3600, *[0.5] * 28):
        now += passed
        ranks._look_for_progress()
    now += 0.5
    with pytest.raises(EngineDeadError, match=r"for 16 s, and rank 1 \(thread 1\) is stopped.*Start a new engine"):
        ranks._look_for_progress()


class Deaf(ThreadRanks):
    """Ranks that read nothing, so that whoever writes to them waits."""

    def __init__(self, args: EngineArgs) -> None:
        pairs = [socket.socketpair() for _ in range(args.world_size)]
        Ranks.__init__(self, args, [ours for ours, _ in pairs], "127.0.0.1")
        self.theirs = [theirs for _, theirs in pairs]
        self._finalizer = weakref.finalize(self, end, [], [], [s for pair in pairs for s in pair])

    def _write(self, data: bytes) -> None:
        while True:
            self._look()

    def _progress(self) -> tuple[list[int], list[int]]:
        return [0, 0], [0, 0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], r"rank 1 of 2 \(thread 1\) ended"),
        ([messages.Failed("ArithmeticError", "ArithmeticError: boom", "")], r"rank 1 of 2 .*: ArithmeticError: boom"),
    ],
    ids=["its end", "its exception"],
)
def test_what_a_rank_says_behind_a_result_is_heard_while_writing(words: list[messages.Failed], says: str) -> None:
    ranks = Deaf(EngineArgs(pipeline_parallel_size=2, distributed_timeout_seconds=3.0))
    said: list[messages.FromRank] = [messages.Result(StepResult([1], [None], [None])), *words]
    for word in said:
        messages.send(ranks.theirs[1], word)
    if not words:
        ranks.theirs[1].close()
    with pytest.raises(EngineDeadError, match=says):
        ranks.send(messages.Go())
    with pytest.raises(EngineDeadError, match=says):  # and does not wait for what was asked for
        ranks.answer(messages.Result)


# Decode context parallel.


def attention_batch(spans: Sequence[tuple[int, int]], block_size: int, padding: int = 0) -> AttentionBatch:
    """Requests that compute tokens ``[start, end)`` each, decodes first; request i owns blocks from ``1 + 4 i`` on."""
    ends = [end for _, end in spans]
    counts = [end - start for start, end in spans]
    table = 1 + torch.arange(4 * len(spans), dtype=torch.int32).view(-1, 4)
    slots = [
        int(table[i, p // block_size]) * block_size + p % block_size
        for i, (start, end) in enumerate(spans)
        for p in range(start, end)
    ]
    query_start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    lengths = torch.tensor(ends, dtype=torch.int32)
    return AttentionBatch(
        query_start=query_start,
        seq_lens=lengths,
        block_table=table,
        slots=torch.tensor([*slots, *[0] * padding]),
        query_start_host=query_start,
        seq_lens_host=lengths,
        num_decodes=sum(count == 1 for count in counts),
        max_query_len=max(counts),
        max_seq_len=max(ends),
        block_size=block_size,
    )


def bound(backend: AttentionBackend, block_size: int) -> Any:
    layout = backend.layout(block_size)
    storage = torch.full((64 * (-(-layout.block_bytes // 256) * 256),), 0x7F, dtype=torch.uint8)
    return layout.bind(storage, 64)


class Careless:
    """A backend that leaves garbage where a request has no keys, as it may."""

    def __init__(self, inner: AttentionBackend) -> None:
        self._inner, self.layout = inner, inner.layout

    def plan(self, batch: AttentionBatch) -> Any:
        return batch.seq_lens == 0, self._inner.plan(batch)

    def forward(self, q: Any, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, *, lse: Tensor) -> None:
        self._inner.forward(q, k, v, cache, plan[1], out, lse=lse)
        out[plan[0]], lse[plan[0]] = torch.nan, torch.nan


@pytest.mark.parametrize("platform", ["cpu", "torch:cpu"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_merge_what_each_finds_in_its_part_of_the_tokens(platform: str, size: int) -> None:
    """Prompts whole and in chunks, decodes, requests of which a rank has nothing, and padding."""
    chosen, heads, dim, block_size = load_platform(platform), 2, 16, 4 * size
    spec = AttentionSpec(heads, 1, dim, dim, 0.25, torch.float32, torch.float32)
    whole = chosen.attention(replace(spec, num_heads=size * heads))
    world, cache = Threads(size), bound(whole, block_size)
    ranks = [
        ContextPlatform(chosen, Group(ThreadCommunicator(world, rank, "cp"))).attention(spec) for rank in range(size)
    ]
    for backend in ranks:
        vars(backend)["_inner"] = Careless(vars(backend)["_inner"])
    caches = [bound(backend, block_size) for backend in ranks]
    torch.manual_seed(size)
    steps = [([(0, 1), (0, 2), (0, 13)], 0), ([(1, 2), (2, 3), (13, 31), (0, 5)], 3), ([(2, 3), (3, 4), (31, 32)], 0)]
    for spans, padding in steps:
        batch = attention_batch(spans, block_size, padding)
        q = torch.randn(batch.num_tokens, size * heads, dim) * 3
        k, v = torch.randn(2, batch.num_tokens, 1, dim)
        want, got = torch.zeros_like(q), torch.zeros_like(q)
        whole.forward(q, k, v, cache, whole.plan(batch), want)

        def run(rank: int, batch: Any = batch, q: Tensor = q, k: Tensor = k, v: Tensor = v, got: Tensor = got) -> None:
            mine, backend = slice(rank * heads, (rank + 1) * heads), ranks[rank]
            out = torch.empty_like(q[:, mine])
            backend.forward(q[:, mine], k, v, caches[rank], backend.plan(batch), out)
            got[:, mine] = out

        with ThreadPoolExecutor(size) as pool:
            list(pool.map(run, range(size)))
        tokens = int(batch.query_start[-1])
        torch.testing.assert_close(got[:tokens], want[:tokens], rtol=0, atol=2e-5)


def test_a_captured_step_is_brought_up_to_date_in_place() -> None:
    backend = ContextPlatform(load_platform("cpu"), Group(ThreadCommunicator(Threads(2), 1, "cp"))).attention(
        AttentionSpec(2, 1, 16, 16, 0.25, torch.float32, torch.float32)
    )
    plan = backend.plan(attention_batch([(4, 5), (8, 9), (3, 4)], 8))
    before = plan.batch.seq_lens, plan.batch.slots
    now = attention_batch([(6, 7), (21, 22), (4, 5)], 8)
    backend.refresh(plan, now)
    assert (plan.batch.seq_lens, plan.batch.slots) == before, "the same tensors"
    assert plan.batch.seq_lens.tolist() == plan.batch.seq_lens_host.tolist() == [3, 11, 2]
    assert plan.batch.slots.tolist() == [0, 30, 0], "token 21 lies here, as the second one's 11th"


def test_as_many_blocks_hold_the_tokens_of_several_ranks(ranks_are_threads: None, saved: Callable[..., str]) -> None:
    folder = saved("llama", **ONE_KEY)
    infos = [LLM(folder, tensor_parallel_size=4, decode_context_parallel_size=size, **OPTIONS).info for size in (1, 4)]
    one, four = (info.num_blocks * info.block_size for info in infos)
    assert four == 4 * one
    assert infos[0].kv_bytes == infos[1].kv_bytes


@pytest.mark.parametrize(
    ("name", "fields", "forms", "error", "says"),
    [
        ("llama", {}, {"decode_context": 2}, ConfigError, "must divide tensor_parallel_size, which is 1"),
        ("llama", {}, {"tensor": 4, "decode_context": 3}, ConfigError, "must divide tensor_parallel_size, which is 4"),
        ("llama", {}, {"tensor": 2, "decode_context": 2}, ConfigError, r"the 2 heads of keys and values times 2"),
        ("gpt_oss", {"num_key_value_heads": 1}, {"tensor": 2, "decode_context": 2}, UnsupportedModelError, "sliding"),
        ("deepseek_v3", {}, {"tensor": 2, "decode_context": 2}, ConfigError, "the 4 heads of keys and values times 2"),
        ("llama", {}, {"pipeline": 5}, ConfigError, "pipeline_parallel_size 5 is more than the model's 4 layers"),
    ],
)
def test_combinations_that_are_refused(
    ranks_are_threads: None,
    name: str,
    fields: dict[str, Any],
    forms: dict[str, int],
    error: type[Exception],
    says: str,
    saved: Callable[..., str],
) -> None:
    with pytest.raises(error, match=says):
        LLM(saved(name, **fields), **{f"{form}_parallel_size": size for form, size in forms.items()}, **OPTIONS)


def test_attention_that_gives_no_log_sum_exp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = load_platform("cpu")
    monkeypatch.setattr(platform, "capabilities", lambda: Capabilities(attention=frozenset({"softcap"})))
    with pytest.raises(ConfigError, match="cpu does not declare the attention feature lse"):
        ContextPlatform(platform, Group(ThreadCommunicator(Threads(2), 0, "cp")))


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
        ({"distributed_executor_backend": "pm"}, "no distributed_executor_backend 'pm'; there are: mp, ray"),
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
    assert time.monotonic() - begin < 60
    wait_until_gone(pids)
    with pytest.raises(EngineDeadError):
        generate(both)


def test_a_rank_that_is_killed_while_others_are_written_to_is_named() -> None:
    ranks = Processes(EngineArgs(tensor_parallel_size=2))
    pids = [process.pid for process in ranks._processes]
    os.kill(pids[1], signal.SIGSTOP)  # which reads nothing then
    threading.Timer(0.2, os.kill, (pids[0], signal.SIGKILL)).start()
    with pytest.raises(EngineDeadError, match=rf"rank 0 of 2 \(process {pids[0]}\) was killed by signal 9"):
        ranks._write(bytes(5 << 20))
    wait_until_gone(pids)


def test_four_ranks_with_experts_and_keys_on_several_end_with_their_driver(saved: Callable[..., str]) -> None:
    code = f"""
import json, os, signal
from engine import LLM, SamplingParams
llm = LLM({saved("qwen3_moe")!r}, tensor_parallel_size=4, enable_expert_parallel=True, **{OPTIONS!r})
outputs = llm.generate({PROMPTS!r}, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
pids = [process.pid for process in llm._core.runner._ranks._processes]
print(json.dumps([pids, [list(output.outputs[0].token_ids) for output in outputs]]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout, ended.stderr
    pids, said = json.loads(ended.stdout)
    assert len(pids) == 4
    wait_until_gone(pids)
    assert said == generate(LLM(saved("qwen3_moe"), **OPTIONS))


@pytest.mark.usefixtures("ranks_are_threads")
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


def test_a_replica_that_hangs_is_seen_while_another_answers() -> None:
    def hung() -> None:
        raise EngineDeadError("rank 0 is behind")

    (answers, theirs), (silent, other) = socket.socketpair(), socket.socketpair()
    with answers, theirs, silent, other:
        cores: list[Any] = [
            SimpleNamespace(runner=SimpleNamespace(fileno=sock.fileno, watch=hung)) for sock in (answers, silent)
        ]
        theirs.send(b"x")
        assert replicas._answering(cores[:1]) == cores[:1]
        with pytest.raises(EngineDeadError, match="is behind"):
            replicas._answering(cores)


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
    with pytest.raises(EngineDeadError, match=rf"no progress for [34] s, and rank 1 \(process {pids[1]}\) is stopped"):
        generate(two)
    assert time.monotonic() - begin < 12
    wait_until_gone(pids)


def entries(output: Any) -> list[dict[int, float]]:
    found = [*output.outputs[0].logprobs, *filter(None, output.prompt_logprobs)]
    return [{token: entry.logprob for token, entry in logprobs.items()} for logprobs in found]


def test_a_simulated_accelerator(saved: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has collectives of its own, and this process never loads it: its ranks do. Every form but replicas."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("its code is compiled on first use, and there is no compiler")
    distribution(tmp_path, "engine-plugin-npu", "engine.platforms", "npu = engine_npu:NpuPlatform")
    paths = [tmp_path, ROOT / "examples/engine-plugin-npu", *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("NPU_SIM_DEVICES", "4")
    folder = saved("qwen3_moe", **ONE_KEY, use_sliding_window=False)
    want = generate(LLM(folder, **OPTIONS))
    sizes = dict.fromkeys((f"{form}_parallel_size" for form in ("tensor", "pipeline", "decode_context")), 2)
    llm = LLM(folder, **sizes, enable_expert_parallel=True, **{**OPTIONS, "platform": "npu"})
    assert llm.info.platform == "npu"
    assert generate(llm) == want
    pids = processes(llm)
    del llm
    wait_until_gone(pids)


def distribution(folder: Path, name: str, group: str, entry: str) -> None:
    """An installed distribution with one entry point."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


def test_what_a_rank_refuses_comes_as_it_is(saved: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="max_model_len 5000 is beyond the model's limit"):
        LLM(saved("llama"), distributed_executor_backend="mp", max_model_len=5000, **OPTIONS)
