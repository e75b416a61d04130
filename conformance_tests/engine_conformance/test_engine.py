"""L6: the engine end to end: what comes out depends on the request alone, and is what eager torch gives."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, RequestOutput, SamplingParams
from engine.config import DEMO_MODEL, EngineArgs
from engine.errors import UnsupportedCapability
from engine_conformance.architectures import TOLERANCE, compare, head_size, reference, small_block
from engine_conformance.reference import cached
from engine_conformance.tiny_models import tiny_model
from engine_sdk import Capabilities, Platform

Record = Callable[[str, object], None]

_TOKENS = list(range(3, 128))
"""All but padding, begin and end."""

_NEW = 10


@dataclass
class Subject:
    """A model on the platform.

    Attributes:
        model: in Transformers, eager, on the host.
        folder: where it is stored.
        options: for `LLM`.
        block_size: tokens in a block.
        prompts: of lengths around those of blocks; some begin alike.
    """

    model: Any
    folder: Path
    options: dict[str, Any]
    block_size: int
    prompts: list[list[int]]

    def llm(self, **options: Any) -> LLM:
        """An engine."""
        return LLM(str(self.folder), **{**self.options, **options})


def make(name: str, platform: Platform, declared: Capabilities, folder: Path) -> Subject:
    """Build a model that the platform's domains allow, and prompts for it."""
    size = small_block(declared)
    model = tiny_model(name, **head_size(name, declared))
    model.save_pretrained(folder)
    draw = random.Random(name)
    lengths = (1, size - 1, size, size + 1, 40, 7, 19, 33) if size <= 32 else (1, size - 1, size, size + 1, 40, 7)
    prompts = [[draw.choice(_TOKENS) for _ in range(max(1, n))] for n in lengths]
    long = max(prompts, key=len)
    prompts += [[*long[: len(long) - 2], 5, 6, 7], [*long, 9]]
    options = {
        "platform": platform.name,
        "device_index": platform.device_index,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": max(len(p) for p in prompts) + 2 * _NEW,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "block_size": size,
        "num_blocks": 512 if size <= 32 else 64,
    }
    return Subject(model, folder, options, size, prompts)


@pytest.fixture(scope="module")
def subject(
    conformance_platform: Platform, capabilities: Capabilities, tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    """A dense model with full attention."""
    return make("qwen3", conformance_platform, capabilities, tmp_path_factory.mktemp("qwen3"))


GREEDY = SamplingParams(temperature=0, max_tokens=_NEW, ignore_eos=True, allowed_token_ids=_TOKENS)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    """What was generated."""
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def alone(subject: Subject) -> list[list[int]]:
    """What each prompt gives when it runs alone, whole, and with nothing cached; right by the eager model."""
    llm = subject.llm(max_num_seqs=1, max_num_batched_tokens=256, enable_prefix_caching=False, async_scheduling=False)
    params = copy.copy(GREEDY)
    params.logprobs = -1
    outputs = [llm.generate(prompt, params)[0] for prompt in subject.prompts]
    for output in outputs:
        detail, _ = compare(subject.model, output, TOLERANCE)
        assert not detail, detail
    return tokens(outputs)


def likely(subject: Subject, output: RequestOutput) -> bool:
    """Whether each token is as likely as the best one by the eager model, but for a tie."""
    expected = reference(subject.model, output)[:, _TOKENS]
    chosen = [_TOKENS.index(token) for token in output.outputs[0].token_ids]
    return bool((expected.max(1).values - expected[range(len(chosen)), chosen] < TOLERANCE).all())


def same(subject: Subject, declared: Capabilities, outputs: list[RequestOutput], want: list[list[int]]) -> None:
    """Assert the same tokens; where a batch may change bits, a tie may fall the other way."""
    for output, expected in zip(outputs, want, strict=True):
        if list(output.outputs[0].token_ids) != expected:
            assert not declared.batch_invariant, "a tie fell another way, and batch_invariant is declared"
            assert likely(subject, output), (
                f"{output.prompt_token_ids}: {output.outputs[0].token_ids}, alone {expected}"
            )


def test_greedy(alone: list[list[int]]) -> None:
    """One prompt at a time: tokens and all log probabilities of the eager model."""
    assert all(len(ids) == _NEW for ids in alone)


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": False},
        {"async_scheduling": True},
        {"max_num_batched_tokens": 5},
        {"max_num_batched_tokens": 512, "max_num_seqs": 16},
        {"enable_prefix_caching": False},
        {},
    ],
    ids=["waiting", "overlapping", "small_chunks", "all_at_once", "nothing_cached", "defaults"],
)
def test_output_depends_on_the_prompt(
    subject: Subject, capabilities: Capabilities, alone: list[list[int]], options: dict[str, Any]
) -> None:
    """Not on what runs beside it, how it is cut into chunks, what is cached, and when steps are scheduled."""
    llm = subject.llm(**options)
    order = list(range(len(subject.prompts)))
    for shuffle in (0, 1):
        if shuffle:
            random.Random(1).shuffle(order)
        outputs = llm.generate([subject.prompts[i] for i in order], GREEDY)
        same(subject, capabilities, outputs, [alone[i] for i in order])


