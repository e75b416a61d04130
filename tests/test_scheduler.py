"""What each step computes, and when sequences end."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from engine.config import CacheConfig, SchedulerConfig
from engine.errors import RequestError
from engine.kv.manager import KVCacheManager
from engine.kv.spec import FullSpec, KVCacheSpec, KVGroup, SlidingWindowSpec
from engine.request import CoreOutput, CoreRequest, SamplingParams, TokenLogprobs
from engine.scheduler import Scheduler
from engine.step import Step, StepResult


def make(
    num_blocks: int = 100,
    specs: Sequence[KVCacheSpec] = (FullSpec(4),),
    *,
    seqs: int = 8,
    tokens: int = 64,
    length: int = 128,
    policy: Literal["fcfs", "priority"] = "fcfs",
    chunk: int = 256,
    caching: bool = True,
    stages: int = 1,
) -> Scheduler:
    kv = KVCacheManager([KVGroup(spec, ()) for spec in specs], CacheConfig(num_blocks, caching))
    return Scheduler(SchedulerConfig(seqs, tokens, length, policy, chunk, stages=stages), kv)


def request(
    name: str,
    prompt: int | list[int] = 4,
    *,
    eos: tuple[int, ...] = (),
    bad: Sequence[list[int]] = (),
    priority: int = 0,
    arrival: float = 0.0,
    **params: Any,
) -> CoreRequest:
    """A prompt given as a number has that many tokens, and no prefix in common with any other request's."""
    ids = [1000 * sum(name.encode()) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return CoreRequest(name, ids, SamplingParams(**params), eos, list(bad), priority, None, arrival)


def step_of(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    assert step is not None
    return step


def result(step: Step, token: int = 7) -> StepResult:
    size = len(step.work)
    return StepResult([token if w.sample else None for w in step.work], [None] * size, [None] * size)


def run(scheduler: Scheduler, token: int = 7) -> tuple[Step, list[CoreOutput]]:
    step = step_of(scheduler)
    return step, scheduler.update(step, result(step, token))


def drain(scheduler: Scheduler, token: int = 7) -> list[CoreOutput]:
    outputs = []
    while scheduler.has_work():
        outputs += run(scheduler, token)[1]
    return outputs


def spans(step: Step) -> list[tuple[int, int, int, bool]]:
    return [(w.row, w.start, w.num_tokens, w.sample) for w in step.work]


def test_prompt_then_decode_then_length() -> None:
    scheduler = make()
    scheduler.add(request("a", [1, 2, 3, 4, 5], max_tokens=2))
    assert (scheduler.num_waiting, scheduler.num_running) == (1, 0)
    step, (output,) = run(scheduler)
    (new,) = step.new_rows
    assert (new.row, new.token_ids, new.num_computed, len(new.block_ids[0])) == (0, [1, 2, 3, 4, 5], 0, 2)
    assert step.work[0].new_blocks == [[]]
    assert spans(step) == [(0, 0, 5, True)]
    assert (output.token_ids, output.finish_reason, output.num_cached_tokens) == ([7], None, 0)
    assert output.scheduled_time is not None
    step, (output,) = run(scheduler)
    assert (step.new_rows, spans(step)) == ([], [(0, 5, 1, True)])
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([7], "length", None)
    assert not scheduler.has_work()
    assert scheduler.schedule() is None


def test_one_budget_decodes_before_prompts_chunks_what_is_left() -> None:
    scheduler = make(tokens=10)
    scheduler.add(request("a", 4, max_tokens=5))
    scheduler.add(request("b", 20, max_tokens=5))
    scheduler.add(request("c", 3, max_tokens=5))
    assert spans(run(scheduler)[0]) == [(0, 0, 4, True), (1, 0, 6, False)]
    assert spans(run(scheduler)[0]) == [(0, 4, 1, True), (1, 6, 9, False)]
    assert spans(run(scheduler)[0]) == [(0, 5, 1, True), (1, 15, 5, True), (2, 0, 3, True)]


def test_new_blocks_are_reported_once() -> None:
    scheduler = make(specs=[FullSpec(4), SlidingWindowSpec(2, 3)])
    scheduler.add(request("a", 4, max_tokens=3))
    step, _ = run(scheduler)
    tables = step.new_rows[0].block_ids
    assert [len(table) for table in tables] == [1, 2]
    step, _ = run(scheduler)
    assert [len(blocks) for blocks in step.work[0].new_blocks] == [1, 1]
    step, _ = run(scheduler)
    assert step.work[0].new_blocks == [[], []]


def test_rows_are_handed_out_lowest_first_and_reported() -> None:
    scheduler = make(seqs=3)
    for name in "abc":
        scheduler.add(request(name, max_tokens=9))
    scheduler.add(request("d", max_tokens=9))
    assert [new.row for new in run(scheduler)[0].new_rows] == [0, 1, 2]
    assert scheduler.num_waiting == 1
    scheduler.abort(["c", "b"])
    step, _ = run(scheduler)
    assert step.freed_rows == [2, 1]
    assert [new.row for new in step.new_rows] == [1]
    assert run(scheduler)[0].freed_rows == []


def test_rows_freed_with_nothing_to_compute_are_reported_later() -> None:
    scheduler = make()
    scheduler.add(request("a", max_tokens=1))
    run(scheduler)
    assert scheduler.schedule() is None
    scheduler.add(request("b", max_tokens=1))
    assert run(scheduler)[0].freed_rows == [0]


# -- ends


@pytest.mark.parametrize(
    ("params", "eos", "end"),
    [
        ({}, (7,), ("stop", None, 1)),
        ({}, (5, 7), ("stop", None, 1)),
        ({"ignore_eos": True}, (7,), ("length", None, 6)),
        ({"stop_token_ids": [3, 7]}, (), ("stop", 7, 1)),
        ({"stop_token_ids": [7]}, (7,), ("stop", None, 1)),
        ({"stop_token_ids": [7], "ignore_eos": True}, (7,), ("stop", 7, 1)),
        ({"min_tokens": 3}, (7,), ("stop", None, 4)),
        ({"stop_token_ids": [7], "min_tokens": 6}, (), ("length", None, 6)),
        ({"max_tokens": 1}, (7,), ("stop", None, 1)),
        ({"max_tokens": None}, (), ("length", None, 16)),
        ({"max_tokens": 99}, (), ("length", None, 16)),
    ],
)
def test_ends(params: dict[str, Any], eos: tuple[int, ...], end: tuple[str, int | None, int]) -> None:
    scheduler = make(length=20)
    scheduler.add(request("a", 4, eos=eos, **{"max_tokens": 6, **params}))
    outputs = drain(scheduler)
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason, len(outputs)) == end
    assert not any(output.finish_reason for output in outputs[:-1])


def test_logprobs_are_passed_on() -> None:
    scheduler = make()
    scheduler.add(request("a", max_tokens=1, logprobs=0))
    step = step_of(scheduler)
    entry = TokenLogprobs([7], [-0.5], 1)
    (output,) = scheduler.update(step, StepResult([7], [entry], [None]))
    assert output.logprobs == [entry]


def test_requests_that_can_never_run_are_refused_with_the_numbers() -> None:
    scheduler = make(num_blocks=9, length=40, tokens=16)
    scheduler.add(request("a", 28, max_tokens=5))
    with pytest.raises(RequestError, match=r"needs 9 KV blocks .* 34 tokens.* there are 8"):
        scheduler.add(request("b", 28, max_tokens=6))
    with pytest.raises(RequestError, match=r"40 tokens.*max_model_len is 40"):
        scheduler.add(request("b", 40, max_tokens=1))
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(request("a", max_tokens=1))
    with pytest.raises(RequestError, match="no tokens"):
        scheduler.add(request("b", [], max_tokens=1))
    assert len(drain(scheduler)) == 5
    scheduler.add(request("a", max_tokens=1))


def test_a_window_makes_room_for_long_sequences() -> None:
    scheduler = make(num_blocks=6, specs=[SlidingWindowSpec(4, 8)], tokens=4)
    scheduler.add(request("a", 90, max_tokens=30))
    assert len(drain(scheduler)) == 30


# -- steps ahead


def test_a_step_ahead_computes_the_token_in_flight() -> None:
    scheduler = make()
    scheduler.add(request("a", 4, max_tokens=3))
    steps = [step_of(scheduler) for _ in range(3)]
    assert [spans(step) for step in steps] == [[(0, 0, 4, True)], [(0, 4, 1, True)], [(0, 5, 1, True)]]
    assert scheduler.schedule() is None, "its last token is in flight"
    assert scheduler.has_work()
    outputs = [scheduler.update(step, result(step, token))[0] for step, token in zip(steps, (5, 6, 7), strict=True)]
    assert [output.token_ids for output in outputs] == [[5], [6], [7]]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]


