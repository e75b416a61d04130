"""Transformers' models through paged attention, fused projections and the experts op, against eager Transformers."""

from __future__ import annotations

import atexit
import functools
import gc
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.models.llama import modeling_llama

from engine.config import EngineArgs
from engine.errors import UnsupportedModelError
from engine.interfaces import AttentionBatch, LinearMethod, QuantScheme
from engine.model import adapt, attention
from engine.model.adapt import AdaptedModel, load_model
from engine.model.attention import StepContext
from engine.model.probe import Visibility, recognise
from engine.plugins import get_hooks
from engine_conformance.tiny_models import tiny_model
from engine_mutation.host import HostPlatform

FOLDERS = tempfile.TemporaryDirectory(prefix="tiny-models-")
atexit.register(FOLDERS.cleanup)

BLOCK = 4
LENGTHS = (23, 9, 14)
CHUNKS = (
    [(0, 0, 7), (1, 0, 5)],  # (sequence, begin, end): chunks of two prompts
    [(1, 5, 6), (0, 7, 16), (2, 0, 11)],  # a decode beside a chunk and a whole prompt
    [(1, 6, 7), (2, 11, 12), (0, 16, 19)],
    [(0, 19, 20), (1, 7, 8), (2, 12, 13)],
    [(0, 20, 21), (1, 8, 9), (2, 13, 14)],
    [(0, 21, 23)],
)


