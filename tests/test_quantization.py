"""Weights of 8 and 4 bits: rounding, published formats, and models that equal plain ones of the same weights."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import LLM, SamplingParams
from engine.config import EngineArgs
from engine.errors import ConfigError, EngineError, UnsupportedCapability, UnsupportedModelError
from engine.extensions.quantization.formats import Awq, Gptq, Packed
from engine.extensions.quantization.stored import _parameter
from engine.interfaces import LinearMethod
from engine.model.adapt import load_model
from engine.model.load import Cut
from engine_conformance.tiny_models import tiny_model
from engine_cpu import CpuPlatform
from engine_mutation.host import HostPlatform
from engine_sdk import QUANT_SCHEMES, QuantScheme, QuantWeight, TorchPlatform, TorchQuantized, dequantise, quantise

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
PROMPTS = [[(i * k + 3) % 120 + 3 for i in range(5 + 9 * k)] for k in range(3)]
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "num_blocks": 40, "disable_log_stats": True, "platform": "cpu"}


# Rounding.


@pytest.mark.parametrize("name", QUANT_SCHEMES)
@pytest.mark.parametrize("group", [None, 32])
def test_rounding_is_to_the_nearest_of_all_values(name: str, group: int | None) -> None:
    bits = QUANT_SCHEMES[name]
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4, 5] = -9
    found = quantise(weight, QuantScheme(name, bits, group))
    limit = 1 << (bits - 1)
    assert int(found.values.amin()) == (-limit if bits == 4 else -limit + 1)
    assert int(found.values.amax()) == limit - 1
    steps = found.scales.abs().repeat_interleave(96 // found.scales.shape[1], 1)
    error = (dequantise(found, torch.float32) - weight).abs()
    # The end of 4 bits that has one value less may be off by a whole step.
    assert bool((error <= steps * (1.0 if bits == 4 else 0.5) + 1e-6).all())
    assert float(error.mean()) < 0.3 * float(steps.mean())
    assert not error[3].any()


@pytest.mark.parametrize("name", QUANT_SCHEMES)
def test_small_weights_of_fp16_are_kept(name: str) -> None:
    """Their scales are subnormal."""
    weight = torch.full((2, 32), 2e-4, dtype=torch.float16)
    found = quantise(weight, QuantScheme(name, QUANT_SCHEMES[name], 32))
    torch.testing.assert_close(dequantise(found, torch.float32), weight.float(), rtol=0.03, atol=0)


def test_zeros_shift_what_values_mean() -> None:
    weight = QuantWeight(
        torch.tensor([[1, 2, 3, 4]], dtype=torch.int8),
        torch.tensor([[2.0, 0.5]]),
        torch.tensor([[1, -2]], dtype=torch.int8),
    )
    assert dequantise(weight, torch.float32).tolist() == [[0, 2, 2.5, 3]]


@pytest.mark.parametrize("scheme", [QuantScheme("int4", 4), QuantScheme("int4", 4, 3), QuantScheme("int8", 8, 7)])
@pytest.mark.parametrize("platform", [TorchPlatform, CpuPlatform])
def test_odd_sizes_run_in_plain_torch(scheme: QuantScheme, platform: type[TorchPlatform]) -> None:
    method = (HostPlatform if platform is TorchPlatform else platform)().linear(scheme)
    assert method is not None
    weight, bias, x = torch.randn(6, 21), torch.randn(6), torch.randn(2, 3, 21)
    packed = method.pack(weight, bias)
    want = dequantise(quantise(weight, scheme), torch.float32)
    torch.testing.assert_close(method.apply(x, packed), F.linear(x, want, bias))
    ids = torch.tensor([[5, 0], [3, 3]])
    torch.testing.assert_close(method.rows(ids, packed), want[ids])


def test_large_weights_become_floats_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_sdk.quantization._AT_ONCE", 100)
    scheme = QuantScheme("int8", 8)
    method, weight, x = TorchQuantized(scheme), torch.randn(11, 32), torch.randn(4, 32)
    want = F.linear(x, dequantise(quantise(weight, scheme), torch.float32))
    torch.testing.assert_close(method.apply(x, method.pack(weight, None)), want)


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (QuantScheme("int4", 8), "int4 of 8 bits.*there are int8 of 8 bits, int4 of 4 bits"),
        (QuantScheme("fp6", 6), "fp6"),
        (QuantScheme("int8", 8, -1), "in groups of -1"),
    ],
)
def test_other_schemes_are_refused(scheme: QuantScheme, says: str) -> None:
    for platform in (HostPlatform(), CpuPlatform()):
        with pytest.raises(UnsupportedCapability, match=says):
            platform.linear(scheme)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedCapability, match="groups of 32 do not divide 40 inputs"):
        quantise(torch.randn(2, 40), QuantScheme("int8", 8, 32))


# Models that are rounded while they are loaded equal Transformers' own of the rounded weights.


def replaced(model: PreTrainedModel, change: Callable[[str, nn.Linear], Tensor | None]) -> PreTrainedModel:
    """`model`, with new weights for its linear layers; those of a tied head are the embedding's too."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and (weight := change(name, module)) is not None:
                module.weight.copy_(weight)
    return model


