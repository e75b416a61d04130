"""What of the platform is this chip's own. What the contract asks of every platform, the conformance suite checks."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from engine_npu import NpuPlatform

from engine import LLM, RequestOutput, SamplingParams
from engine_conformance.tiny_models import tiny_model
from engine_sdk import REFERENCE_OPS, AttentionBatch, AttentionSpec, UnsupportedCapability

SPEC = AttentionSpec(4, 2, 32, 32, 32**-0.5, torch.float32, torch.float32)


@pytest.fixture(scope="module")
def platform() -> NpuPlatform:
    return NpuPlatform()


def test_a_probe_leaves_the_device_alone(run: Run) -> None:
    code = """
from engine_npu import NpuPlatform
found = NpuPlatform.probe()
assert found.available and [d.name for d in found.devices] == ["NPU-3"] * 4, found
NpuPlatform(3).capabilities()
assert not torch.npu.is_initialized()
"""
    done = run(code, NPU_SIM_DEVICES="4", NPU_SIM_GENERATION="3")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "reason"), [({"NPU_SIM_DEVICES": "0"}, "sees no NPU"), ({"CXX": "no-such-compiler"}, "no g++")]
)
def test_a_probe_says_why_not(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = NpuPlatform.probe()
    assert not found.available
    assert reason in found.reason


def test_capabilities_follow_the_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_SIM_GENERATION", "1")
    old = NpuPlatform()
    assert torch.bfloat16 not in old.capabilities().dtypes | old.capabilities().kv_dtypes
    with pytest.raises(UnsupportedCapability):
        old.attention(AttentionSpec(4, 2, 32, 32, 1.0, torch.bfloat16, torch.bfloat16))
    assert "use float16" in old.configure({"dtype": "bfloat16"}).refusals["dtype"]
    assert not old.configure({"dtype": "float16"}).refusals


def test_keys_and_values_lie_apart(platform: NpuPlatform) -> None:
    layout = platform.attention(SPEC).layout(128)
    blocks = 3
    storage = torch.zeros(blocks * (layout.block_bytes + 512), dtype=torch.uint8, device="npu")
    cache = layout.bind(storage, blocks)
    ones = torch.ones(1, 128, 2, 32, device="npu")
    layout.import_blocks(cache, torch.tensor([1], device="npu"), ones, ones * 2)
    keys, values = storage.cpu().view(torch.float32).view(2, blocks, -1)
    for half, value in ((keys, 1.0), (values, 2.0)):
        assert half[1].unique().tolist() == [0, value], "a block and its padding"
        assert not half[[0, 2]].any()
    token = torch.arange(128.0, device="npu")[None, :, None, None].expand(1, 128, 2, 32)
    layout.import_blocks(cache, torch.tensor([2], device="npu"), token, token)
    tile = storage.cpu().view(torch.float32).view(2, blocks, -1)[0, 2, : 128 * 16].view(128, 16)
    assert torch.equal(tile, torch.arange(128.0)[:, None].expand(128, 16)), "16 lanes of each token"


def decode_batch(lengths: list[int], blocks: list[list[int]]) -> AttentionBatch:
    host = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    slots = [ids[(n - 1) // 128] * 128 + (n - 1) % 128 if n else 0 for n, ids in zip(lengths, blocks, strict=True)]
    return AttentionBatch(
        query_start=starts.to("npu"),
        seq_lens=host.to("npu"),
        block_table=torch.tensor(blocks, dtype=torch.int32, device="npu"),
        slots=torch.tensor(slots, device="npu"),
        query_start_host=starts,
        seq_lens_host=host,
        num_decodes=len(lengths),
        max_query_len=1,
        max_seq_len=max(lengths),
        block_size=128,
        captured=True,
    )


@pytest.mark.usefixtures("no_waits")
def test_a_captured_decode_is_right_after_the_batch_changed(platform: NpuPlatform) -> None:
    backend, graphs = platform.attention(SPEC), platform.graphs()
    assert graphs is not None
    torch.npu.set_sync_debug_mode("default")
    layout = backend.layout(128)
    storage = torch.zeros(8 * layout.block_bytes, dtype=torch.uint8, device="npu")
    cache = layout.bind(storage, 8)
    generator = torch.Generator().manual_seed(0)
    content = (torch.randn(8, 128, 2, 32, generator=generator).to("npu") for _ in range(2))
    layout.import_blocks(cache, torch.arange(8, device="npu"), *content)
    filled = storage.clone()
    q, k, v = (torch.randn(2, heads, 32, generator=generator).to("npu") for heads in (4, 2, 2))
    batch = decode_batch([5, 200], [[1, 0], [2, 3]])
    # The last one has a row of padding, which has no keys and writes into block 0.
    changes = decode_batch([256, 129], [[6, 4], [5, 7]]), decode_batch([200, 0], [[3, 6], [0, 0]])
    out = torch.zeros(2, 4, 32, device="npu")
    torch.npu.set_sync_debug_mode("error")

    plan = backend.plan(batch)
    backend.forward(q, k, v, cache, plan, out)
    graph = graphs.capture(lambda: backend.forward(q, k, v, cache, plan, out))
    results = []
    for change in changes:
        for name in ("seq_lens", "block_table", "slots"):
            getattr(batch, name).copy_(getattr(change, name))
        storage.copy_(filled)
        q.mul_(2)
        backend.refresh(plan, batch)
        graph.replay()
        replayed, written = out.clone(), storage.clone()
        storage.copy_(filled)
        backend.forward(q, k, v, cache, backend.plan(change), out)
        real = int((change.seq_lens_host > 0).sum())
        results += [(replayed[:real], out[:real].clone()), (written, storage.clone())]
    torch.npu.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_fused_norm_is_one_launch_with_the_references_bits(platform: NpuPlatform, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(64).to(dtype)
    on_device = x.to("npu"), weight.to("npu")
    launches = torch.npu.launches()
    got = platform.ops().rms_norm(*on_device, 1e-5)
    assert torch.npu.launches() == launches + 1
    assert torch.equal(got.cpu(), REFERENCE_OPS.rms_norm(x, weight, 1e-5))
    assert torch.ops.engine_npu.rms_norm(x.to("meta"), weight.to("meta"), 1e-5).shape == x.shape


# ------------------------------------------------------------------------------------------------ the engine


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 128) for _ in range(n)] for n in (1, 40, 124, 7, 150, 122, 33)]
    return [*prompts, [*prompts[4][:130], 5, 6, 7]]


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "gpt_oss", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(path)
    return path


def engine(folder: Path, **options: Any) -> LLM:
    defaults = {"skip_tokenizer_init": True, "max_model_len": 200, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return LLM(str(folder), **{"platform": "npu", "num_blocks": 64, **defaults, **options})


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)


def test_the_engine_gives_the_hosts_tokens_and_never_waits_in_a_step(folder: Path, prompts: list[list[int]]) -> None:
    expected = tokens(engine(folder, platform="cpu", block_size=16, num_blocks=400).generate(prompts, GREEDY))
    llm = engine(folder)
    assert (llm.info.device, llm.info.block_size) == ("npu:0", 128)
    torch.npu.set_sync_debug_mode("error")
    try:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        again = llm.generate(prompts, GREEDY)
    finally:
        torch.npu.set_sync_debug_mode("default")
    assert tokens(again) == expected
    assert sum(o.num_cached_tokens for o in again) > 0

    assert tokens(engine(folder, async_scheduling=False).generate(prompts, GREEDY)) == expected
    with torch.npu.slowed(200):
        assert tokens(engine(folder).generate(prompts, GREEDY)) == expected


def test_decode_steps_are_replayed(folder: Path, prompts: list[list[int]]) -> None:
    launches, made = [], []
    for eager in (True, False):
        llm = engine(folder, enforce_eager=eager)
        llm.generate(prompts[:4], GREEDY)  # captures what the next call replays
        before = torch.npu.launches()
        made.append(tokens(llm.generate(prompts[:4], GREEDY)))
        launches.append(torch.npu.launches() - before)
    assert made[0] == made[1]
    assert launches[1] < launches[0] / 2


def test_preemption_changes_nothing(folder: Path, prompts: list[list[int]]) -> None:
    crowd = [(prompts[4] + prompts[5][: i + 1])[-120 - i :] for i in range(6)]  # all grow into a second block
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    roomy = engine(folder)
    expected = tokens(roomy.generate(crowd, params))
    preemptions = 0
    for spare in range(5):  # with little, they run one by one; with much, all at once
        outputs = engine(folder, num_blocks=roomy.info.min_blocks + spare).generate(crowd, params)
        assert tokens(outputs) == expected
        preemptions += sum(o.metrics.num_preemptions for o in outputs if o.metrics)
    assert preemptions > 0


def test_sampled_tokens_are_the_hosts(folder: Path, prompts: list[list[int]]) -> None:
    params = [
        SamplingParams(temperature=1.2, top_k=9, top_p=0.9, presence_penalty=0.3, seed=i, max_tokens=8, ignore_eos=True)
        for i in range(len(prompts))
    ]
    host = engine(folder, platform="cpu", block_size=16, num_blocks=400)
    assert tokens(engine(folder).generate(prompts, params)) == tokens(host.generate(prompts, params))


def test_the_second_device(folder: Path, prompts: list[list[int]]) -> None:
    llm = engine(folder, device_index=1)
    assert llm.info.device == "npu:1"
    torch.npu.set_device(0)  # the engine must not depend on which device is current
    outputs = tokens(llm.generate(prompts[:2], GREEDY))
    assert outputs == tokens(engine(folder).generate(prompts[:2], GREEDY))