class PackingMethod(LinearMethod):
    """Keeps weights transposed, so that a weight which was not packed cannot be mistaken for one that was."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> object:
        return weight.T.contiguous(), bias

    def apply(self, x: Tensor, packed: Any) -> Tensor:
        weight, bias = packed
        product: Tensor = x @ weight
        return product if bias is None else product + bias


class PackingPlatform(HostPlatform):
    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        return PackingMethod()


@functools.cache
def reference(name: str) -> PreTrainedModel:
    return tiny_model(name)


@functools.cache
def folder(name: str) -> Path:
    path = Path(FOLDERS.name) / name
    reference(name).save_pretrained(path)
    return path


def load(name: str, platform: HostPlatform | None = None, **options: Any) -> AdaptedModel:
    return load_model(EngineArgs(model=str(folder(name)), **options), platform or HostPlatform())


def sequences(model: AdaptedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, model.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


class Paged:
    """Caches for a model, and its logits for sequences that arrive in `CHUNKS`."""

    def __init__(self, model: AdaptedModel, num_blocks: int = 32) -> None:
        self.model = model
        self.backends = list(dict.fromkeys(layer.backend for layer in model.attention_layers.values()))
        for layer in model.attention_layers.values():
            if layer.shares_kv_with is None:
                layout = layer.backend.layout(BLOCK)
                garbage = torch.full((num_blocks * layout.block_bytes,), 255, dtype=torch.uint8)
                layer.bind(layout.bind(garbage, num_blocks), self.backends.index(layer.backend))

    def step(self, work: list[tuple[int, int, int]], tokens: list[list[int]]) -> list[Tensor]:
        tables = [[1 + i + 3 * j for j in range(8)] for i, _, _ in work]  # interleaved, block 0 unused
        ids = [tokens[i][p] for i, begin, end in work for p in range(begin, end)]
        positions = [p for _, begin, end in work for p in range(begin, end)]
        slots = [
            table[p // BLOCK] * BLOCK + p % BLOCK
            for (_, begin, end), table in zip(work, tables, strict=True)
            for p in range(begin, end)
        ]
        nums = [end - begin for _, begin, end in work]
        starts = torch.tensor([0, *nums]).cumsum(0).int()
        lens = torch.tensor([end for _, _, end in work], dtype=torch.int32)
        batch = AttentionBatch(
            query_start=starts,
            seq_lens=lens,
            block_table=torch.tensor(tables, dtype=torch.int32),
            slots=torch.tensor(slots),
            query_start_host=starts,
            seq_lens_host=lens,
            num_decodes=nums.count(1),
            max_query_len=max(nums),
            max_seq_len=int(lens.max()),
            block_size=BLOCK,
        )
        self.model.context.set_plans([backend.plan(batch) for backend in self.backends])
        logits = self.model.forward(torch.tensor(ids), torch.tensor(positions), torch.arange(len(ids)))
        return list(logits.split(nums))

    def run(self, tokens: list[list[int]]) -> list[Tensor]:
        out: list[list[Tensor]] = [[] for _ in tokens]
        for work in CHUNKS:
            for (i, _, _), logits in zip(work, self.step(work, tokens), strict=True):
                out[i].append(logits)
        return [torch.cat(parts) for parts in out]


def expected(name: str, tokens: list[list[int]]) -> list[Tensor]:
    with torch.no_grad():
        return [reference(name)(input_ids=torch.tensor([t]), use_cache=False).logits[0] for t in tokens]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), atol=1e-4, rtol=0)
        assert torch.equal(a.argmax(-1), b.argmax(-1))


INTERFACED = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "cohere2", "deepseek_v3", "llama4_text", "opt")
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "dbrx", "jetmoe")
INLINE = ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "openai-gpt", "rembert", "roformer", "xglm")
COUNTING = ("bart", "marian", "roberta", "xlm-roberta")
SEVERAL_CALLS = ("diffllama", "hrm_text")
SHARING = ("gemma4_text",)


@pytest.mark.parametrize("name", INTERFACED + EXPERTS + INLINE + COUNTING + SEVERAL_CALLS + SHARING)
def test_paged_logits_are_those_of_eager_transformers(name: str) -> None:
    model = load(name)
    tokens = sequences(model)
    assert_same(Paged(model).run(tokens), expected(name, tokens))


def test_positions_before_the_first_do_not_count() -> None:
    assert load("llama").max_model_len == 256
    assert load("roberta").max_model_len == 256 - 1 - reference("roberta").config.pad_token_id


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_a_platform_packs_weights(name: str) -> None:
    model = load(name, PackingPlatform())
    tokens = sequences(model)
    assert_same(Paged(model).run(tokens), expected(name, tokens))
    layer = model.model.get_submodule("model.layers.0.self_attn")
    assert layer.get_parameter("q_proj.weight").is_meta, "the core keeps no second copy"


def test_wanted_logits_only() -> None:
    model = load("gemma2")  # its softcap is part of the model's own post-processing
    ids, positions = torch.arange(5, 15), torch.arange(10)
    every = model.forward(ids, positions, torch.arange(10))
    torch.testing.assert_close(model.forward(ids, positions, torch.tensor([9, 2])), every[[9, 2]])
    assert model.forward(ids, positions, torch.empty(0, dtype=torch.int64)).shape == (0, model.vocab_size)


def test_models_that_do_not_take_an_index_are_sliced() -> None:
    model = load("openai-gpt")
    ids, positions = torch.arange(5, 15), torch.arange(10)
    every = model.forward(ids, positions, torch.arange(10))
    torch.testing.assert_close(model.forward(ids, positions, torch.tensor([9, 2])), every[[9, 2]])


def test_two_models_in_one_process() -> None:
    names = ("llama", "gemma2")
    paged = [Paged(load(name)) for name in names]
    tokens = sequences(paged[0].model)
    logits: list[list[list[Tensor]]] = [[[] for _ in tokens] for _ in names]
    for work in CHUNKS:
        for p, out in zip(paged, logits, strict=True):
            for (i, _, _), rows in zip(work, p.step(work, tokens), strict=True):
                out[i].append(rows)
    for name, out in zip(names, logits, strict=True):
        assert_same([torch.cat(rows) for rows in out], expected(name, tokens))


# What is attended to


@pytest.mark.parametrize(
    ("name", "layer", "fields"),
    [
        ("llama", 0, {"window": None, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "scale": 0.25}),
        ("gemma2", 0, {"window": 8, "softcap": 50.0}),
        ("gemma2", 1, {"window": None, "softcap": 50.0}),
        ("gpt_oss", 0, {"window": 8, "sinks": True}),
        ("llama4_text", 0, {"chunk": 8, "window": None}),
        ("bloom", 0, {"alibi": True}),
        ("gpt_neo", 1, {"window": 8, "scale": 1.0}),
        ("deepseek_v3", 0, {"head_dim": 24, "v_head_dim": 16, "num_kv_heads": 4}),
    ],
)
def test_specifications(name: str, layer: int, fields: dict[str, object]) -> None:
    spec = list(load(name).attention_layers.values())[layer].spec
    assert {field: getattr(spec, field) for field in fields} == fields


def test_layers_of_one_specification_share_a_backend() -> None:
    layers = load("gemma2").attention_layers.values()
    assert len({id(layer.backend) for layer in layers}) == len({layer.spec for layer in layers}) == 2


def test_layers_that_read_another_layers_cache() -> None:
    layers = load("gemma4_text").attention_layers
    owners = {name: layer.shares_kv_with for name, layer in layers.items() if layer.shares_kv_with}
    assert len(owners) == 2
    assert all(layers[owner].shares_kv_with is None for owner in owners.values() if owner)


def test_kv_cache_dtype() -> None:
    specs = [layer.spec for layer in load("llama", kv_cache_dtype="bfloat16").attention_layers.values()]
    assert {(spec.dtype, spec.kv_dtype) for spec in specs} == {(torch.float32, torch.bfloat16)}


@pytest.mark.parametrize(
    ("function", "size", "seen"),
    [
        (masking_utils.causal_mask_function, None, Visibility()),
        (masking_utils.bidirectional_mask_function, None, Visibility(causal=False)),
        (masking_utils.sliding_window_causal_mask_function(300), 300, Visibility(window=300)),
        (masking_utils.chunked_causal_mask_function(300, torch.zeros(1)), 300, Visibility(chunk=300)),
        (masking_utils.sliding_window_bidirectional_mask_function(300), 300, Visibility(window=301, causal=False)),
        (masking_utils.sliding_window_causal_mask_function(299), 300, None),
        (
            masking_utils.or_masks(
                masking_utils.causal_mask_function,
                masking_utils.blockwise_overlay(torch.empty(1, 7, device="meta")),
            ),
            None,
            Visibility(),
        ),
    ],
)
def test_masks_are_recognised_by_what_they_let_through(
    function: Any, size: int | None, seen: Visibility | None
) -> None:
    assert recognise(function, size) == seen


# What is refused


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "layers with a state"),
        ("qwen3_next", r"layers with a state \(linear_attention\)"),
        ("deepseek_v32", "passes indices to attention"),
        ("doge", "a mask or bias that is none of causal, sliding window and chunked"),
        ("xlnet", "tokens meet outside of attention"),
        ("blt", "attends to something else than the sequence's own tokens"),
    ],
)
def test_refusals_say_what_is_missing(name: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        load(name)


def mix_neighbours(self: Any, x: Tensor) -> Tensor:
    return F.silu(x + 0.5 * x.roll(1, dims=1))


def count_by_itself(self: Any, x: Tensor) -> Tensor:
    return x + 0.01 * torch.arange(x.shape[1], device=x.device)[:, None]


@pytest.mark.parametrize("mixing", [mix_neighbours, count_by_itself])
def test_tokens_that_meet_outside_of_attention_are_noticed(monkeypatch: pytest.MonkeyPatch, mixing: Any) -> None:
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", mixing)
    with pytest.raises(UnsupportedModelError, match="tokens meet outside of attention"):
        load("llama")


def test_a_plugin_adapts_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine would refuse is exchanged by a plugin's adapter, before the model is examined."""

    def adapter(model: nn.Module, context: StepContext) -> None:
        for module in model.modules():
            if isinstance(module, modeling_llama.LlamaMLP):
                setattr(module, "forward", functools.partial(right, module))  # noqa: B010 - mypy forbids the other form

    right = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", mix_neighbours)
    hooks = SimpleNamespace(
        engine_models=lambda: {"LlamaForCausalLM": adapter, "OtherForCausalLM": None},
        engine_load_formats=get_hooks().engine_load_formats,
        engine_swaps=get_hooks().engine_swaps,
    )
    monkeypatch.setattr(adapt, "get_hooks", lambda: hooks)
    model = load("llama")
    monkeypatch.undo()
    tokens = sequences(model)
    assert_same(Paged(model).run(tokens), expected("llama", tokens))