def test_prefix_hits(subject: Subject, capabilities: Capabilities, alone: list[list[int]]) -> None:
    """Full blocks that begin alike come from the cache, as many as there are, and give what computing them gives."""
    llm, size = subject.llm(), subject.block_size
    for prompt, want in zip(subject.prompts, alone, strict=True):
        llm.reset_prefix_cache()
        (first,) = llm.generate(prompt, GREEDY)
        (again,) = llm.generate(prompt, GREEDY)
        assert first.num_cached_tokens == 0
        assert again.num_cached_tokens == (len(prompt) - 1) // size * size
        same(subject, capabilities, [first, again], [want, want])
    long = max(range(len(subject.prompts)), key=lambda i: len(subject.prompts[i]))
    llm.reset_prefix_cache()
    llm.generate(subject.prompts[long], GREEDY)
    for cut in (1, size - 1, size, size + 1):
        branch = [*subject.prompts[long][:cut], 4, 8, 15]
        (output,) = llm.generate(branch, GREEDY)
        assert output.num_cached_tokens == cut // size * size
        assert likely(subject, output)


SAMPLED: dict[str, Any] = {
    "temperature": 1.2,
    "max_tokens": _NEW,
    "ignore_eos": True,
    "top_k": 30,
    "top_p": 0.95,
}


def mixed_params(count: int) -> list[SamplingParams]:
    """Parameters of every kind: what the sampler keeps for a request must go with it."""
    kinds: list[dict[str, Any]] = [
        {},
        {"top_k": 0, "top_p": 1.0},
        {"presence_penalty": 1.5, "frequency_penalty": 0.8},
        {"repetition_penalty": 1.6},
        {"min_p": 0.1, "logit_bias": {7: 4.0, 9: -100.0}},
        {"allowed_token_ids": list(range(20, 60))},
        {"temperature": 0, "frequency_penalty": 1.9},
    ]
    return [SamplingParams(**{**SAMPLED, **kinds[i % len(kinds)], "seed": 100 + i}) for i in range(count)]


def test_samples_depend_on_seed_and_prompt(subject: Subject) -> None:
    """A seeded request gives the same tokens alone, beside others, and in another order; another seed gives others."""
    params = mixed_params(len(subject.prompts))
    llm = subject.llm()
    together = tokens(llm.generate(subject.prompts, params))
    assert tokens(llm.generate(subject.prompts, params)) == together
    backwards = llm.generate(subject.prompts[::-1], params[::-1])
    assert tokens(backwards)[::-1] == together
    single = subject.llm(max_num_seqs=1, enable_prefix_caching=False)
    assert [tokens(single.generate(p, q))[0] for p, q in zip(subject.prompts, params, strict=True)] == together
    same_prompt = tokens(llm.generate([subject.prompts[4]] * 6, [SamplingParams(**SAMPLED, seed=i) for i in range(6)]))
    assert len({tuple(ids) for ids in same_prompt}) > 1, "every seed gives the same tokens"
    flat = SamplingParams(temperature=1e6, seed=1, max_tokens=8, ignore_eos=True)  # every token is as likely
    drawn = tokens(llm.generate(subject.prompts[4], flat))[0]
    assert len(set(drawn)) > 2, "every position draws with the same number"


