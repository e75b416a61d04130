"""Random histories of the scheduler against pages that remember what was written in them.

The model is a hash: its next token depends on all tokens before, and what it stores at a position depends on all tokens
up to it. So a page that is shared wrongly, handed on too early, or read where nothing was written is seen at once, and
every output can be told beforehand, however it was scheduled.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import CacheConfig, SchedulerConfig
from engine.errors import RequestError
from engine.kv.manager import KVCacheManager
from engine.kv.spec import ChunkedSpec, FullSpec, KVCacheSpec, KVGroup, SlidingWindowSpec
from engine.request import CoreOutput, CoreRequest, SamplingParams, TokenLogprobs
from engine.scheduler import Scheduler
from engine.step import Step, StepResult
from engine_conformance.kv_invariants import check_manager

VOCAB, EOS, STOP = 40, 0, 1
MAX_MODEL_LEN = 48


def extend(digest: int, token: int) -> int:
    return (digest * 1_000_003 + token + 1) % (2**61 - 1)


def next_token(digest: int) -> int:
    return (digest >> 7) % VOCAB


def oracle(request: CoreRequest) -> tuple[list[int], str, int | None]:
    """Output, finish reason and stop reason, one token at a time."""
    params = request.params
    assert params.max_tokens is not None
    digest, tokens = 0, []
    for token in request.prompt_token_ids:
        digest = extend(digest, token)
    while True:
        token = next_token(digest)
        tokens.append(token)
        digest = extend(digest, token)
        if len(tokens) > params.min_tokens:
            if token == EOS and not params.ignore_eos:
                return tokens, "stop", None
            if token in (params.stop_token_ids or ()):
                return tokens, "stop", token
        if len(tokens) == params.max_tokens or len(request.prompt_token_ids) + len(tokens) == MAX_MODEL_LEN:
            return tokens, "length", None


def sees(spec: KVCacheSpec, query: int, key: int) -> bool:
    match spec:
        case SlidingWindowSpec(window=window):
            return query - window < key <= query
        case ChunkedSpec(chunk=chunk):
            return key // chunk == query // chunk and key <= query
    return key <= query


@dataclass
class Row:
    request: CoreRequest
    token_ids: list[int]
    num_computed: int
    tables: list[list[int]]
    digests: list[int] = field(default_factory=list)

    def content(self, position: int) -> tuple[str | None, int]:
        """What the model stores at a position: a function of the salt and of all tokens up to it."""
        while len(self.digests) <= position:
            self.digests.append(extend(self.digests[-1] if self.digests else 0, self.token_ids[len(self.digests)]))
        return self.request.cache_salt, self.digests[position]


@dataclass
class Page:
    """A page holds one group's block; another group's write makes all of it garbage."""

    group: int = -1
    slots: dict[int, tuple[str | None, int]] = field(default_factory=dict)


class PagedRunner:
    """Executes steps in order, checking each access to a page."""

    def __init__(self, specs: list[KVCacheSpec], num_blocks: int, max_num_seqs: int) -> None:
        self.specs = specs
        self.pages = [Page() for _ in range(num_blocks)]
        self.max_num_seqs = max_num_seqs
        self.rows: dict[int, Row] = {}
        self.read_pages: set[int] = set()

    def run(self, step: Step) -> StepResult:
        """Also leaves in `read_pages` those that the step reads."""
        for row in step.freed_rows:
            del self.rows[row]
        for new in step.new_rows:
            assert new.row not in self.rows
            assert 0 <= new.row < self.max_num_seqs
            assert new.num_computed < len(new.token_ids)
            self.rows[new.row] = Row(
                new.request, list(new.token_ids), new.num_computed, [list(ids) for ids in new.block_ids]
            )
        assert len({work.row for work in step.work}) == len(step.work)
        for work in step.work:
            for table, blocks in zip(self.rows[work.row].tables, work.new_blocks, strict=True):
                table.extend(blocks)
        self.write(step)
        self.read(step)
        return self.sample(step)

    def write(self, step: Step) -> None:
        written: set[tuple[int, int]] = set()
        writer: dict[int, int] = {}
        for work in step.work:
            row, end = self.rows[work.row], work.start + work.num_tokens
            assert work.num_tokens > 0
            assert work.start == row.num_computed, "a position is skipped or computed twice"
            assert end <= len(row.token_ids), "a token is computed before it is sampled"
            num_output = end - len(row.request.prompt_token_ids)
            assert end < MAX_MODEL_LEN, "the last token is never computed"
            assert num_output < (row.request.params.max_tokens or 0), "the last token is never computed"
            row.num_computed = end
            for group, spec in enumerate(self.specs):
                for position in range(work.start, end):
                    block = row.tables[group][position // spec.block_size]
                    assert block > 0, "a token is written to the null page"
                    page, offset = self.pages[block], position % spec.block_size
                    assert (block, offset) not in written, "two tokens of a step share a slot"
                    written.add((block, offset))
                    assert writer.setdefault(block, group) == group, "two groups share a page"
                    if page.group != group:
                        page.group, page.slots = group, {}
                    page.slots[offset] = row.content(position)

    def read(self, step: Step) -> None:
        self.read_pages.clear()
        for work in step.work:
            row, end = self.rows[work.row], work.start + work.num_tokens
            for group, spec in enumerate(self.specs):
                first = next(key for key in range(work.start + 1) if sees(spec, work.start, key))
                for position in range(first, end):
                    block = row.tables[group][position // spec.block_size]
                    self.read_pages.add(block)
                    page = self.pages[block]
                    stored = page.slots.get(position % spec.block_size) if page.group == group else None
                    assert stored == row.content(position), f"group {group} reads garbage at {position}"

    def sample(self, step: Step) -> StepResult:
        size = len(step.work)
        result = StepResult([None] * size, [None] * size, [None] * size)
        for i, work in enumerate(step.work):
            row, end = self.rows[work.row], work.start + work.num_tokens
            assert work.sample == (end == len(row.token_ids)), "only the last token may sample"
            if work.num_prompt_logits:
                result.prompt_logprobs[i] = [
                    TokenLogprobs([row.token_ids[at + 1]], [float(at)], 1)
                    for at in range(work.start, work.start + work.num_prompt_logits)
                ]
            if work.sample:
                token = next_token(row.content(end - 1)[1])
                row.token_ids.append(token)
                result.token_ids[i] = token
                if row.request.params.logprobs is not None:
                    result.logprobs[i] = TokenLogprobs([token], [0.0], 1)
        return result


@dataclass
class Received:
    """What came for one request."""

    request: CoreRequest
    token_ids: list[int] = field(default_factory=list)
    prompt_positions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_preemptions: int = 0


GROUPS: list[list[KVCacheSpec]] = [
    [FullSpec(4)],
    [SlidingWindowSpec(2, 5)],
    [FullSpec(4), SlidingWindowSpec(4, 6)],
    [SlidingWindowSpec(2, 3), FullSpec(4), SlidingWindowSpec(2, 9)],
    [FullSpec(2), ChunkedSpec(4, 8), ChunkedSpec(2, 6)],
    [FullSpec(3), SlidingWindowSpec(3, 1)],
]


def a_request(
    family: int,
    shared: int,
    tail: list[int],
    salt: str | None,
    priority: int,
    bad_token_ids: list[list[int]],
    params: SamplingParams,
    share: float,
) -> CoreRequest:
    """Of one of a few families, so that prefixes are shared."""
    assert params.max_tokens is not None
    params.min_tokens = int(share * params.max_tokens)
    prompt = [(family * 5 + i * i) % VOCAB for i in range(shared)] + tail
    return CoreRequest("", prompt, params, (EOS,), bad_token_ids, priority, salt)


REQUESTS = st.builds(
    a_request,
    family=st.sampled_from([0, 0, 0, 1]),
    shared=st.sampled_from([24, 8, 25, 1]),
    tail=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    salt=st.sampled_from([None, None, None, None, "pepper"]),
    priority=st.integers(0, 2),
    bad_token_ids=st.sampled_from([[], [], [[3]], [[3, 4]]]),
    params=st.builds(
        SamplingParams,
        max_tokens=st.sampled_from([25, 40, 7, 1]),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([[], [STOP], [STOP, EOS]]),
        logprobs=st.sampled_from([None, 0]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        logits_processors=st.sampled_from([None, None, None, [lambda _ids, logits: logits]]),
    ),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)


class History(RuleBasedStateMachine):
    """What users and the engine loop may do, in any order."""

    num_steps = 0

    @initialize(
        specs=st.sampled_from(GROUPS),
        longest=st.sampled_from([1.0, 0.6, 1.2, 1.7, 4.0]),
        max_num_seqs=st.sampled_from([4, 1, 2, 8]),
        budget=st.sampled_from([10, 1, 3, 24]),
        policy=st.sampled_from(["fcfs", "priority"]),
        chunk=st.integers(1, 6),
        caching=st.sampled_from([True, True, True, False]),
        depth=st.integers(1, 3),
        stages=st.sampled_from([1, 1, 2, 3]),
        requests=st.lists(REQUESTS, min_size=3, max_size=8),
    )
    def build(
        self,
        specs: list[KVCacheSpec],
        longest: float,
        max_num_seqs: int,
        budget: int,
        policy: Literal["fcfs", "priority"],
        chunk: int,
        caching: bool,
        depth: int,
        stages: int,
        requests: list[CoreRequest],
    ) -> None:
        # a pool that holds this many sequences of full length
        num_blocks = 1 + int(longest * sum(spec.max_blocks(MAX_MODEL_LEN - 1, budget) for spec in specs))
        self.kv = KVCacheManager([KVGroup(spec, ()) for spec in specs], CacheConfig(num_blocks, caching))
        config = SchedulerConfig(max_num_seqs, budget, MAX_MODEL_LEN, policy, chunk, stages=stages)
        self.scheduler = Scheduler(config, self.kv)
        self.runner = PagedRunner(specs, num_blocks, max_num_seqs)
        self.budget = budget
        self.depth, self.stages = depth, stages
        self.caching = caching
        self.in_flight: deque[tuple[Step, StepResult]] = deque()
        self.live: dict[str, Received] = {}
        self.done: list[Received] = []
        self.num_added = 0
        self.add(requests)

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=5))
    def add_some(self, requests: list[CoreRequest]) -> None:
        self.add(requests)

    @precondition(lambda self: self.done)
    @rule(data=st.data(), request=REQUESTS)
    def add_next_turn(self, data: st.DataObject, request: CoreRequest) -> None:
        before = data.draw(st.sampled_from(self.done))
        conversation = before.request.prompt_token_ids + before.token_ids
        request.prompt_token_ids = conversation + request.prompt_token_ids[-3:]
        self.add([request])

    def add(self, requests: list[CoreRequest]) -> None:
        for request in requests:
            self.num_added += 1
            request.request_id = str(self.num_added)
            try:
                self.scheduler.add(request)
            except RequestError as error:
                note(str(error))
            else:
                self.live[request.request_id] = Received(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        (output,) = self.scheduler.abort([request_id, "never added"])
        assert (output.request_id, output.token_ids, output.finish_reason) == (request_id, [], "abort")
        received = self.live.pop(request_id)
        assert received.token_ids == oracle(received.request)[0][: len(received.token_ids)]

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def schedule(self) -> None:
        self.launch()

    def launch(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            assert self.in_flight or not self.live, "nothing is in flight, and nothing is scheduled: a deadlock"
            return False
        History.num_steps += 1
        assert step.num_tokens <= self.budget
        if self.stages > 1:
            sequences = [
                seq for work, seq in zip(step.work, self.scheduler._in_flight[-1][1], strict=True) if work.sample
            ]
            assert all(seq.num_tokens == len(seq.token_ids) + 1 for seq in sequences), "a step waits for another"
        result = self.runner.run(step)
        assert all(self.kv.allocator._refs[block] for block in self.runner.read_pages), "given up, yet still read"
        self.in_flight.append((step, result))
        return True

    @precondition(lambda self: self.in_flight)
    @rule()
    def update(self) -> None:
        step, result = self.in_flight.popleft()
        for output in self.scheduler.update(step, result):
            self.receive(output)

    @rule(count=st.integers(1, 15))
    def loop(self, count: int) -> None:
        for _ in range(count):
            while len(self.in_flight) < self.depth and self.launch():
                pass
            if not self.in_flight:
                break
            self.update()

    @rule()
    def reset_prefix_cache(self) -> None:
        assert self.kv.reset_prefix_cache() == (self.scheduler.num_running == 0)

    def receive(self, output: CoreOutput) -> None:
        received = self.live[output.request_id]
        request = received.request
        received.token_ids += output.token_ids
        received.prompt_positions += [int(entry.logprobs[0]) for entry in output.prompt_logprobs or ()]
        if output.token_ids and request.params.logprobs is not None:
            assert output.logprobs is not None
            assert [entry.token_ids[0] for entry in output.logprobs] == output.token_ids
        assert output.num_preemptions >= received.num_preemptions
        received.num_preemptions = output.num_preemptions
        assert output.scheduled_time is not None
        assert 0 <= output.num_cached_tokens < len(request.prompt_token_ids)
        assert not output.num_cached_tokens or (self.caching and request.params.prompt_logprobs is None)
        if output.finish_reason:
            got = received.token_ids, output.finish_reason, output.stop_reason
            assert got == oracle(request)
            wanted = 0 if request.params.prompt_logprobs is None else len(request.prompt_token_ids) - 1
            assert received.prompt_positions == list(range(wanted)), "each prompt position is reported once"
            self.done.append(self.live.pop(output.request_id))

    @invariant()
    def pages_are_accounted_for(self) -> None:
        if hasattr(self, "scheduler"):
            check_manager(self.kv, [seq.table for seq in self.scheduler._sequences.values()])

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # each token of each request may be recomputed a number of times, but not for ever
        for _ in range(MAX_MODEL_LEN * (len(self.live) + 1) * 10):
            if not self.scheduler.has_work():
                break
            self.loop(1)
        assert not self.scheduler.has_work(), "a request starves"
        assert not self.live
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.kv.usage() == 0
        check_manager(self.kv, [])


TestHistory = pytest.mark.timeout(900)(History.TestCase)  # a failure is shrunk for minutes
TestHistory.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