def assert_same_texts(folder: Path, reference: PreTrainedModel, **options: Any) -> LLM:
    """Greedy tokens, and the likeliest of each step with their log probabilities."""
    llm = LLM(str(folder), **OPTIONS | {"dtype": "float32"} | options)
    for output, prompt in zip(llm.generate(PROMPTS, GREEDY, use_tqdm=False), PROMPTS, strict=True):
        ids = torch.tensor([[*prompt, *output.outputs[0].token_ids]])
        with torch.no_grad():
            want = reference(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert output.outputs[0].token_ids == want.argmax(-1).tolist()
        for found, row in zip(output.outputs[0].logprobs or (), want, strict=True):
            for token, logprob in found.items():
                assert abs(logprob.logprob - float(row[token])) < 2e-4
    return llm


def rounded(word: str, reference: PreTrainedModel) -> PreTrainedModel:
    head = reference.get_output_embeddings()

    def change(name: str, linear: nn.Linear) -> Tensor:
        four = word == "int4" and linear is not head
        return dequantise(
            quantise(linear.weight, QuantScheme("int4", 4, 32) if four else QuantScheme("int8", 8)), torch.float32
        )

    return replaced(reference, change)


@pytest.mark.parametrize("word", QUANT_SCHEMES)
@pytest.mark.parametrize(("name", "fields"), [("qwen2", {}), ("gemma2", {"hidden_size": 96})])
def test_a_rounded_model_is_the_plain_one_of_rounded_weights(
    word: str, name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """With biases and a head of its own, and with a scaled embedding that shares its weight with the head."""
    model = tiny_model(name, intermediate_size=96, tie_word_embeddings=name == "gemma2", **fields)
    model.save_pretrained(tmp_path)
    llm = assert_same_texts(tmp_path, rounded(word, model), quantization=word)
    floats = sum(p.numel() for p in model.parameters()) * 4
    assert llm.info.weight_bytes < 0.45 * floats


def test_other_platforms_run_the_same_in_plain_torch(tmp_path: Path) -> None:
    tiny_model("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path)
    logits = []
    for platform in (HostPlatform(), CpuPlatform()):
        args = EngineArgs(model=str(tmp_path), quantization="int4", dtype="float32")
        model, index = load_model(args, platform), torch.arange(9)
        with torch.inference_mode():
            logits.append(model.forward(index + 3, index, index))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_a_platform_that_rounds_its_own_way_serves_and_its_head_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Rounds(LinearMethod):
        def pack(self, weight: Tensor, bias: Tensor | None) -> object:
            return weight.round(decimals=1)

        def apply(self, x: Tensor, packed: object) -> Tensor:
            assert isinstance(packed, Tensor)
            return F.linear(x, packed)

    linear = HostPlatform.linear
    monkeypatch.setattr(HostPlatform, "linear", lambda self, scheme: Rounds() if scheme else linear(self, scheme))
    model = tiny_model("qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        adapted = load_model(EngineArgs(model=str(tmp_path), quantization="int8"), HostPlatform())
    assert "the head stays in torch.float32" in caplog.text
    assert adapted.model.get_output_embeddings().weight is adapted.model.get_input_embeddings().weight


# Formats: a straightforward writer of each, and what the numbers stand for.

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq 8 bits, one group, second version": {
        "quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2",
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}  # fmt: skip


def compressed(layout: str, bits: int, strategy: str, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


CONFIGS["W4A16"] = compressed("pack-quantized", 4, "group", group_size=32)
CONFIGS["W4A16, asymmetric"] = compressed("pack-quantized", 4, "group", symmetric=False, group_size=32)
CONFIGS["W8A16"] = compressed("pack-quantized", 8, "channel")
CONFIGS["W8A8"] = compressed("int-quantized", 8, "channel")
CONFIGS["W8A8, one scale, fixed activations"] = compressed("int-quantized", 8, "tensor")


def words(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers [A, B] in words [A, B * bits / 32], one after the other from the lowest bits on."""
    per = 32 // bits
    rows = []
    for row in values.tolist():
        packed = [sum(int(v) << (bits * i) for i, v in enumerate(row[at : at + per])) for at in range(0, len(row), per)]
        rows.append([w - (1 << 32) if w >> 31 else w for w in packed])
    return torch.tensor(rows, dtype=torch.int32)


def stored(
    config: dict[str, Any], outputs: int, inputs: int, draw: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """A random layer's tensors in the format of `config`, and its weight in float."""
    weights = config.get("config_groups", {}).get("group_0", {}).get("weights", config)
    bits, size = weights.get("bits") or weights["num_bits"], weights.get("group_size", -1)
    groups = inputs // size if size > 0 else 1
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=draw)  # unsigned
    zeros = torch.randint(1, 1 << bits, (outputs, groups), generator=draw)
    if weights.get("symmetric", False):
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    one = weights.get("strategy") == "tensor"
    scales = torch.rand(1 if one else outputs, groups, generator=draw) / (1 << bits) / 4 + 0.01
    scales = scales.half().float()
    spread = [t.repeat_interleave(inputs // groups, 1) for t in (zeros, scales)]
    plain = (codes - spread[0]) * spread[1]
    half = 1 << (bits - 1)
    match config["quant_method"], config.get("format"):
        case "gptq", _:
            less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            return {
                "qweight": words(codes, bits).T.contiguous(),
                "qzeros": words((zeros - less).T, bits),
                "scales": scales.T.contiguous().half(),
                "g_idx": (torch.arange(inputs) // (inputs // groups)).int(),
            }, plain
        case "awq", _:
            order = [0, 2, 4, 6, 1, 3, 5, 7]  # of the columns in a word

            def packed(columns: Tensor) -> Tensor:
                return words(columns.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)

            return {
                "qweight": packed(codes.T),
                "qzeros": packed(zeros.T),
                "scales": scales.T.contiguous().half(),
            }, plain
        case _, "pack-quantized":
            found = {
                "weight_packed": words(codes, bits),
                "weight_scale": scales.half(),
                "weight_shape": torch.tensor([outputs, inputs]),
            }
            return found | (
                {} if weights["symmetric"] else {"weight_zero_point": words(zeros.T, bits).T.contiguous()}
            ), plain
        case _:
            found = {
                "weight": (codes - half).to(torch.int8),
                "weight_scale": scales.half().reshape(-1) if one else scales.half(),
            }
            return found | ({"input_scale": torch.ones(1)} if one else {}), plain


def checkpoint(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    """Write a tiny model whose linear layers, but the head, are stored as `config` says; the same one in floats."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)
    tensors, draw = dict(model.state_dict()), torch.Generator().manual_seed(0)

    def change(name: str, linear: nn.Linear) -> Tensor | None:
        if name == "lm_head":
            return None
        found, plain = stored(config, linear.out_features, linear.in_features, draw)
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{key}": tensor for key, tensor in found.items()})
        return plain

    replaced(model, change)
    model.config.save_pretrained(folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config=config)
    return model


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("case", CONFIGS)
def test_stored_integers_are_read_exactly(case: str, tmp_path: Path) -> None:
    assert_same_texts(tmp_path, checkpoint(tmp_path, CONFIGS[case]))


def test_layers_may_be_stored_in_several_ways(tmp_path: Path) -> None:
    """Groups for layers by their names, as W8A8 for attention and nothing for the rest."""
    config = json.loads(json.dumps(CONFIGS["W8A16"]))
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    other = json.loads(json.dumps(CONFIGS["W4A16"]["config_groups"]["group_0"])) | {"targets": [r"re:.*mlp\..*"]}
    model = checkpoint(tmp_path, config)
    tensors, draw = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mlp." in name:
            found, plain = stored(CONFIGS["W4A16"], module.out_features, module.in_features, draw)
            tensors.update({f"{name}.{key}": tensor for key, tensor in found.items()})
            module.weight.data.copy_(plain)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config["config_groups"]["group_1"] = other
    edit(tmp_path, quantization_config=config)
    assert_same_texts(tmp_path, model)


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if name not in n}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def shuffled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] = tensors["model.layers.1.mlp.up_proj.g_idx"].flip(0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def says(case: str, **fields: Any) -> Callable[[Path], None]:
    """A checkpoint whose configuration says something else."""
    return lambda folder: edit(folder, quantization_config=CONFIGS[case] | fields)


def is_in(config: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, quantization_config=config)


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "method": ("gptq", is_in({"quant_method": "hqq"}), "no quantization 'hqq'; there are: .*awq, compr"),
    "no method": ("gptq", is_in({"bits": 4}), "no quantization 'unnamed'"),
    "3 bits": ("gptq", says("gptq", bits=3), "GPTQ with 3 bits, .*--quantization int8"),
    "marlin": ("gptq", says("gptq", checkpoint_format="marlin"), "GPTQ stored as 'marlin'"),
    "dynamic": ("gptq", says("gptq", dynamic={"-:x": {}}), "settings of their own"),
    "act-order": ("gptq", shuffled, r"model\.layers\.1\.mlp\.up_proj: .*another order \(desc_act"),
    "groups": ("gptq", says("gptq", group_size=40), "groups of 40 do not divide 64"),
    "another size": ("gptq", says("gptq", group_size=16), r"has shape \[3, .*needs \[6, "),
    "missing": ("gptq", lambda f: without(f, "1.mlp.up_proj.scales"), r"lacks model\.layers\.1\.mlp\.up_proj\.scales"),
    "gemv": ("awq", says("awq", version="gemv"), "AWQ stored for 'gemv'"),
    "fp8": ("W8A8", is_in(compressed("float-quantized", 8, "channel")), "stored as 'float-quantized'"),
    "blocks": ("W8A8", is_in(compressed("int-quantized", 8, "block")), "scales for each 'block'"),
    "cache": ("W8A8", says("W8A8", kv_cache_scheme={"num_bits": 8}), "a kv_cache_scheme"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, spoil, message = REFUSED[case]
    checkpoint(tmp_path, CONFIGS[kind])
    spoil(tmp_path)
    with pytest.raises(EngineError, match=message):
        load_model(EngineArgs(model=str(tmp_path)), HostPlatform())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantization": "int4"}, "has quantised weights already; leave the option out"),
        ({"quantization": "awq"}, "is quantised with 'gptq'; leave the option out"),
        ({"quantization": "int5"}, "no quantization 'int5'; there are: awq, .*int4, int8"),
        ({"load_format": "dummy"}, "load_format 'dummy' reads no weights that are stored quantised"),
    ],
)
def test_options_that_contradict_the_checkpoint(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, CONFIGS["gptq"])
    with pytest.raises(ConfigError, match=says):
        load_model(EngineArgs(model=str(tmp_path), **options), HostPlatform())


def test_stored_options_of_plain_checkpoints(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is not quantised; use int8 or int4"):
        load_model(EngineArgs(model=str(tmp_path), quantization="gptq"), HostPlatform())


def test_a_platform_that_rounds_only_reads_no_stored_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rounds(LinearMethod):
        def pack(self, weight: Tensor, bias: Tensor | None) -> object:
            return weight

        def apply(self, x: Tensor, packed: object) -> Tensor:
            return x

    checkpoint(tmp_path, CONFIGS["gptq"])
    monkeypatch.setattr(HostPlatform, "linear", lambda self, scheme: Rounds() if scheme else None)
    with pytest.raises(UnsupportedCapability, match=r"Rounds.*rounds float weights only"):
        load_model(EngineArgs(model=str(tmp_path)), HostPlatform())


def test_models_of_which_nothing_can_be_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("engine.extensions.quantization.rounded._LEAST_OUTPUTS", 1 << 20)
    with pytest.raises(UnsupportedModelError, match="no linear layer that a probe saw; leave the option out"):
        load_model(EngineArgs(model=str(tmp_path), quantization="int4"), HostPlatform())


# Ranks: what a stored tensor keeps where the weight is cut; tests/test_parallel.py runs whole models.


def test_stored_tensors_are_cut_where_the_weight_is() -> None:
    def cuts(format: Any, dim: int, begin: int, end: int) -> dict[str, Any]:
        cut = Cut((64, 96), dim, ((begin, end),))
        found = format.tensors(64, 96, {})
        made = {name: _parameter(stored, cut, name) for name, stored in found.items()}
        return {name: (p.cut.dim, p.cut.spans[0], list(p.shape)) for name, p in made.items() if hasattr(p, "cut")}

    assert cuts(Gptq(4, 32, 1), 0, 8, 24) == {
        "qweight": (1, (8, 24), [12, 16]), "qzeros": (1, (1, 3), [3, 2]), "scales": (1, (8, 24), [3, 16]),
    }  # fmt: skip
    assert cuts(Awq(4, 32), 1, 32, 96) == {
        "qweight": (0, (32, 96), [64, 8]), "qzeros": (0, (1, 3), [2, 8]), "scales": (0, (1, 3), [2, 64]),
    }  # fmt: skip
    assert cuts(Packed(8, None), 1, 48, 96) == {"weight_packed": (1, (12, 24), [64, 12])}
    with pytest.raises(
        ConfigError, match=r"qzeros cannot be split at 4:24, since 8 of them.*another tensor_parallel_size"
    ):
        cuts(Gptq(4, 32, 1), 0, 4, 24)
    with pytest.raises(ConfigError, match=r"scales cannot be split|qzeros cannot be split"):
        cuts(Gptq(4, 32, 1), 1, 0, 48)


# What it costs.

PEAK = """
import re, sys
from pathlib import Path
import torch
from engine.config import EngineArgs
from engine_cpu import CpuPlatform
from engine.model.adapt import load_model

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

warm, folder = sys.argv[1:3]
load_model(EngineArgs(model=warm, quantization="int4"), CpuPlatform())
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kib("VmRSS")
model = load_model(EngineArgs(model=folder, quantization="int4"), CpuPlatform())
weights = sum(p.nbytes for p in model.model.parameters())
print((kib("VmHWM") - before) >> 10, (kib("VmRSS") - before) >> 10, weights >> 20)
"""


def test_peak_memory_is_the_quantised_weights_and_a_tensor(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "warm")
    sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 64}
    big = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=True, num_attention_heads=16, **sizes)
    whole = sum(p.nbytes for p in big.parameters()) >> 20
    big.save_pretrained(tmp_path / "big")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "warm"), str(tmp_path / "big")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, steady, weights = map(int, done.stdout.split())
    assert weights < 0.2 * whole
    assert steady < weights + 40
    # Beside them: the embedding, or gate and up, apart and joined, and some rows of rounding.
    assert peak < weights + 80 < 0.7 * whole, (peak, weights, whole)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
