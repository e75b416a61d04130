"""The sampler against a slow, obvious reference in fp64, and its promise that nothing but seed and position matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import RequestError
from engine.philox import philox, uniform
from engine.request import CoreRequest, SamplingParams
from engine.sampler import Sampled, Sampler
from engine.staging import Staged, Staging
from engine_sdk import REFERENCE_OPS, DrawInputs
from engine_sdk.device import TorchDevice
from engine_sdk.sampling import draw_on_device, draw_on_host

DEVICE = TorchDevice("cpu")
Floats = NDArray[np.float64]


class CountingStaging(Staging):
    """Counts what is staged, to check `Sampler.nbytes`."""

    staged = 0

    def add(self, array: NDArray[Any]) -> Staged:
        self.staged += array.nbytes
        return super().add(array)


def request(prompt: Sequence[int] = (0,), eos: tuple[int, ...] = (), bad: Any = (), **params: Any) -> CoreRequest:
    params.setdefault("seed", 0)
    return CoreRequest("r", list(prompt), SamplingParams(**params), eos_token_ids=eos, bad_token_ids=list(bad))


def sample(sampler: Sampler, logits: Tensor, rows: list[int], positions: list[int]) -> Sampled:
    staging = CountingStaging(DEVICE, 4096)
    bound = sampler.nbytes(len(rows))
    staging.begin(bound)
    plan = sampler.plan(rows, positions, staging)
    assert staging.staged <= bound
    staging.upload()
    before = logits.clone()
    sampled = sampler.sample(logits, plan)
    assert torch.equal(logits, before) or logits.isnan().any()
    return sampled


def one(logits: Sequence[float] | Tensor, req: CoreRequest, output: Sequence[int] = ()) -> int:
    """The next token of one sequence on a fresh sampler."""
    x = torch.as_tensor(logits, dtype=torch.float32)[None]
    sampler = Sampler(x.shape[1], 1, torch.device("cpu"), REFERENCE_OPS)
    tokens = [*req.prompt_token_ids, *output]
    sampler.admit(0, req, tokens)
    return int(sample(sampler, x, [0], [len(tokens)]).token_ids[0])


# ------------------------------------------------------------------------------------------ the reference


def edited(logits: Floats, req: CoreRequest, output: Sequence[int]) -> Floats:
    """Everything before the temperature, token by token."""
    x, p = logits.copy(), req.params
    for v in range(len(x)):
        if p.allowed_token_ids is not None and v not in p.allowed_token_ids:
            x[v] = -math.inf
        for ids in req.bad_token_ids:
            before = ids[:-1]
            if ids[-1] == v and list(output[len(output) - len(before) :]) == before and len(output) >= len(before):
                x[v] = -math.inf
        if len(output) < p.min_tokens and v in {*req.eos_token_ids, *(p.stop_token_ids or [])}:
            x[v] = -math.inf
        x[v] += (p.logit_bias or {}).get(v, 0)
    for processor in p.logits_processors or []:
        x = processor(output, torch.from_numpy(x)).numpy()
    for v in range(len(x)):
        if v in output or v in req.prompt_token_ids:
            x[v] = x[v] / p.repetition_penalty if x[v] > 0 else x[v] * p.repetition_penalty
        count = list(output).count(v)
        x[v] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    return x


class KnifeEdge(Exception):  # noqa: N818
    """Rounding decides whether a filter keeps a token, so there is nothing to compare."""


def probabilities(x: Floats, temperature: float, min_p: float, top_k: int, top_p: float, *, ties: bool) -> Floats:
    """After all filters; with `ties`, tokens as likely as the last one kept stay too."""
    p = np.exp((x - x.max()) / temperature)
    sharp = min_p in (0, 1) or bool((np.abs(p - min_p) > 1e-6).all())
    p[p < min_p] = 0
    order = np.argsort(-x, kind="stable")
    keep = order[:top_k]
    p[~np.isin(np.arange(len(x)), keep) & ~(ties & (x == x[keep[-1]]))] = 0
    p /= p.sum()
    mass, kept = 0.0, list[int]()
    for v in order:
        sharp &= top_p == 1 or abs(mass - top_p) > 1e-6
        if kept and mass >= top_p:
            break
        kept.append(v)
        mass += p[v]
    p[~np.isin(np.arange(len(x)), kept) & ~(ties & (x == x[kept[-1]]))] = 0
    if not sharp:
        raise KnifeEdge
    result: Floats = p / p.sum()
    return result


def g_test(tokens: NDArray[np.int64], p: Floats) -> float:
    """The probability of a fit as bad as this one."""
    observed, expected = np.bincount(tokens, minlength=len(p)), p * len(tokens)
    assert (observed[p == 0] == 0).all()
    some = observed > 0
    g = 2 * float((observed[some] * np.log(observed[some] / expected[some])).sum())
    df = int((p > 0).sum()) - 1
    return float(torch.special.gammaincc(torch.tensor(df / 2).double(), torch.tensor(max(g, 0) / 2).double()))


# ------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, kat_vectors: philox4x32 10
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None])
    assert words[:, 0].tolist() == list(expected)


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    many = np.arange(200_000)
    for seeds, positions in ((many, many * 0 + 7), (many * 0 + 2**40, many)):
        units = uniform(seeds.astype(np.uint64), positions)
        assert 0 <= units.min() < units.max() < 2**31
        assert g_test(units >> (31 - 8), np.full(256, 1 / 256)) > 1e-6


# ------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.8, "temperature": 1.7},
        {"top_k": 1100, "min_p": 0.0011, "top_p": 0.95},
        {"top_k": 5000},
    ],
)
def test_samples_follow_the_distribution(params: dict[str, Any]) -> None:
    vocab, rows, steps = 1200 if params.get("top_k", 0) > 1024 else 60, 500, 40
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 2
    p = {"temperature": 1.0, "min_p": 0.0, "top_p": 1.0, "top_k": 0, **params}
    top_k = min(int(p["top_k"]) or vocab, vocab)
    expected = probabilities(logits.double().numpy(), p["temperature"], p["min_p"], top_k, p["top_p"], ties=False)
    sampler = Sampler(vocab, rows, torch.device("cpu"), REFERENCE_OPS)
    for row in range(rows):
        sampler.admit(row, request(seed=row, **params), [0])
    batch = logits.expand(rows, -1).contiguous()
    tokens = [sample(sampler, batch, list(range(rows)), [step] * rows).token_ids for step in range(1, steps + 1)]
    assert g_test(torch.cat(tokens).numpy(), expected) > 1e-6


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_accelerator_that_is_asked_nothing_draws_what_a_host_draws(
    data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    """The reference has two ways, of which the conformance suite sees the one that the platform's device takes."""
    vocab, num_rows = data.draw(st.sampled_from([1, 2, 17, 511, 1024, 3000])), data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, vocab, generator=generator) * 3).to(dtype)
    logits[0, ::2], logits[-1] = math.nan, -math.inf

    def some(*choices: int) -> Tensor:
        return torch.tensor(choices)[torch.randint(len(choices), (num_rows,), generator=generator)]

    top_k = some(1, 2, 20, 900, vocab).clamp(max=vocab)
    top_p, cut = some(DrawInputs.ONE, DrawInputs.ONE // 2, 1), some(DrawInputs.LAST, 3 * DrawInputs.LEVELS, 0)
    u = torch.randint(DrawInputs.ONE, (num_rows,), generator=generator)
    scale = torch.rand(num_rows, generator=generator).pow(8) * 3 * DrawInputs.LEVELS + 1e-3  # some are hot
    max_top_k = int(top_k.masked_fill(top_k == vocab, 0).max())
    inputs = DrawInputs(top_k, top_p, cut, u, scale, max_top_k * (max_top_k > 1), any_top_p=True, any_min_p=True)
    assert draw_on_device(logits, inputs).tolist() == draw_on_host(logits, inputs).tolist()


# ------------------------------------------------------------------------------------------ what comes before

BIAS = st.none() | st.dictionaries(st.integers(0, 8), st.sampled_from([-2.25, 1.5, 40.0]), max_size=4)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_edits_and_penalties_follow_the_reference(data: st.DataObject) -> None:
    vocab = 9
    ids = st.integers(0, vocab - 1)
    # distinct logits that stay apart under the edits below, so that the greedy choice is not a matter of rounding
    logits = np.array(data.draw(st.permutations(range(vocab))), np.float64) * 1.7 - 5.03
    output = data.draw(st.lists(ids, max_size=6))
    req = request(
        data.draw(st.lists(ids, min_size=1, max_size=5)),
        eos=tuple(data.draw(st.lists(ids, max_size=2))),
        bad=data.draw(st.lists(st.lists(ids, min_size=1, max_size=3), max_size=4)),
        temperature=0,
        stop_token_ids=data.draw(st.lists(ids, max_size=2)),
        min_tokens=data.draw(st.integers(0, 8)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3, 0.61])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 1.11, -0.43])),
        presence_penalty=data.draw(st.sampled_from([0.0, 1.93, -1.57])),
        logit_bias=data.draw(BIAS),
        allowed_token_ids=data.draw(st.none() | st.lists(ids, min_size=1, max_size=6)),
        logits_processors=data.draw(st.sampled_from([None, [lambda out, x: x * (1 + 0.01 * len(out))]])),
    )
    expected = edited(logits, req, output)
    best = expected.max()
    assume(best == -math.inf or (best - expected < 1e-4).sum() == 1)
    assert one(logits.tolist(), req, output) == int(expected.argmax())


