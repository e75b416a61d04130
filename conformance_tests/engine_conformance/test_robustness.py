"""L7: after an error all goes on; nothing falls back to the host; threads, processes and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, SamplingParams
from engine.errors import EngineError, RequestError
from engine_conformance.architectures import head_size, small_block
from engine_conformance.arena import Arena, check, outputs, prepare, run
from engine_conformance.cases import Case, Row, Scale, block, dtypes, layer
from engine_conformance.tiny_models import tiny_model
from engine_conformance.watch import Watch
from engine_sdk import (
    AttentionBackend,
    Capabilities,
    CompilerOptions,
    ExpertsSpec,
    ExpertWeights,
    KVLayout,
    OpSet,
    Plan,
    Platform,
    QuantScheme,
    UnsupportedCapability,
)

Record = Callable[[str, object], None]


def canary(platform: Platform, declared: Capabilities) -> None:
    """A plain case is right."""
    spec = layer(declared)
    check(platform, platform.attention(spec), Case(spec, block(declared), (Row(20, 1), Row(3, 9))))


def call(backend: AttentionBackend, arena: Arena, out: Tensor, plan: Plan = None) -> None:
    """Call the backend with a plan, or one that is made now."""
    q, k, v = arena.tokens
    backend.forward(q, k, v, arena.cache, backend.plan(arena.batch) if plan is None else plan, out)


def test_an_error_in_attention_is_not_the_end(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """A call that cannot be made raises; the same backend, and a new one, are right afterwards."""
    spec, device = layer(capabilities), conformance_platform.device()
    backend = conformance_platform.attention(spec)
    case = Case(spec, block(capabilities), (Row(20, 1), Row(3, 9)))
    for broken in ("plan", "cache"):
        arena = prepare(backend, case, capabilities, device.torch_device)
        q, k, v = arena.tokens
        plan = None if broken == "plan" else backend.plan(arena.batch)
        with pytest.raises(Exception):  # noqa: B017, PT011 - of whatever kind
            backend.forward(q, k, v, None if broken == "cache" else arena.cache, plan, outputs(arena)[0])
        device.synchronize()
        check(conformance_platform, backend, case)
    canary(conformance_platform, capabilities)


def test_refusals_leave_no_trace(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Many refusals in a row, of all kinds that there are, are typed each time, and plain layers stay right."""
    spec = layer(capabilities)
    asked: list[Callable[[], object]] = [
        lambda: conformance_platform.attention(replace(spec, dtype=torch.complex64)),
        lambda: conformance_platform.attention(replace(spec, kv_dtype=torch.complex64)),
        lambda: conformance_platform.linear(QuantScheme("nobody:nothing", 3)),
        lambda: conformance_platform.experts(ExpertsSpec(4, 2, True, False, torch.complex64)),
    ]
    for _ in range(3):
        for ask in asked:
            with pytest.raises(UnsupportedCapability):
                ask()
    canary(conformance_platform, capabilities)