def test_steps_of_several_stages_share_the_sequences() -> None:
    scheduler = make(stages=3)
    for name in "abcdefg":
        scheduler.add(request(name, 4, max_tokens=9))
    steps = [step_of(scheduler) for _ in range(3)]
    assert [[work.row for work in step.work] for step in steps] == [[0, 1, 2], [3, 4, 5], [6]]
    assert scheduler.schedule() is None, "each sequence waits for its token"
    for size in (3, 3, 1, 3):
        scheduler.update(steps[0], result(steps[0]))
        steps = [*steps[1:], step_of(scheduler)]
        assert len(steps[-1].work) == size, "those that are back, and no more"
    scheduler.add(request("h", 4, max_tokens=9))
    assert len(step_of(scheduler).work) == 1, "one that arrives need not wait"


def test_chunks_of_a_prompt_follow_one_another_through_the_stages() -> None:
    scheduler = make(stages=2, tokens=8)
    scheduler.add(request("a", 20, max_tokens=9))
    steps = [step_of(scheduler) for _ in range(3)]
    assert [spans(step) for step in steps] == [[(0, 0, 8, False)], [(0, 8, 8, False)], [(0, 16, 4, True)]]
    assert scheduler.schedule() is None, "its first token is under way"


def test_tokens_after_a_late_stop_are_dropped() -> None:
    scheduler = make()
    scheduler.add(request("a", 4, eos=(7,), max_tokens=9))
    first, second = step_of(scheduler), step_of(scheduler)
    (output,) = scheduler.update(first, result(first))
    assert output.finish_reason == "stop"
    assert scheduler.num_running == 0
    scheduler.add(request("a", 4, max_tokens=1))
    third = step_of(scheduler)
    assert (third.freed_rows, third.new_rows[0].row) == ([0], 0)
    assert scheduler.update(second, result(second)) == []
    assert scheduler.update(third, result(third))[0].finish_reason == "length"
    assert not scheduler.has_work()