def test_min_tokens_holds_back_every_stop_token_and_no_longer() -> None:
    req = request(eos=(3,), temperature=0, stop_token_ids=[2], min_tokens=2)
    assert [one([0.0, 1.0, 2.0, 3.0], req, [0] * n) for n in range(4)] == [1, 1, 3, 3]


def test_bad_words_need_their_whole_beginning() -> None:
    req = request((1,), bad=[[1, 3], [2]], temperature=0)
    logits = [0.0, 1.0, 2.0, 3.0]
    assert one(logits, req) == 3  # the prompt's 1 does not count
    assert one(logits, req, [1]) == 1
    assert one(logits, req, [1, 0]) == 3
    long = request(bad=[[1, 0, 3]], temperature=0)
    assert [one(logits, long, output) for output in ([1, 0], [2, 0], [0], [1, 0, 0])] == [2, 3, 3, 3]


def test_frequency_counts_and_presence_does_not() -> None:
    logits, output = [2.0, 1.45, 0.0], [0, 0, 0]
    assert one(logits, request(temperature=0, presence_penalty=0.5), output) == 0
    assert one(logits, request(temperature=0, frequency_penalty=0.2), output) == 1
    assert one(logits, request([0, 0, 0], temperature=0, frequency_penalty=2.0)) == 0  # the prompt does not count
    assert one(logits, request([0], temperature=0, repetition_penalty=1.4)) == 1