def test_preemption(subject: Subject, capabilities: Capabilities) -> None:
    """Sequences that lose their blocks and are computed again give what they give with room to spare: greedy ones,
    and samples with penalties, seeds and least lengths."""
    size = subject.block_size
    draw = random.Random(5)
    crowd = [
        [draw.choice(_TOKENS) for _ in range(max(1, size - 1 - i % 4))] for i in range(8)
    ]  # all need a second block
    more = [[draw.choice(_TOKENS) for _ in range(n)] for n in (2, 3, 5, 6)]
    prompts = [*crowd, *more]
    params = mixed_params(len(prompts))
    for i, each in enumerate(params):
        each.max_tokens = 14
        if i % 3 == 0:
            each.min_tokens, each.ignore_eos, each.stop_token_ids = 9, False, list(range(3, 128, 2))
    tight = {"max_num_seqs": 16, "max_num_batched_tokens": max(16, size // 4), "enable_prefix_caching": False}
    roomy = subject.llm(**{**tight, "num_blocks": 512 if size <= 32 else 64})
    want = [(list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in roomy.generate(prompts, params)]
    preemptions = 0
    for spare in range(6):
        for overlap in (False, True):
            llm = subject.llm(**tight, num_blocks=roomy.info.min_blocks + spare, async_scheduling=overlap)
            outputs = llm.generate(prompts, params)
            got = [(list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs]
            assert got == want, f"{roomy.info.min_blocks + spare} blocks"
            preemptions += sum(o.metrics.num_preemptions for o in outputs if o.metrics)
        if preemptions and spare >= 1:
            break
    assert preemptions, "nothing was preempted: the case decides nothing"


def test_log_probabilities(subject: Subject) -> None:
    """Of prompts and outputs, computed in chunks beside others, are the eager model's."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=3, logprobs=3)
    for output in subject.llm(max_num_batched_tokens=9).generate(subject.prompts, params):
        ids = output.prompt_token_ids + output.outputs[0].token_ids
        with torch.no_grad():
            exact = subject.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        given = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
        assert len(given) == len(ids)
        assert given[0] is None
        for at, entry in enumerate(given[1:]):
            assert entry is not None
            assert entry[ids[at + 1]].logprob == pytest.approx(float(exact[at, ids[at + 1]]), abs=TOLERANCE)
            for token, found in entry.items():
                assert found.logprob == pytest.approx(float(exact[at, token]), abs=TOLERANCE)
            best = sorted((found.logprob for found in entry.values()), reverse=True)[:3]
            assert best == pytest.approx(exact[at].topk(3).values.tolist(), abs=TOLERANCE)


def test_ends(subject: Subject, alone: list[list[int]]) -> None:
    """Stop tokens, least and most lengths, and the model's limit, each beside requests that go on."""
    llm, want = subject.llm(), alone[4]
    stop, limit = want[3], subject.options["max_model_len"]
    common: dict[str, Any] = {"temperature": 0, "allowed_token_ids": _TOKENS, "ignore_eos": True}
    params = [
        SamplingParams(**common, max_tokens=_NEW, stop_token_ids=[stop]),
        SamplingParams(**common, max_tokens=2),
        SamplingParams(**common, max_tokens=None),
        SamplingParams(**common, max_tokens=_NEW, stop_token_ids=[stop], min_tokens=6),
        GREEDY,
    ]
    outputs = [o.outputs[0] for o in llm.generate([subject.prompts[4]] * len(params), params)]
    cut = want.index(stop) + 1
    assert (outputs[0].token_ids, outputs[0].finish_reason, outputs[0].stop_reason) == (want[:cut], "stop", stop)
    assert (outputs[1].token_ids, outputs[1].finish_reason) == (want[:2], "length")
    assert outputs[2].finish_reason == "length"
    assert len(outputs[2].token_ids) == limit - len(subject.prompts[4])
    assert len(outputs[3].token_ids) >= 6
    assert stop not in outputs[3].token_ids[:6]
    assert outputs[4].token_ids == want


@pytest.mark.conformance(capability="sliding_window")
def test_sliding_windows(
    conformance_platform: Platform,
    capabilities: Capabilities,
    tmp_path: Path,
    record_property: Record,
) -> None:
    """A model of sliding and full layers: blocks behind the window are given up and used by others."""
    if "sliding_window" not in capabilities.attention:
        record_property("rejected", "sliding_window")
        return
    subject = make("gemma3_text", conformance_platform, capabilities, tmp_path)
    params = copy.copy(GREEDY)
    params.logprobs = -1
    roomy = subject.llm()
    tight = subject.llm(num_blocks=roomy.info.min_blocks + 3, max_num_seqs=8)
    for llm in (roomy, roomy, tight):
        for output in llm.generate(subject.prompts, params):
            detail, _ = compare(subject.model, output, TOLERANCE)
            assert not detail, detail


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_demo_model(
    conformance_platform: Platform, capabilities: Capabilities, dtype: str, record_property: Record
) -> None:
    """With every option left to the platform but how much memory, which others may need while they test beside this
    one, the model that ships with the engine gives what Transformers gives."""
    from transformers import AutoModelForCausalLM

    chosen: torch.dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"platform": conformance_platform.name, "dtype": dtype, "kv_cache_memory_bytes": 1 << 28}
    if chosen not in capabilities.dtypes & capabilities.kv_dtypes or 64 not in capabilities.head_dims:
        with pytest.raises((UnsupportedCapability, ValueError)):
            LLM(**options)
        return
    preferred = conformance_platform.configure(asdict(EngineArgs())).defaults.get("block_size", 16)
    if preferred not in capabilities.block_sizes:  # then users have to choose one, too
        options["block_size"] = small_block(capabilities)
    llm = LLM(**options)
    assert llm.info.device.startswith(conformance_platform.device_type), f"the model is on {llm.info.device}"
    prompts = ["def fibonacci(n):", "class Stack:\n    def push(self, item):\n"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, logprobs=-1, ignore_eos=True))
    eager = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=chosen, attn_implementation="eager").eval()
    exact = copy.deepcopy(eager).float()
    for output in outputs:
        ours = output.outputs[0].logprobs
        assert ours is not None
        want, rounded = reference(exact, output), reference(eager, output)
        got = torch.tensor([[entry[j].logprob for j in range(want.shape[1])] for entry in ours])
        worst, allowed = float((got - want).abs().max()), 2 * float((rounded - want).abs().max()) + 1e-3
        record_property("error over bound: demo model", worst / allowed)
        assert worst <= allowed, f"log probabilities differ by {worst:.3g}; eager Transformers' by {allowed / 2:.3g}"
        behind = want.max(1).values - want[range(len(ours)), output.outputs[0].token_ids]
        assert (behind <= allowed).all(), "a token is not the likeliest"


@pytest.mark.conformance(capability="fp8_cache")
@pytest.mark.parametrize("option", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_cache(subject: Subject, capabilities: Capabilities, option: str, record_property: Record) -> None:
    """With a cache of 8 bits, what comes out is the eager model's whose keys and values are rounded, however the
    prompts are batched, cut, found in the cache or short of blocks; as many tokens need about half the memory."""
    kinds = {option.replace("fp8", "torch.float8") + end for end in ("", "fn", "fnuz")}
    flavours = sorted((dtype for dtype in capabilities.kv_dtypes if str(dtype) in kinds), key=str)
    if not flavours:
        with pytest.raises(UnsupportedCapability):
            subject.llm(kv_cache_dtype=option)
        record_property("rejected", option)
        return
    params = copy.copy(GREEDY)
    params.logprobs = -1
    roomy = subject.llm(kv_cache_dtype=option)
    tight: dict[str, Any] = {"num_blocks": roomy.info.min_blocks + 1, "max_num_batched_tokens": 7}
    assert roomy.info.kv_bytes < 0.75 * subject.llm(kv_cache_dtype="float32").info.kv_bytes / 2
    outputs = [*roomy.generate(subject.prompts, params), *roomy.generate(subject.prompts[::-1], params)]
    outputs += subject.llm(kv_cache_dtype=option, **tight).generate(subject.prompts, params)
    assert any(output.num_cached_tokens for output in outputs)
    errors, changes = [], []
    for output in outputs:
        ours = output.outputs[0].logprobs
        assert ours is not None
        exact, rounded = reference(subject.model, output), rounding(subject.model, output, flavours[0])
        got = torch.tensor([[entry[j].logprob for j in range(exact.shape[1])] for entry in ours])
        errors.append((got - rounded).abs())
        changes.append((rounded - exact).abs())
        behind = rounded[:, _TOKENS].max(1).values - rounded[range(len(ours)), output.outputs[0].token_ids]
        assert behind.max() <= errors[-1].max() * 2 + TOLERANCE, "a token is not the likeliest"
    # Where a key lies between two numbers of 8 bits, the last bit of its sum decides: most agree, and not every one.
    error, change = (float(torch.cat(x).mean()) for x in (errors, changes))
    assert error <= 0.1 * change + TOLERANCE, f"log probabilities differ by {error:.2g}; rounding changes {change:.2g}"


@torch.no_grad()
def rounding(model: Any, output: RequestOutput, dtype: torch.dtype) -> torch.Tensor:
    """`reference` of a model whose keys and values pass through a cache of `dtype`."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = (cached(x, dtype).to(x.dtype) for x in (key_states, value_states))
            return super().update(keys, values, layer_idx, *args, **kwargs)

    ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids])
    logits = model(input_ids=ids, past_key_values=Rounding(), use_cache=True).logits[0]
    return logits[len(output.prompt_token_ids) - 1 : -1].float().log_softmax(-1)  # type: ignore[no-any-return]


def test_several_engines(subject: Subject, alone: list[list[int]], capabilities: Capabilities) -> None:
    """One after another, and two at a time, in one process: each has its cache, and memory comes back."""
    first = subject.llm()
    second = subject.llm(max_num_batched_tokens=7)
    for llm in (first, second, first):
        same(subject, capabilities, llm.generate(subject.prompts, GREEDY), alone)
    del first, second
    for _ in range(2):
        same(subject, capabilities, subject.llm().generate(subject.prompts[:3], GREEDY), alone[:3])


def test_requests_that_are_cut_short(subject: Subject, alone: list[list[int]], capabilities: Capabilities) -> None:
    """A request that is given up in the middle leaves nothing behind that shows."""
    llm = subject.llm()
    for count, prompt in ((1, subject.prompts[4]), (3, subject.prompts[1]), (2, subject.prompts[-1])):
        stream = llm.stream(prompt, SamplingParams(temperature=1.0, seed=3, max_tokens=_NEW, ignore_eos=True))
        for _ in range(count):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        same(subject, capabilities, llm.generate(subject.prompts, GREEDY), alone)