def test_abort_with_a_step_in_flight() -> None:
    scheduler = make(seqs=1)
    scheduler.add(request("a", max_tokens=9))
    scheduler.add(request("b", max_tokens=9))
    step = step_of(scheduler)
    outputs = scheduler.abort(["a", "b", "a", "nobody"])
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in outputs] == [("a", [], "abort"), ("b", [], "abort")]
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.has_work(), "its update is due"
    assert scheduler.update(step, result(step)) == []
    assert not scheduler.has_work()


def test_updates_come_in_order() -> None:
    scheduler = make()
    scheduler.add(request("a", max_tokens=9))
    step_of(scheduler)
    second = step_of(scheduler)
    with pytest.raises(AssertionError, match="order"):
        scheduler.update(second, result(second))


# -- order and preemption


def test_first_come_first_served_by_arrival() -> None:
    scheduler = make(seqs=1)
    for name, arrival in (("late", 2.0), ("early", 1.0), ("later", 2.0)):
        scheduler.add(request(name, max_tokens=1, arrival=arrival, priority=int(arrival == 1.0)))
    assert [output.request_id for output in drain(scheduler)] == ["early", "late", "later"]


def test_priority_then_arrival() -> None:
    scheduler = make(seqs=1, policy="priority")
    for name, priority, arrival in (("a", 1, 1.0), ("b", 0, 3.0), ("c", 0, 2.0), ("d", -1, 4.0)):
        scheduler.add(request(name, max_tokens=1, arrival=arrival, priority=priority))
    assert [output.request_id for output in drain(scheduler)] == ["d", "c", "b", "a"]


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", "b"), ("priority", "a")])
def test_the_last_in_order_is_preempted_and_recomputed(policy: Literal["fcfs", "priority"], victim: str) -> None:
    scheduler = make(num_blocks=8, policy=policy, caching=False)
    scheduler.add(request("a", 8, max_tokens=9, priority=1))
    scheduler.add(request("b", 8, max_tokens=9, priority=0))
    preempted, got = None, dict[str, list[int]](a=[], b=[])
    token = 0
    while scheduler.has_work():
        step = step_of(scheduler)
        if step.freed_rows and preempted is None:
            preempted = step
            assert scheduler.num_waiting == 1
        for new in step.new_rows:
            if preempted:
                assert new.request.request_id == victim
                assert new.token_ids == new.request.prompt_token_ids + got[victim]
                assert new.num_computed == 0
        token += 1
        for output in scheduler.update(step, result(step, token)):
            got[output.request_id] += output.token_ids
            assert output.num_preemptions == (output.request_id == victim and preempted is not None)
    assert preempted is not None
    assert [len(ids) for ids in got.values()] == [9, 9]
    assert scheduler.num_preemptions == 1


