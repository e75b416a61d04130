"""``--platform record:NAME``: failing calls are written down, and nothing else; what was written can be run again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError, PlatformNotFoundError, PluginError
from engine.extensions.cli import main
from engine.llm import LLM
from engine.plugins import select_platform
from engine.request import SamplingParams
from engine_sdk import (
    REFERENCE_OPS,
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    DrawInputs,
    ExpertsMethod,
    ExpertsSpec,
    ExpertWeights,
    LinearMethod,
    OpSet,
    Platform,
    QuantScheme,
    TorchAttention,
    TorchExperts,
    TorchPlatform,
    load_recording,
    record,
    replay,
)
from engine_sdk.recording import find_platform

SPEC = AttentionSpec(8, 2, 64, 64, 0.125, torch.float16, torch.float16)


class Plain(LinearMethod):
    def pack(self, weight: Tensor, bias: Tensor | None) -> object:
        return weight, bias

    def apply(self, x: Tensor, packed: Any) -> Tensor:
        return F.linear(x, *packed)


class Host(TorchPlatform):
    name = "host"
    device_type = "cpu"
    contract = "1.0"

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        return Plain()


def attend(platform: Platform, spec: AttentionSpec = SPEC, *, lse: bool = False) -> None:
    """A step of two decodes, a chunk of a prompt, a prompt and padding, over blocks in no order."""
    generator = torch.Generator().manual_seed(0)
    lengths, queries, size = [40, 17, 0, 50, 20], [1, 1, 1, 9, 20], 16
    ids = (torch.randperm(299, generator=generator) + 1)[:20].view(5, 4)
    positions = [(row, at) for row, n in enumerate(lengths) for at in range(n - queries[row], n)]
    slots = [int(ids[row, at // size]) * size + at % size if at >= 0 else 0 for row, at in positions]
    host = torch.tensor([0, *queries]).cumsum(0).int(), torch.tensor(lengths).int()
    batch = AttentionBatch(*host, ids.int(), torch.tensor(slots), *host, 3, max(queries), max(lengths), size)
    backend = platform.attention(spec)
    layout = backend.layout(size)
    storage = torch.full((300 * layout.block_bytes,), 255, dtype=torch.uint8)  # NaN wherever nothing was written
    cache = layout.bind(storage, 300)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(spec.dtype)

    blocks = ids.flatten()
    content = (draw(20, size, 2, dim).to(spec.kv_dtype) for dim in (64, spec.v_head_dim))
    layout.import_blocks(cache, blocks, *content)
    n = len(slots)
    q, k, v = draw(n, 8, 64), draw(n, 2, 64), draw(n, 2, spec.v_head_dim)
    extras = {
        "sinks": draw(8) if spec.sinks else None,
        "alibi_slopes": torch.rand(8) if spec.alibi else None,
        "lse": torch.zeros(n, 8) if lse else None,
    }
    backend.forward(q, k, v, cache, backend.plan(batch), q.new_empty(n, 8, spec.v_head_dim), **extras)


def call_ops(platform: Platform, dtype: torch.dtype = torch.bfloat16) -> None:
    ops, x = platform.ops(), torch.randn(5, 64).to(dtype)
    ops.rms_norm(x, torch.randn(64).to(dtype), 1e-5)
    ops.silu_and_mul(x, x + 1)
    ops.rotary(torch.randn(4, 7, 16).to(dtype), torch.randn(2, 7, 16).to(dtype), *torch.rand(2, 7, 16).to(dtype))
    rows = torch.ones(3, dtype=torch.int64)
    one, last = rows * DrawInputs.ONE, rows * DrawInputs.LAST
    inputs = DrawInputs(rows * 3, one, last, rows * 12345, rows * 9e4, max_top_k=3, any_top_p=False, any_min_p=False)
    ops.draw(torch.randn(3, 50), inputs)
    ops.draw(torch.randn(3, 50), None)
    history = torch.tensor([[0, 2, OpSet.PROMPT, OpSet.BANNED, 1]]).int()
    ops.penalise(torch.randn(2, 5), history, torch.tensor([[1], [0]]), torch.tensor([[1.5], [0.5], [0.2]]))
    ops.logprobs(torch.randn(3, 50).to(dtype), torch.tensor([4, 0, 49]), 2)


def multiply(platform: Platform, dtype: torch.dtype = torch.float16) -> None:
    method = platform.linear(None)
    assert method is not None
    method.apply(torch.randn(3, 64).to(dtype), method.pack(torch.randn(32, 64).to(dtype), torch.ones(32, dtype=dtype)))


def route(platform: Platform, activate: Callable[[Tensor], Tensor] | None = None) -> None:
    up, down = torch.randn(4, 32, 16).bfloat16(), torch.randn(4, 16, 16).bfloat16()
    known = ExpertWeights(up, down, activate or (lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]))
    ids = torch.tensor([[0, 3], [1, 2], [2, 7]])
    method = platform.experts(ExpertsSpec(4, 2, True, False, torch.bfloat16))
    method.apply(torch.randn(3, 16).bfloat16(), ids, torch.rand(3, 2), known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_right_is_not_recorded(dtype: torch.dtype, tmp_path: Path) -> None:
    watched = record(Host, tmp_path / "made")()
    for changes in (
        *({}, {"window": 7}, {"chunk": 12}, {"softcap": 3.0}, {"sinks": True}, {"alibi": True}, {"causal": False}),
        *({"v_head_dim": 32}, {"kv_dtype": torch.float16}),
    ):
        options: dict[str, Any] = {"dtype": dtype, "kv_dtype": dtype, **changes}
        attend(watched, dataclasses.replace(SPEC, **options), lse=True)
    call_ops(watched, dtype)
    multiply(watched, dtype)
    route(watched)
    assert not (tmp_path / "made").exists()


class Attention(TorchAttention):
    fault = ""

    def forward(self, q: Tensor, k: Any, v: Any, cache: Any, plan: Any, out: Tensor, **extras: Any) -> None:
        if self.fault == "raises":
            raise RuntimeError("launch failed")
        if self.fault == "swapped":
            k, v = v, k
        super().forward(q, k, v, cache, plan, out, **extras)
        if self.fault == "NaN":
            out[3, 2] = torch.nan
        if self.fault == "rounded":
            out.mul_(1.01)
        if self.fault == "unwritten":
            cache.keys[plan.blocks[-1], plan.offsets[-1]] = 7
        if self.fault == "lse" and extras["lse"] is not None:
            extras["lse"].add_(0.01)


class Method(Plain):
    def apply(self, x: Tensor, packed: Any) -> Tensor:
        return F.linear(x, packed[0])


class Experts(TorchExperts):
    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        return super().apply(x, expert_ids, torch.ones_like(scores), weights)


class Faulty(Host):
    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return Attention(spec)

    def ops(self) -> OpSet:
        return dataclasses.replace(REFERENCE_OPS, **wrong)

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        return Method()

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        return Experts(spec)


wrong: dict[str, Any] = {}


def spoil_the_history(*arguments: Tensor) -> None:
    REFERENCE_OPS.penalise(*arguments)
    arguments[1].add_(1)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("raises", "RuntimeError: launch failed"),
        ("swapped", "keys in the cache are not those that were written"),
        ("unwritten", "keys in the cache are not those that were written"),
        ("NaN", "out is not finite where the reference is, at [3, 2, 0]"),
        ("rounded", "values are off"),
        ("lse", "lse is "),
    ],
)
def test_attention_that_fails(
    fault: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Attention, "fault", fault)
    watched = record(Faulty, tmp_path)()
    file = tmp_path / "attention-1.pt"
    if fault == "raises":
        with pytest.raises(RuntimeError, match="launch failed") as caught:
            attend(watched)
        assert caught.value.__notes__ == [f"recorded in {file}; to run it again: engine plugin replay {file}"]
    else:
        attend(watched, lse=True)
        assert f"to run it again: engine plugin replay {file}" in caplog.text
    recording = load_recording(file)
    assert problem in recording.problem
    assert recording.platform == "record:host"
    assert replay(recording.call, Host()) is None
    if fault == "raises":
        with pytest.raises(RuntimeError, match="launch failed"):
            replay(recording.call, Faulty())
    else:
        assert replay(recording.call, Faulty()) == recording.problem


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("rms_norm", lambda x, weight, eps: REFERENCE_OPS.rms_norm(x, weight, eps + 0.1)),
        ("silu_and_mul", lambda gate, up: F.silu(up) * gate),
        ("rotary", lambda q, k, cos, sin: REFERENCE_OPS.rotary(q, k, sin, cos)),
        ("draw", lambda logits, inputs: REFERENCE_OPS.draw(logits, inputs) + (inputs is not None)),
        ("penalise", lambda logits, history, places, penalties: None),
        ("penalise", spoil_the_history),
        ("logprobs", lambda logits, ids, num: REFERENCE_OPS.logprobs(logits * 1.1, ids, num)),
        ("logprobs", lambda logits, ids, num: None),
    ],
)
def test_operations_that_fail(name: str, op: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(wrong, name, op)
    call_ops(record(Faulty, tmp_path)())
    (file,) = tmp_path.iterdir()
    recording = load_recording(file)
    assert (recording.call.kind, recording.call.name) == ("op", name)  # type: ignore[attr-defined]
    assert replay(recording.call, Host()) is None
    assert replay(recording.call, Faulty()) == recording.problem


@pytest.mark.parametrize(("kind", "use"), [("linear", multiply), ("experts", route)])
def test_layers_that_fail(kind: str, use: Callable[[Platform], None], tmp_path: Path) -> None:
    use(record(Faulty, tmp_path)())
    recording = load_recording(tmp_path / f"{kind}-1.pt")
    assert replay(recording.call, Host()) is None
    assert replay(recording.call, Faulty()) == recording.problem


def test_experts_with_an_activation_of_their_own(tmp_path: Path) -> None:
    route(record(Host, tmp_path)(), lambda x: x.chunk(2, -1)[0].sin())
    assert list(tmp_path.iterdir()) == []
    route(record(Faulty, tmp_path)(), lambda x: x.chunk(2, -1)[0].sin())
    recording = load_recording(tmp_path / "experts-1.pt")
    assert "values are off" in recording.problem
    with pytest.raises(ConfigError, match="activation of these experts is the model's own"):
        replay(recording.call, Host())


def test_only_the_first_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "fault", "rounded")
    for _ in range(2):
        watched = record(Faulty, tmp_path, limit=2)()
        for _ in range(3):
            attend(watched)
    assert len(list(tmp_path.iterdir())) == 4, "two a run, and none over an earlier one's"


def test_a_name_selects_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    greedy = SamplingParams(temperature=0, max_tokens=4)
    made = [
        LLM(platform=name, kv_cache_memory_bytes=1 << 24).generate("def f(", greedy)[0].outputs[0].token_ids
        for name in ("record:torch:cpu", "cpu")
    ]
    assert made[0] == made[1]
    assert list(tmp_path.iterdir()) == []
    assert select_platform("record:cpu").platform.name == "record:cpu"
    with pytest.raises(PlatformNotFoundError, match="no platform 'nosuch' is installed"):
        select_platform("record:nosuch")


def test_a_broken_platform_is_told(install: Any) -> None:
    install("broken-chip", {"broken": "no_such_module:Chip"})
    with pytest.raises(PluginError, match="'broken' cannot be imported: No module named 'no_such_module'"):
        find_platform("broken")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Attention, "fault", "rounded")
    attend(record(Faulty, tmp_path)())
    file = tmp_path / "attention-1.pt"
    assert main(["plugin", "replay", str(file), "--platform", "torch:cpu"]) == 0
    told = capsys.readouterr().out
    assert f"{file}: attention on record:host\nthen: out is" in told
    assert told.endswith("now on torch:cpu: right\n")
    assert main(["plugin", "replay", str(file)]) == 1, "the platform of the recording is not installed"
    assert "no platform 'host' is installed" in capsys.readouterr().err
    (tmp_path / "other.pt").write_text("nothing")
    for other in ("other.pt", "absent.pt"):
        assert main(["plugin", "replay", str(tmp_path / other)]) == 2
        assert "remedy: name a file that --platform record:NAME wrote" in capsys.readouterr().err
    torch.save({"format": 0}, tmp_path / "old.pt")
    assert main(["plugin", "replay", str(tmp_path / "old.pt")]) == 2
    assert "is no recording that this engine knows" in capsys.readouterr().err