def test_unknown_arguments_of_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Any = modeling_llama.LlamaAttention.forward
    hotter = functools.partialmethod(forward, temperature=2.0)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", hotter)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.self_attn passes temperature to attention"):
        load("llama")


# Fused projections


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Matrix products by their number of rows of the weight."""
    counted: Counter[int] = Counter()
    linear = F.linear

    def count(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        counted[weight.shape[0]] += 1
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", count)
    return counted


def test_siblings_are_one_product(products: Counter[int]) -> None:
    model = load("llama")
    products.clear()
    model.forward(torch.arange(5), torch.arange(5), torch.tensor([4]))
    # q, k, v: 64 + 32 + 32 rows; gate, up: 96 + 96; o and down: 64; the head: 128
    assert products == {128: 4 + 1, 192: 4, 64: 8}


def test_latent_attention_is_fused_too(products: Counter[int]) -> None:
    model = load("deepseek_v3")
    products.clear()
    model.forward(torch.arange(5), torch.arange(5), torch.tensor([4]))
    assert products[32 + 16 + 8] == 4, "q_a and kv_a of each layer"


def test_members_keep_their_names_and_view_one_weight() -> None:
    model = load("llama").model
    wanted = reference("llama").state_dict()
    got = model.state_dict()
    assert list(got) == list(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    q, k = (model.get_parameter(f"model.layers.0.self_attn.{n}_proj.weight") for n in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_a_member_called_alone_computes_for_itself() -> None:
    attn: Any = load("llama").model.get_submodule("model.layers.0.self_attn")
    plain: Any = reference("llama").get_submodule("model.layers.0.self_attn")
    x, y = torch.randn(2, 1, 3, 64)
    for proj, data in (("q_proj", x), ("k_proj", y), ("q_proj", y), ("v_proj", y), ("v_proj", y)):
        torch.testing.assert_close(getattr(attn, proj)(data), getattr(plain, proj)(data))


def test_siblings_with_different_inputs_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x + 0))  # type: ignore[no-any-return]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    mlp: Any = load("llama").model.get_submodule("model.layers.0.mlp")
    assert type(mlp.gate_proj) is type(mlp.up_proj) is nn.Linear


def test_siblings_are_not_fused_when_their_input_changes_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(F.silu(gate) * self.up_proj(x.mul_(2)))  # type: ignore[no-any-return]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    mlp: Any = load("llama").model.get_submodule("model.layers.0.mlp")
    assert type(mlp.gate_proj) is nn.Linear


# The compiler


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral", "gpt2"])
def test_one_graph_serves_all_layers(name: str) -> None:
    model = load(name)
    tokens = sequences(model)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layers = next(m for m in model.model.modules() if isinstance(m, nn.ModuleList))
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=True)
    assert_same(Paged(model).run(tokens), expected(name, tokens))
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert targets.count("engine.attention") + targets.count("engine.attention.default") == 1


def test_the_op_is_well_formed() -> None:
    layer = next(iter(load("llama").attention_layers.values()))
    q, k = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    torch.library.opcheck(
        torch.ops.engine.attention.default,
        (q, k, k, layer.handle, None, None, torch.empty(3, 4, 16)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_layers_die_with_their_model() -> None:
    model = load("llama")
    number = int(next(iter(model.attention_layers.values())).handle)
    assert number in attention._layers
    del model
    gc.collect()
    assert number not in attention._layers
