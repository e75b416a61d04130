"""The engine end to end on the host: greedy output against Transformers, and nothing else that changes it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import LLM, RequestOutput, SamplingParams
from engine.errors import ConfigError, EngineDeadError, RequestError
from engine.extensions.serving import AsyncLLM
from engine_conformance.architectures import check_architecture, compare
from engine_conformance.tiny_models import tiny_model

GREEDY = SamplingParams(
    temperature=0, max_tokens=12, ignore_eos=True, logprobs=-1, allowed_token_ids=list(range(3, 128))
)


OPTIONS: dict[str, Any] = {
    "platform": "cpu",
    "skip_tokenizer_init": True,
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "block_size": 4,
    "num_blocks": 256,
}


def small(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma2")  # full and sliding layers, soft-capped scores and logits
    tiny_model("gemma2").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 128) for _ in range(n)] for n in (1, 40, 7, 19, 3, 33, 12, 26)]
    return [*prompts, [*prompts[1][:30], 5, 6, 7]]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """One prompt at a time, each checked against Transformers."""
    llm = small(folder, max_num_seqs=1, enable_prefix_caching=False)
    model = tiny_model("gemma2")
    outputs = [llm.generate(p, GREEDY)[0] for p in prompts]
    for output in outputs:
        detail, _ = compare(model, output, 1e-4)
        assert not detail, detail
    return tokens(outputs)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 5},
        {"max_num_seqs": 9, "max_num_batched_tokens": 512},
        {"enable_prefix_caching": False},
        {"block_size": 16},
        {"scheduling_policy": "priority"},
    ],
)
def test_output_depends_on_the_prompt_only(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], overlap: bool, options: dict[str, Any]
) -> None:
    llm = small(folder, async_scheduling=overlap, **options)
    assert tokens(llm.generate(prompts, GREEDY)) == expected
    again = llm.generate(prompts, GREEDY)
    assert tokens(again) == expected
    cached = sum(o.num_cached_tokens for o in again)
    assert (cached > 0) == (options.get("enable_prefix_caching", True))


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_changes_nothing(
    folder: Path, prompts: list[list[int]], expected: list[list[int]], overlap: bool
) -> None:
    crowd = {"max_num_seqs": 16, "max_num_batched_tokens": 8, "async_scheduling": overlap}
    llm = small(folder, **crowd, num_blocks=small(folder, **crowd).info.min_blocks)
    outputs = llm.generate(prompts, GREEDY)
    assert tokens(outputs) == expected
    assert sum(o.metrics.num_preemptions for o in outputs if o.metrics) > 0


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_samples_depend_on_seed_and_position_only(folder: Path, prompts: list[list[int]], data: st.DataObject) -> None:
    llm = small(folder, max_num_batched_tokens=data.draw(st.integers(4, 64)), async_scheduling=data.draw(st.booleans()))
    params = [
        SamplingParams(
            temperature=1.3,
            top_k=data.draw(st.sampled_from([0, 5])),
            top_p=data.draw(st.sampled_from([1.0, 0.8])),
            presence_penalty=data.draw(st.sampled_from([0.0, 0.7])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.4])),
            seed=i,
            max_tokens=8,
        )
        for i in range(len(prompts))
    ]
    together = tokens(llm.generate(prompts, params))
    order = data.draw(st.permutations(range(len(prompts))))[:4]
    for i in order:
        assert tokens(llm.generate(prompts[i], params[i])) == [together[i]]


def test_prompt_logprobs_equal_the_reference(folder: Path, prompts: list[list[int]]) -> None:
    llm = small(folder, max_num_batched_tokens=8)
    model = tiny_model("gemma2")
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    for output in llm.generate(prompts, params):
        ids = output.prompt_token_ids
        with torch.no_grad():
            reference = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(ids)
        assert output.prompt_logprobs[0] is None
        for i, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            assert entry[ids[i + 1]].logprob == pytest.approx(reference[i, ids[i + 1]].item(), abs=1e-4)
            best = reference[i].topk(3).indices.tolist()
            assert set(best) <= set(entry)


def test_stop_tokens_and_lengths(folder: Path, expected: list[list[int]], prompts: list[list[int]]) -> None:
    llm = small(folder)
    want = expected[1]
    stop = want[4]
    cut = want.index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop], ignore_eos=True)
    (output,) = llm.generate(prompts[1], params)
    assert output.outputs[0].token_ids == want[: cut + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    (output,) = llm.generate(prompts[1], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 96 - len(prompts[1])
    assert output.outputs[0].finish_reason == "length"


def test_several_completions_of_a_prompt(folder: Path, prompts: list[list[int]]) -> None:
    llm = small(folder)
    params = SamplingParams(n=3, temperature=1.5, seed=7, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate(prompts[1], params)
    alone = [
        llm.generate(prompts[1], SamplingParams(temperature=1.5, seed=7 + i, max_tokens=6, ignore_eos=True))[0]
        for i in range(3)
    ]
    assert [c.token_ids for c in output.outputs] == tokens(alone)
    assert [c.index for c in output.outputs] == [0, 1, 2]


def test_a_logits_processor_sees_the_tokens_so_far(folder: Path, prompts: list[list[int]]) -> None:
    seen: list[list[int]] = []

    def count_up(generated: Any, logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(generated))
        return torch.full_like(logits, -1.0).index_fill(0, torch.tensor([10 + len(generated)]), 5.0)

    for overlap in (False, True):
        seen.clear()
        params = SamplingParams(temperature=0, max_tokens=5, logits_processors=[count_up], ignore_eos=True)
        outputs = small(folder, async_scheduling=overlap).generate([prompts[0], prompts[1]], [params, GREEDY])
        assert outputs[0].outputs[0].token_ids == [10, 11, 12, 13, 14]
        assert seen == [list(range(10, 10 + i)) for i in range(5)]


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([], {}, "empty"),
        ([1, 128], {}, "128 is out of the model's vocabulary of 128"),
        ([-1], {}, "-1 is out"),
        (list(range(3, 100)), {}, "97 tokens and max_model_len is 96"),
        ("text", {}, "no tokenizer"),
        ({"promt": [1]}, {}, "prompt_token_ids"),
        ([1], {"stop_token_ids": [500]}, "500"),
        ([1], {"logit_bias": {200: 1.0}}, "200"),
    ],
)
def test_bad_requests_name_what_is_wrong(folder: Path, prompt: Any, params: dict[str, Any], says: str) -> None:
    llm = small(folder)
    with pytest.raises(RequestError, match=says):
        llm.generate([[5], prompt], SamplingParams(**params))
    assert len(llm.generate([[5]], SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_modle_len": 5}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"dtype": "float8"}, "float8"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"num_blocks": 3}, "num_blocks"),
        ({"max_model_len": 10**6}, "max_model_len"),
    ],
)
def test_bad_options_name_the_option(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        small(folder, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_low_precision_is_as_exact_as_transformers(name: str, dtype: torch.dtype) -> None:
    outcome = check_architecture(name, "cpu", dtype)
    assert outcome.status == "right", outcome


async def collect(llm: AsyncLLM, prompt: list[int], params: SamplingParams, request_id: str) -> RequestOutput:
    last = None
    async for output in llm.generate(prompt, params, request_id):
        last = output
    assert last is not None
    return last


def test_async_requests_run_together_and_can_be_aborted(
    folder: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    async def main() -> None:
        async with AsyncLLM(str(folder), **OPTIONS) as llm:
            running = [collect(llm, p, GREEDY, str(i)) for i, p in enumerate(prompts)]
            left = llm.generate(prompts[1], SamplingParams(max_tokens=None, ignore_eos=True), "left")
            async for _ in left:
                break
            await left.aclose()
            assert tokens(list(await asyncio.gather(*running))) == expected
            with pytest.raises(RequestError, match="vocabulary"):
                await collect(llm, [500], GREEDY, "bad")
            with pytest.raises(RequestError, match="logits_processors"):
                await collect(llm, [5], SamplingParams(logits_processors=[lambda ids, x: x]), "bad")
            assert tokens([await collect(llm, prompts[3], GREEDY, "after")]) == [expected[3]]

    asyncio.run(main())


def test_a_killed_core_ends_requests_with_an_error(folder: Path, prompts: list[list[int]]) -> None:
    async def main() -> None:
        llm = AsyncLLM(str(folder), **OPTIONS)
        await llm.start()
        stream = llm.generate(prompts[1], SamplingParams(max_tokens=None, ignore_eos=True))
        await anext(stream)
        os.kill(llm._child.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="signal 9"):
            async for _ in stream:
                pass
        assert llm.errored
        with pytest.raises(EngineDeadError):
            await collect(llm, prompts[0], GREEDY, "later")
        await llm.shutdown()

    asyncio.run(main())


def test_a_core_that_cannot_load_says_why(tmp_path: Path) -> None:
    async def main() -> None:
        llm = AsyncLLM(str(tmp_path / "nowhere"), **OPTIONS)
        with pytest.raises(Exception, match="nowhere"):
            await llm.start()
        await llm.shutdown()

    asyncio.run(main())