def test_appended_tokens_count_for_bad_words_and_processors() -> None:
    seen: list[list[int]] = []

    def watch(output: Sequence[int], x: Tensor) -> Tensor:
        seen.append(list(output))
        return x

    sampler = Sampler(4, 1, torch.device("cpu"), REFERENCE_OPS)
    sampler.admit(0, request((0,), bad=[[3, 3]], temperature=0, logits_processors=[watch]), [0])
    tokens = []
    for position in range(1, 5):
        tokens.append(int(sample(sampler, torch.arange(4.0)[None], [0], [position]).token_ids))
        sampler.append(0, tokens[-1])
    assert tokens == [3, 2, 3, 2]
    assert seen == [tokens[:n] for n in range(4)]


def test_a_processor_that_returns_something_else_is_named_an_error() -> None:
    for bad in (lambda output, x: None, lambda output, x: x[:-1]):
        with pytest.raises(RequestError, match="must return logits"):
            one([0.0, 1.0], request(logits_processors=[bad]))


# ------------------------------------------------------------------------------------------ independence

ROW_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 1.8, "min_p": 0.02},
    {"top_k": 5},
    {"top_k": 700, "top_p": 0.9},
    {"top_p": 0.5},
    {"top_k": 1500, "top_p": 0.97, "min_p": 1e-4},
    {"top_k": 1},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": -0.2, "temperature": 1.3},
    {"allowed_token_ids": list(range(100, 400)), "top_p": 0.9},
    {"logit_bias": {3: 5.0, 1999: 7.0}, "min_tokens": 16, "stop_token_ids": [3]},
    {"logprobs": 4, "top_k": 30},
]