def test_answers_have_the_contracts_types(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Each factory method answers with what the contract says."""
    spec = layer(capabilities)
    backend = conformance_platform.attention(spec)
    assert isinstance(backend, AttentionBackend)
    assert backend.spec == spec
    assert isinstance(backend.layout(block(capabilities)), KVLayout)
    assert isinstance(conformance_platform.ops(), OpSet)
    assert isinstance(conformance_platform.compiler(), CompilerOptions | None)
    assert type(backend).supports(spec), "the class says that it does not support what it was made for"


def test_results_lie_on_the_device(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """What is computed from tensors of the device is on that device, and not on the host."""
    where = conformance_platform.device().torch_device
    spec = layer(capabilities)
    backend = conformance_platform.attention(spec)
    arena = prepare(backend, Case(spec, block(capabilities), (Row(20, 1), Row(3, 9))), capabilities, where)
    run(backend, arena)
    made: dict[str, Any] = {"export_blocks": arena.layout.export_blocks(arena.cache, torch.tensor([1], device=where))}
    ops = conformance_platform.ops()
    x = torch.ones(4, 64, dtype=spec.dtype, device=where)
    heads = torch.ones(1, 2, 4, 64, dtype=spec.dtype, device=where)
    angles = torch.ones(1, 4, 64, dtype=spec.dtype, device=where)
    made["rms_norm"] = (ops.rms_norm(x, x[0], 1e-6),)
    made["silu_and_mul"] = (ops.silu_and_mul(x, x),)
    made["rotary"] = ops.rotary(heads, heads, angles, angles)
    made["draw"] = (ops.draw(x, None),)
    made["logprobs"] = (ops.logprobs(x, torch.zeros(4, dtype=torch.int64, device=where), 2),)
    if (linear := conformance_platform.linear(None)) is not None:
        made["linear"] = (linear.apply(x, linear.pack(torch.ones(8, 64, dtype=spec.dtype, device=where), None)),)
    up, down = (torch.ones(2, 64, 64, dtype=spec.dtype, device=where) for _ in range(2))
    weights = ExpertWeights(up, down, torch.relu)
    ids = torch.zeros(4, 1, dtype=torch.int64, device=where)
    method = conformance_platform.experts(ExpertsSpec(2, 1, False, False, spec.dtype))
    made["experts"] = (method.apply(x, ids, x[:, :1].clone(), weights),)
    for name, results in made.items():
        for result in results:
            assert result.device == x.device, f"{name}: the result is on {result.device}, and its inputs on {x.device}"


def test_nothing_falls_back_to_the_host(
    conformance_platform: Platform, capabilities: Capabilities, record_property: Record
) -> None:
    """Attention and the token-wise operations bring no data to the host, in any dtype that is declared."""
    device = conformance_platform.device()
    if device.torch_device.type == "cpu":
        return  # there is nowhere to fall
    ops = conformance_platform.ops()
    for dtype in dtypes(capabilities):
        spec = layer(capabilities, dtype=dtype)
        backend = conformance_platform.attention(spec)
        case = Case(spec, block(capabilities), (Row(20, 1), Row(100, 1), Row(3, 9), Row(0, 30)))
        arena = prepare(backend, case, capabilities, device.torch_device)
        x = torch.randn(4, 64).to(dtype).to(device.torch_device)
        out, _ = outputs(arena)
        with Watch(device.torch_device) as watch:
            call(backend, arena, out)
            ops.rms_norm(x, x[0], 1e-6)
            ops.silu_and_mul(x, x)
        assert not watch.moved, f"{dtype}: {', '.join(watch.moved)} brought data to the host"


def test_on_another_thread(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Planned on one thread and computed on another, which activated the device: the same bits."""
    device, spec = conformance_platform.device(), layer(capabilities)
    backend = conformance_platform.attention(spec)
    case = Case(spec, block(capabilities), (Row(20, 1), Row(100, 1), Row(3, 9)))
    here, there, mixed = (prepare(backend, case, capabilities, device.torch_device) for _ in range(3))
    want, _ = run(backend, here)
    plan = backend.plan(mixed.batch)
    got: dict[str, Tensor] = {}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            device.activate()
            got["there"], _ = run(backend, there)
            got["mixed"], _ = outputs(mixed)
            call(backend, mixed, got["mixed"], plan)
            device.synchronize()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors, errors
    for name, out in got.items():
        assert torch.equal(out, want) if capabilities.deterministic else torch.allclose(out, want), name


def test_backends_do_not_share_state(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """Two backends of one specification, and one of another, used in turn: plans and workspaces do not mix."""
    device, spec = conformance_platform.device(), layer(capabilities)
    small = replace(spec, num_heads=1, num_kv_heads=1)
    backends = [conformance_platform.attention(s) for s in (spec, spec, small)]
    cases = [
        Case(s, block(capabilities), rows, seed=i)
        for i, (s, rows) in enumerate(
            zip((spec, spec, small), ((Row(60, 1),), (Row(3, 1), Row(0, 40)), (Row(90, 1), Row(9, 9))), strict=True)
        )
    ]
    arenas = [prepare(b, c, capabilities, device.torch_device) for b, c in zip(backends, cases, strict=True)]
    want = [run(b, prepare(b, c, capabilities, device.torch_device))[0] for b, c in zip(backends, cases, strict=True)]
    plans = [b.plan(a.batch) for b, a in zip(backends, arenas, strict=True)]
    outs = [outputs(a)[0] for a in arenas]
    for index in (2, 0, 1, 0, 2):
        call(backends[index], arenas[index], outs[index], plans[index])
    for out, expected in zip(outs, want, strict=True):
        assert torch.equal(out, expected) if capabilities.deterministic else torch.allclose(out, expected)


def test_memory_does_not_leak(
    conformance_platform: Platform, capabilities: Capabilities, scale: Scale, record_property: Record
) -> None:
    """Hundreds of steps of all sizes hold no more memory than the first ones did."""
    device, memory, spec = conformance_platform.device(), conformance_platform.memory(), layer(capabilities, group=1)
    if not conformance_platform.probe().accelerator:
        return  # a host's free memory is everybody's
    backend = conformance_platform.attention(spec)
    shared = "PYTEST_XDIST_WORKER" in os.environ  # then the device's free memory is everybody's too
    held = []
    for step in range(round(240 * min(1, scale.examples)) or 60):
        rows = (*(Row((7 * step + i) % 50, 1) for i in range(1 + step % 8)), Row(step % 9, 2 + step % 20))
        run(
            backend,
            prepare(backend, Case(spec, block(capabilities), rows, seed=step), capabilities, device.torch_device),
        )
        if step % 20 == 19:
            device.synchronize()
            memory.release()
            held.append(torch.accelerator.memory_reserved() if shared else -device.memory_info().free)
    assert held[-1] - held[0] < 64 << 20, f"{(held[-1] - held[0]) >> 20} MiB more are held after {step} steps"


@pytest.fixture(scope="module")
def folder(capabilities: Capabilities, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", **head_size("llama", capabilities)).save_pretrained(path)
    return str(path)


def engine_options(platform: Platform, declared: Capabilities) -> dict[str, Any]:
    """A small engine."""
    return {
        "platform": platform.name,
        "device_index": platform.device_index,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": small_block(declared),
        "num_blocks": 96,
    }


_PROMPTS = [[5, 9, 30, 11, 7], list(range(20, 50)), [99]]
_GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def generated(llm: LLM) -> list[list[int]]:
    """Tokens of the prompts."""
    return [list(o.outputs[0].token_ids) for o in llm.generate(_PROMPTS, SamplingParams(**_GREEDY))]


def test_engine_after_out_of_memory(conformance_platform: Platform, capabilities: Capabilities, folder: str) -> None:
    """A cache larger than the device is refused with an error of the engine's; then one that fits works."""
    options = engine_options(conformance_platform, capabilities)
    want = generated(LLM(folder, **options))
    total = conformance_platform.device().memory_info().total
    for _ in range(2):
        with pytest.raises(EngineError):
            LLM(folder, **{**options, "num_blocks": None, "kv_cache_memory_bytes": 1000 * total})
        assert generated(LLM(folder, **options)) == want
    canary(conformance_platform, capabilities)


def test_engine_after_bad_requests(conformance_platform: Platform, capabilities: Capabilities, folder: str) -> None:
    """A wrong request, and a logits processor that fails in the middle of a step, cost nobody else anything."""
    llm = LLM(folder, **engine_options(conformance_platform, capabilities))
    want = generated(llm)
    with pytest.raises(RequestError):
        llm.generate([[5], [10_000]], SamplingParams(**_GREEDY))
    assert generated(llm) == want

    def fails(output: object, logits: object) -> object:
        raise ZeroDivisionError

    with pytest.raises(Exception):  # noqa: B017, PT011 - that engine is lost, and the next one is not
        llm.generate(_PROMPTS[0], SamplingParams(**_GREEDY, logits_processors=[fails]))
    assert generated(LLM(folder, **engine_options(conformance_platform, capabilities))) == want


def test_engine_with_a_cache_of_its_choice(
    conformance_platform: Platform, capabilities: Capabilities, folder: str
) -> None:
    """How much cache there is, by share of memory or in bytes, is measured and kept; the tokens are the same."""
    options = {**engine_options(conformance_platform, capabilities), "num_blocks": None}
    want = generated(LLM(folder, **engine_options(conformance_platform, capabilities)))
    total = conformance_platform.device().memory_info().total
    share = min(0.5, (1 << 30) / total)
    by_bytes = LLM(folder, **options, kv_cache_memory_bytes=8 << 20)
    by_share = LLM(folder, **options, gpu_memory_utilization=max(share, 0.02))
    assert generated(by_bytes) == generated(by_share) == want
    assert by_bytes.info.kv_bytes <= 8 << 20


def test_fresh_process(conformance_platform: Platform, capabilities: Capabilities, folder: str) -> None:
    """A process of its own gives the same tokens, and ends by itself, without a word, when it is done."""
    options = engine_options(conformance_platform, capabilities)
    want = generated(LLM(folder, **options))
    code = f"""
import json, sys, threading
from engine import LLM, SamplingParams
llm = LLM({folder!r}, **json.loads(sys.argv[1]))
outputs = llm.generate({_PROMPTS!r}, SamplingParams(**{_GREEDY!r}))
print("TOKENS", json.dumps([o.outputs[0].token_ids for o in outputs]))
"""
    command = [sys.executable, "-c", code, json.dumps(options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    assert json.loads(line.removeprefix("TOKENS ")) == want