def test_a_preempted_sequence_with_a_token_in_flight_waits_for_it() -> None:
    scheduler = make(num_blocks=7, caching=False)
    scheduler.add(request("a", 7, max_tokens=9))
    scheduler.add(request("b", 8, max_tokens=9))
    scheduler.add(request("c", 1, max_tokens=1))
    steps = [step_of(scheduler)]
    while not steps[-1].freed_rows:
        steps.append(step_of(scheduler))
    assert steps[-1].freed_rows == [1]
    assert [work.row for work in steps[-1].work] == [0]
    in_flight = [i for i, step in enumerate(steps) if any(work.row == 1 for work in step.work)]
    scheduler.abort(["a"])
    assert scheduler.schedule() is None, "there is room now; c does not overtake b either"
    outputs = [scheduler.update(step, result(step)) for step in steps]
    assert [sum(o.request_id == "b" for o in brought) for brought in outputs] == [
        int(i in in_flight) for i in range(len(steps))
    ]
    step, _ = run(scheduler)
    assert [new.request.request_id for new in step.new_rows] == ["b", "c"]
    assert len(step.new_rows[0].token_ids) == 8 + len(in_flight)


def test_a_preempted_sequence_may_end_while_it_waits() -> None:
    scheduler = make(num_blocks=6, caching=False)
    scheduler.add(request("a", 7, max_tokens=9))
    scheduler.add(request("b", 8, max_tokens=9, eos=(7,)))
    first = step_of(scheduler)
    second = step_of(scheduler)
    third = step_of(scheduler)
    assert third.freed_rows == [1]
    scheduler.update(first, result(first, 5))
    (_, output) = scheduler.update(second, result(second, 7))
    assert (output.request_id, output.finish_reason) == ("b", "stop")
    assert scheduler.num_waiting == 0
    scheduler.update(third, result(third, 5))
    assert drain(scheduler, 5)[-1].finish_reason == "length"


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    scheduler = make(num_blocks=8)
    scheduler.add(request("a", 11, max_tokens=4))
    scheduler.add(request("b", 12, max_tokens=9))
    steps = []
    while scheduler.has_work():
        steps.append(run(scheduler)[0])
    (resumed,) = [step for step in steps[1:] if step.new_rows]
    assert resumed.new_rows[0].request.request_id == "b"
    assert resumed.new_rows[0].num_computed == 12
    assert spans(resumed)[-1][1] == 12


def test_waiting_sequences_enter_only_with_room_for_the_whole_prompt() -> None:
    scheduler = make(num_blocks=11, tokens=8)
    scheduler.add(request("a", 8, max_tokens=8))
    scheduler.add(request("b", 32, max_tokens=1))
    run(scheduler)
    step, _ = run(scheduler)
    assert [work.row for work in step.work] == [0], "b needs 8 of the 7 pages that are left"
    scheduler.abort(["a"])
    assert run(scheduler)[0].new_rows[0].request.request_id == "b"