def coarse_logits(row: int, position: int, vocab: int) -> Tensor:
    """Logits with many ties, as bfloat16 gives them."""
    generator = torch.Generator().manual_seed(1000 * row + position)
    return (torch.randn(vocab, generator=generator) * 3).bfloat16()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(ROW_PARAMS), st.integers(0, 2**64)), min_size=1, max_size=14),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_request_does_not_see_its_neighbours(members: list[tuple[Any, int]], random: Any, dtype: torch.dtype) -> None:
    vocab, prompt = 2011, [5, 3, 8]
    rows = random.sample(range(20), len(members))
    together = Sampler(vocab, 20, torch.device("cpu"), REFERENCE_OPS)
    alone = [Sampler(vocab, 1, torch.device("cpu"), REFERENCE_OPS) for _ in members]
    reqs = [request(prompt, seed=seed, **params) for params, seed in members]
    for row, req, single in zip(rows, reqs, alone, strict=True):
        together.admit(row, req, prompt)
        single.admit(0, req, prompt)
    for position in range(3, 7):
        order = random.sample(range(len(members)), random.randint(1, len(members)))
        logits = torch.stack([coarse_logits(m, position, vocab) for m in order]).to(dtype)
        got = sample(together, logits, [rows[m] for m in order], [position] * len(order)).token_ids.tolist()
        assert got == [int(sample(alone[m], logits[i : i + 1], [0], [position]).token_ids) for i, m in enumerate(order)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from(ROW_PARAMS), st.integers(0, 2**32))
def test_preemption_changes_nothing(preempt: list[bool], params: dict[str, Any], seed: int) -> None:
    vocab, prompt = 64, [1, 2, 2]
    params = {**params, "allowed_token_ids": None, "frequency_penalty": 0.9, "repetition_penalty": 1.2}
    steady, moved = (Sampler(vocab, 3, torch.device("cpu"), REFERENCE_OPS) for _ in range(2))
    req, tokens, row = request(prompt, bad=[[4, 5]], seed=seed, **params), list(prompt), 0
    steady.admit(0, req, tokens)
    moved.admit(0, req, tokens)
    for step, out in enumerate(preempt):
        if out:
            moved.release(row)
            moved.admit(row, request([9, 9], presence_penalty=2.0), [9, 9, 1, 1])  # somebody else takes row and slot
            row = (row + 1) % 3
            moved.admit(row, req, tokens)
        logits = coarse_logits(0, step, vocab)[None]
        got = [
            int(sample(s, logits, [r], [len(tokens)]).token_ids) for s, r in ((steady, 0), (moved, row))
        ]  # fmt: skip
        assert got[0] == got[1]
        tokens.append(got[0])
        steady.append(0, got[0])
        moved.append(row, got[0])


def test_penalties_follow_tokens_that_the_host_has_not_seen() -> None:
    """Overlapped steps: the device counts what it sampled; the same as counting from scratch."""
    vocab, prompt = 40, [7, 7, 11]
    params: dict[str, Any] = {"repetition_penalty": 1.2, "frequency_penalty": 0.7, "presence_penalty": 0.4}
    req = request(prompt, seed=5, temperature=0.8, **params)
    sampler, tokens = Sampler(vocab, 3, torch.device("cpu"), REFERENCE_OPS), list(prompt)
    sampler.admit(2, req, prompt)
    for step in range(60):
        logits = coarse_logits(0, step % 3, vocab).float()
        got = int(sample(sampler, logits[None], [2], [len(tokens)]).token_ids)
        assert got == one(logits, req, tokens[len(prompt) :])
        tokens.append(got)


def test_rows_beyond_the_first_slots_keep_their_history() -> None:
    sampler = Sampler(6, 40, torch.device("cpu"), REFERENCE_OPS)
    for row in range(40):
        sampler.admit(row, request([row % 6], temperature=0, repetition_penalty=100.0), [row % 6])
    logits = torch.full((40, 6), 1.0) + torch.arange(6.0) / 100
    got = sample(sampler, logits, list(range(40)), [1] * 40).token_ids.tolist()
    assert got == [4 if row % 6 == 5 else 5 for row in range(40)]


# ------------------------------------------------------------------------------------------ log probabilities


@settings(deadline=None, max_examples=60)
@given(st.lists(st.none() | st.integers(-1, 12), min_size=1, max_size=6), st.integers(0, 99))
def test_logprobs_are_those_of_the_model(counts: list[int | None], seed: int) -> None:
    vocab = 12
    logits = torch.randn(len(counts), vocab, generator=torch.Generator().manual_seed(seed)) * 3
    sampler = Sampler(vocab, 8, torch.device("cpu"), REFERENCE_OPS)
    for row, count in enumerate(counts):  # what shapes the choice does not shape the log probabilities
        sampler.admit(row, request(logprobs=count, seed=row, temperature=2.0, frequency_penalty=1.0), [1])
    sampled = sample(sampler, logits, list(range(len(counts))), [1] * len(counts))
    if sampled.logprobs is None:
        assert set(counts) == {None}
        return
    sampled.logprobs.start_copy(DEVICE)
    expected = logits.double().log_softmax(-1)
    for row, (count, got) in enumerate(zip(counts, sampled.logprobs.to_host(), strict=True)):
        if count is None:
            assert got is None
            continue
        assert got is not None
        token = int(sampled.token_ids[row])
        order = expected[row].argsort(descending=True).tolist()
        assert got.token_ids == [token, *order[: vocab if count == -1 else count]]
        assert got.rank == order.index(token) + 1
        assert got.logprobs == pytest.approx(expected[row, got.token_ids].tolist(), abs=1e-5)


