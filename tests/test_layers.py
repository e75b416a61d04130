"""Decoder layers that a platform runs in a few calls: which are exchanged, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import LLM, SamplingParams
from engine_conformance.tiny_models import tiny_model
from engine_cpu import layers, native
from engine_sdk import DecoderLayer, LayerForward, find_layers

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
PROMPTS = [[(i * k + 3) % 120 + 3 for i in range(5 + 19 * k)] for k in range(3)]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if native.library() is None:
        pytest.skip("there is no C++ compiler")


def load(folder: Path, dtype: str = "bfloat16", **options: Any) -> LLM:
    options = {"skip_tokenizer_init": True, "num_blocks": 40, "disable_log_stats": True, "dtype": dtype, **options}
    return LLM(str(folder), platform="cpu", **options)


def exchanged(llm: LLM) -> list[bool]:
    """Of each decoder layer, whether another's forward serves."""
    model = llm._core.runner.model.model  # type: ignore[attr-defined]
    found = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    return [getattr(vars(m).get("forward"), "__name__", "") == "served" for m in found]


def outputs(llm: LLM) -> list[Any]:
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize(
    ("name", "dtype", "same"),
    [
        ("qwen3", "bfloat16", True),  # heads are normed
        ("qwen2", "bfloat16", True),  # with biases
        ("phi3", "bfloat16", True),  # one linear layer for q, k, v, one for gate and up
        ("llama", "bfloat16", True),  # with biases everywhere
        ("llama", "float32", True),  # weights that are not ours
        ("gemma", "bfloat16", False),  # norms add one to their weight, and the gate is a GELU
        ("granite", "bfloat16", False),  # what is added is scaled
        ("olmo2", "bfloat16", False),  # norms stand after
    ],
)
def test_layers_of_the_structure_are_exchanged_and_give_the_same(
    name: str, dtype: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {
        "llama": {"mlp_bias": True, "attention_bias": True},
        "granite": {"residual_multiplier": 0.9},
    }
    tiny_model(name, **fields.get(name, {})).save_pretrained(tmp_path)
    fused = load(tmp_path, dtype)
    assert set(exchanged(fused)) == {same}
    got = outputs(fused)
    monkeypatch.setattr(layers, "exchange_layers", lambda *args: None)
    plain = load(tmp_path, dtype)
    assert not any(exchanged(plain))
    assert got == outputs(plain), "a layer's kernels round as separate operations do"


@pytest.mark.parametrize("ours", [True, False])
def test_a_layer_is_one_call_where_attention_is_ours(
    ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading goes through `attend`, as does attention over a cache that is the SDK's; nothing differs."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    made, calls = Counter[str](), layers._calls

    def counted(kernels: Any) -> list[Callable[..., None]]:
        def count(name: str, call: Callable[..., None], *args: Any) -> None:
            made[name] += 1
            call(*args)

        return [partial(count, *pair) for pair in zip(("before", "after", "whole"), calls(kernels), strict=True)]

    monkeypatch.setattr(layers, "_calls", counted)
    options = {} if ours else {"kv_cache_dtype": "fp8_e4m3"}
    llm = load(tmp_path, **options)
    assert all(exchanged(llm))
    assert made["before"] == made["after"] > 0
    assert not made["whole"]
    made.clear()
    got = outputs(llm)
    assert set(made) == ({"whole"} if ours else {"before", "after"})
    monkeypatch.setattr(layers, "exchange_layers", lambda *args: None)
    assert got == outputs(load(tmp_path, **options))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_run_in_the_same_calls(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    fused = load(tmp_path, quantization=scheme)
    assert all(exchanged(fused))
    got = outputs(fused)
    monkeypatch.setattr(layers, "exchange_layers", lambda *args: None)
    assert got == outputs(load(tmp_path, quantization=scheme))


def _unturned(forward: LayerForward) -> LayerForward:
    return lambda x, cos, sin: forward(x, torch.ones_like(cos), torch.zeros_like(sin))


def _twice(forward: LayerForward) -> LayerForward:
    return lambda x, cos, sin: forward(forward(x, cos, sin), cos, sin)


def _halved(forward: LayerForward) -> LayerForward:
    return lambda x, cos, sin: x + 0.5 * (forward(x, cos, sin) - x)


def _fails(forward: LayerForward) -> LayerForward:
    def fail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        raise ValueError("it is something else")

    return fail


@pytest.mark.parametrize("wrong", [_unturned, _twice, _halved, _fails])
def test_a_forward_that_gives_something_else_is_left_out(
    wrong: Callable[[LayerForward], LayerForward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    make = layers._fused

    def some(layer: DecoderLayer, *args: Any) -> LayerForward | None:
        forward = make(layer, *args)
        assert forward is not None
        return wrong(forward) if layer.attention.layer_idx == 1 else forward

    monkeypatch.setattr(layers, "_fused", some)
    assert exchanged(load(tmp_path)) == [True, False, True, True]


def test_what_is_hooked_or_has_other_parts_is_not_proposed() -> None:
    model = tiny_model("llama")
    assert len(find_layers(model)) == 4
    first, second, third, fourth = model.model.layers
    first.self_attn.k_proj.register_forward_hook(lambda *args: None)
    second.extra = nn.Linear(2, 2)
    third.mlp.up_proj = nn.Embedding(2, 2)
    fourth.self_attn.forward = fourth.self_attn.forward
    assert find_layers(model) == []