# -- prefix cache


def test_prefix_hits_are_skipped_and_counted() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(10)), max_tokens=1))
    drain(scheduler)
    scheduler.add(request("b", list(range(12)), max_tokens=2))
    step, (output,) = run(scheduler)
    assert (step.new_rows[0].num_computed, spans(step)) == (8, [(0, 8, 4, True)])
    assert output.num_cached_tokens == 8
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions) == (1, 0, 0)
    assert (scheduler._kv.num_queried, scheduler._kv.num_hit) == (22, 8)
    assert scheduler._kv.usage() == pytest.approx(3 / 99)


def test_a_prompt_that_is_cached_to_the_end_computes_its_last_block() -> None:
    scheduler = make()
    for name in "ab":
        scheduler.add(request(name, list(range(8)), max_tokens=1))
    assert spans(run(scheduler)[0]) == [(0, 0, 8, True), (1, 4, 4, True)]


def test_requests_of_one_step_share_their_prefix() -> None:
    scheduler = make(tokens=100)
    for name in "abc":
        scheduler.add(request(name, [*range(32), ord(name)], max_tokens=2))
    step, _ = run(scheduler)
    assert spans(step) == [(0, 0, 33, True), (1, 32, 1, True), (2, 32, 1, True)]
    assert scheduler._kv.usage() == pytest.approx(11 / 99)


def test_generated_tokens_are_cached() -> None:
    scheduler = make()
    scheduler.add(request("a", list(range(6)), max_tokens=8))
    drain(scheduler)
    scheduler.add(request("b", [*range(6), *[7] * 8, 1], max_tokens=1))
    assert run(scheduler)[0].new_rows[0].num_computed == 12


# -- prompt logprobs


def prompt_positions(step: Step) -> list[tuple[int, int]]:
    return [(work.start, work.num_prompt_logits) for work in step.work]


def test_prompt_logprobs_come_in_chunks_and_never_from_the_cache() -> None:
    scheduler = make(chunk=4)
    scheduler.add(request("a", list(range(10)), max_tokens=1))
    drain(scheduler)
    scheduler.add(request("b", list(range(10)), max_tokens=2, prompt_logprobs=0))
    steps = [run(scheduler)[0] for _ in range(4)]
    assert [prompt_positions(step) for step in steps] == [[(0, 4)], [(4, 4)], [(8, 1)], [(10, 0)]]
    assert steps[0].new_rows[0].num_computed == 0


def test_prompt_logprobs_are_delivered_before_the_first_token() -> None:
    scheduler = make(chunk=2)
    scheduler.add(request("a", 4, max_tokens=1, prompt_logprobs=0))
    first = step_of(scheduler)
    entries = [TokenLogprobs([i], [0.0], 1) for i in range(2)]
    (output,) = scheduler.update(first, StepResult([None], [None], [entries]))
    assert (output.token_ids, output.prompt_logprobs) == ([], entries)


@pytest.mark.parametrize("caching", [True, False])
def test_prompt_logprobs_are_not_delivered_twice(caching: bool) -> None:
    """Positions that were delivered before a preemption are computed again without logits, where not cached."""
    scheduler = make(num_blocks=9, chunk=1, caching=caching)
    scheduler.add(request("a", 8, max_tokens=20))
    scheduler.add(request("b", 20, max_tokens=2, prompt_logprobs=0))
    wanted: list[int] = []
    resumed: list[tuple[int, tuple[int, int, int, bool]]] = []
    while scheduler.has_work():
        step, _ = run(scheduler)
        for work in step.work:
            wanted += range(work.start, work.start + work.num_prompt_logits)
        resumed += [(new.num_computed, spans(step)[-1]) for new in step.new_rows if scheduler.num_preemptions]
    assert resumed == [(4, (0, 4, 8, False))] if caching else [(0, (0, 0, 12, False))]
    assert wanted == list(range(19))