def test_ranks_of_ties_are_the_best_and_masked_tokens_have_minus_infinity() -> None:
    sampler = Sampler(4, 1, torch.device("cpu"), REFERENCE_OPS)
    logits = torch.tensor([[1.0, 2.0, 2.0, -math.inf]] * 3)
    entries = sampler.prompt_logprobs(logits, torch.tensor([0, 2, 3]), -1).to_host()
    assert [e and e.rank for e in entries] == [3, 1, 4]
    assert entries[2] is not None
    assert entries[2].logprobs[0] == -math.inf
    assert len(entries[2].token_ids) == 5
    only = sampler.prompt_logprobs(logits[:1], torch.tensor([0]), 0).to_host()[0]
    assert only is not None
    assert only.token_ids == [0]


# ------------------------------------------------------------------------------------------ extremes


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    assert one([1.0, 3.0, 3.0, 2.0], request(temperature=0)) == 1
    assert one([1.0, 3.0, 3.0, 2.0], request(top_k=1)) == 1
    for n in (7, 1000, 152_064):
        assert one(torch.zeros(n), request(temperature=0)) == 0


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 10}, {"top_k": 1100}, {"temperature": 0}])
@pytest.mark.parametrize(
    ("fill", "expected"),
    [((math.nan, 5), 5), ((math.inf, 7), 7), ((-math.inf, None), 0)],
)
def test_a_row_that_is_no_distribution_gives_the_same_token_always(
    params: dict[str, Any], fill: tuple[float, int | None], expected: int
) -> None:
    """And does not disturb its neighbours."""
    logits = coarse_logits(0, 0, 2000).float()
    broken = logits.clone()
    if fill[1] is None:
        broken[:] = fill[0]
    else:
        broken[fill[1] :: 3] = fill[0]
    sampler = Sampler(2000, 2, torch.device("cpu"), REFERENCE_OPS)
    for row in range(2):
        sampler.admit(row, request(seed=row, **params), [0])
    got = sample(sampler, torch.stack((broken, logits)), [0, 1], [1, 1]).token_ids.tolist()
    assert got == [expected, one(logits, request(seed=1, **params))]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([1.0, 1.001, -4.0])
    for temperature in (1e-300, 1e-30, 1e-5):
        assert {one(logits, request(seed=s, temperature=temperature)) for s in range(50)} == {1}
    for temperature in (1e3, 1e300):
        found = np.array([one(logits, request(seed=s, temperature=temperature)) for s in range(600)])
        assert g_test(found, np.full(3, 1 / 3)) > 1e-6
    masked = request(seed=1, temperature=1e300, allowed_token_ids=[2])
    assert one(logits, masked) == 2


def test_a_vocabulary_of_one_and_filters_wider_than_the_vocabulary() -> None:
    alone: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 1e-9}, {"min_p": 1.0}]
    assert [one([0.5], request(**params)) for params in alone] == [0] * 4
    many = [one([0.0, 1.0, 2.0], request(seed=s, top_k=3)) for s in range(40)]
    assert many == [one([0.0, 1.0, 2.0], request(seed=s)) for s in range(40)]
    assert {one([0.0, 1.0, 2.0], request(seed=s, top_p=1e-9)) for s in range(40)} == {2}
    assert {one([0.0, 1.0, 2.0], request(seed=s, min_p=1.0)) for s in range(40)} == {2}


def test_ids_outside_the_vocabulary_are_ignored_and_an_empty_step_is_fine() -> None:
    req = request((0, 99), temperature=0, stop_token_ids=[44], min_tokens=5, repetition_penalty=2.0, logit_bias={70: 9})
    assert one([0.0, 1.0], req) == 1
    sampler = Sampler(8, 1, torch.device("cpu"), REFERENCE_OPS)
    assert sample(sampler, torch.zeros(0, 8), [], []).token_ids.shape == (0,)
