"""L5: capture and replay. A replay must do what an eager run does on what the captured tensors hold *by then*."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_conformance.arena import Arena, outputs, prepare, verify
from engine_conformance.cases import Case, Row, Scale, block, dtypes, layer
from engine_sdk import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    Graph,
    GraphRuntime,
    GroupSpec,
    Plan,
    Platform,
)

Record = Callable[[str, object], None]

FEATURES = ("causal", "sliding_window", "chunked", "softcap", "sinks", "alibi")


@pytest.fixture
def graphs(conformance_platform: Platform, capabilities: Capabilities, record_property: Record) -> GraphRuntime | None:
    """The platform's graphs, where it declares them; the engine never captures on one that does not."""
    if capabilities.graphs == "none":
        record_property("rejected", "graphs")
        return None
    found = conformance_platform.graphs()
    assert found is not None, f"graphs are declared {capabilities.graphs!r}, and graphs() is None"
    return found


def test_declared_graphs_are_there(conformance_platform: Platform, capabilities: Capabilities) -> None:
    """`graphs()` answers with a runtime where graphs are declared; elsewhere with one or with None."""
    runtime = conformance_platform.graphs()
    assert runtime is None or isinstance(runtime, GraphRuntime)
    assert capabilities.graphs == "none" or runtime is not None


def capture(platform: Platform, graphs: GraphRuntime, launch: Callable[[], object]) -> Graph:
    """Run `launch` once, then capture it, as the engine does."""
    launch()
    platform.device().synchronize()

    def work() -> None:
        launch()

    return graphs.capture(work)


def test_replay_is_eager_after_a_change(conformance_platform: Platform, graphs: GraphRuntime | None) -> None:
    """Plain torch work, replayed many times; every replay reads what its inputs hold and writes its outputs."""
    if graphs is None:
        return
    device = conformance_platform.device()
    generator = torch.Generator().manual_seed(0)
    x, weight, out, total = (torch.zeros(8, 8, device=device.torch_device) for _ in range(4))

    def launch() -> None:
        hidden = torch.relu(x @ weight)
        out.copy_(hidden + x)
        total.add_(out)

    graph = capture(conformance_platform, graphs, launch)
    device.synchronize()
    out.fill_(torch.nan)
    total.zero_()
    want_total = torch.zeros(8, 8)
    for step in range(20):
        new_x, new_weight = (torch.randint(-4, 5, (8, 8), generator=generator).float() for _ in range(2))
        x.copy_(new_x)
        if step % 3 == 0:
            weight.copy_(new_weight)
            held = new_weight
        want = torch.relu(new_x @ held) + new_x
        want_total += want
        graph.replay()
        assert torch.equal(out.cpu(), want), f"replay {step}"
    assert torch.equal(total.cpu(), want_total), "a replay ran other than once"
    x.zero_()  # what is not replayed does not run
    device.synchronize()
    assert torch.equal(out.cpu(), want)


def test_capture_does_not_disturb(conformance_platform: Platform, graphs: GraphRuntime | None) -> None:
    """Tensors that the work does not write keep their values, those made before and between captures too."""
    if graphs is None:
        return
    device = conformance_platform.device()
    kept = [torch.full((1000,), float(i), device=device.torch_device) for i in range(8)]
    x, out = (torch.ones(1000, device=device.torch_device) for _ in range(2))
    made = []
    for factor in range(4):

        def launch(factor: int = factor) -> None:
            out.copy_(torch.cat([x * factor, x])[:1000] + x)

        made.append(capture(conformance_platform, graphs, launch))
        kept.append(torch.full((1000,), 8.0 + factor, device=device.torch_device))
    for factor, graph in enumerate(made):
        x.fill_(3)
        graph.replay()
        assert bool((out == 3 * factor + 3).all())
    for i, tensor in enumerate(kept):
        assert bool((tensor == i).all()), f"tensor {i} was overwritten"


def test_graphs_are_independent(conformance_platform: Platform, graphs: GraphRuntime | None) -> None:
    """Graphs of several sizes, captured large to small, replayed in any order: none reads another's leftovers."""
    if graphs is None:
        return
    device = conformance_platform.device()
    sizes = (64, 32, 16, 8, 1)
    x = torch.zeros(64, 33, device=device.torch_device)
    weight = torch.randint(-2, 3, (33, 33), generator=torch.Generator().manual_seed(1)).float().to(device.torch_device)
    out = torch.zeros(64, 33, device=device.torch_device)

    def work(size: int) -> Callable[[], None]:
        def launch() -> None:
            hidden = (x[:size] @ weight).clamp(-50, 50)
            extra = hidden.sum(0, keepdim=True) + torch.zeros(size, 33, device=device.torch_device)
            out[:size].copy_(hidden - extra)

        return launch

    made = {size: capture(conformance_platform, graphs, work(size)) for size in sizes}
    rng = random.Random(0)
    for step in range(40):
        size = rng.choice(sizes)
        x.copy_(torch.randint(-3, 4, (64, 33), generator=torch.Generator().manual_seed(step)).float())
        out.fill_(-7)
        made[size].replay()
        got = out.clone()
        out.fill_(-7)
        work(size)()
        assert torch.equal(got, out), f"the graph of size {size}, replay {step}"


def test_replays_keep_their_order(conformance_platform: Platform, graphs: GraphRuntime | None) -> None:
    """A replay comes after what was launched before it and before what is launched after, with no wait between."""
    if graphs is None:
        return
    device = conformance_platform.device()
    x, out = (torch.zeros(512, 512, device=device.torch_device) for _ in range(2))
    graph = capture(conformance_platform, graphs, lambda: out.copy_(x + 1))
    heavy = torch.ones(512, 512, device=device.torch_device)
    seen = []
    for step in range(10):
        for _ in range(5):
            heavy = (heavy @ heavy).clamp(-1, 1)
        x.copy_(heavy * step)
        graph.replay()
        seen.append(out.clone())
        x.fill_(-1)
    for step, got in enumerate(seen):
        assert bool((got == step + 1).all()), f"replay {step} was out of order"


class _PlannedError(RuntimeError):
    """Raised inside a capture, on purpose."""


def test_failed_capture(conformance_platform: Platform, graphs: GraphRuntime | None) -> None:
    """An exception inside of a capture comes out as it is; the device, earlier graphs and new captures work on."""
    if graphs is None:
        return
    device = conformance_platform.device()
    x, out = (torch.zeros(100, device=device.torch_device) for _ in range(2))
    before = capture(conformance_platform, graphs, lambda: out.copy_(x * 2))

    def broken() -> None:
        out.copy_(x * 3)
        raise _PlannedError

    for _ in range(2):
        with pytest.raises(_PlannedError):
            graphs.capture(broken)
    device.synchronize()
    x.fill_(5)
    assert bool((x + 1 == 6).all()), "the device is not usable"
    after = capture(conformance_platform, graphs, lambda: out.copy_(x * 4))
    for graph, factor in ((before, 2), (after, 4), (before, 2)):
        graph.replay()
        assert bool((out == 5 * factor).all())


# ------------------------------------------------------------------------------------------- attention in graphs


@dataclass
class Static:
    """The tensors that a captured step reads and writes, which keep their addresses.

    Attributes:
        first: the step that it was made with.
        batch: whose tensors every step copies its own into.
        out, lse: what the captured call writes.
    """

    first: Arena
    batch: AttentionBatch
    out: Tensor
    lse: Tensor | None

    @classmethod
    def of(cls, arena: Arena, *, uniform: bool, max_query_len: int, max_seq_len: int) -> Static:
        """Static tensors for steps of the shape of `arena`; host fields stay the first step's."""
        batch = replace(
            arena.batch,
            num_decodes=arena.batch.num_requests if uniform else 0,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            captured=True,
        )
        return cls(arena, batch, *outputs(arena))

    def load(self, arena: Arena) -> AttentionBatch:
        """Put a step where the graph reads it; the batch with that step's host fields, for `refresh`."""
        for name in ("query_start", "seq_lens", "block_table", "slots"):
            getattr(self.batch, name).copy_(getattr(arena.batch, name))
        for mine, theirs in zip(self.first.tokens, arena.tokens, strict=True):
            mine.copy_(theirs)
        self.first.buffer.copy_(arena.buffer)
        garbage, lse = outputs(arena)
        self.out.copy_(garbage)
        first = self.first
        for held, new in ((self.lse, lse), (first.sinks, arena.sinks), (first.alibi_slopes, arena.alibi_slopes)):
            if held is not None and new is not None:
                held.copy_(new)
        return replace(
            self.batch,
            query_start_host=arena.batch.query_start_host,
            seq_lens_host=arena.batch.seq_lens_host,
        )

    def launch(self, backend: AttentionBackend, plan: Plan) -> Callable[[], None]:
        """The call that is captured."""
        arena = self.first
        q, k, v = arena.tokens

        def call() -> None:
            extras: dict[str, Any] = {"sinks": arena.sinks, "alibi_slopes": arena.alibi_slopes, "lse": self.lse}
            reads = arena.case.reads
            backend.forward(q, None if reads else k, None if reads else v, arena.cache, plan, self.out, **extras)

        return call

    def verify(self, arena: Arena, declared: Capabilities) -> None:
        """Check what the replay for `arena` left in the static tensors."""
        done = replace(arena, buffer=self.first.buffer, cache=self.first.cache)
        verify(done, self.out, self.lse, numerics=declared.numerics)


def decode_steps(spec: AttentionSpec, size: int, limit: int, bucket: int, extra: int = 0) -> list[Case]:
    """Steps of a bucket of decodes: short, longer, with fewer live rows, at the limit, and short again."""
    most = limit - 1
    drawn = [
        [3, 1, size - 1, size],
        [2 * size, most, 0, size + 1],
        [most],
        [0, 2 * size + 1],
        [size, size - 1, most - 1],
        [1, 3, 0, 0],
    ]
    common: dict[str, Any] = {
        "num_blocks": 5 * -(-limit // size) + 4,
        "width": -(-limit // size) + 2,
        "padding_tokens": extra,
    }
    return [
        Case(
            spec,
            size,
            tuple(Row(min(most, max(0, n)), 1) for n in computed[:bucket]),
            empty_rows=bucket - len(computed[:bucket]),
            seed=seed,
            mode=("needle", "randn", "sharp")[seed % 3],
            spare_blocks=1,
            **common,
        )
        for seed, computed in enumerate(drawn)
    ]


def mixed_steps(spec: AttentionSpec, size: int, limit: int, rows: int, tokens: int) -> list[Case]:
    """Steps of any kind in `rows` rows and `tokens` tokens: queries of several lengths, decodes, and rows at rest."""
    drawn = [
        [Row(2, 1), Row(0, size + 1), Row(3, 2)],
        [Row(limit - 1, 1), Row(size, 1), Row(0, 1), Row(5, 1)],
        [Row(0, tokens - 1)],
        [Row(1, 1), Row(limit - size, size), Row(0, 3)],
        [Row(size, 1), Row(0, 2)],
    ]
    common: dict[str, Any] = {"num_blocks": 5 * -(-limit // size) + 8, "width": -(-limit // size) + 2}
    return [
        Case(
            spec,
            size,
            tuple(case),
            idle_rows=rows - len(case),
            padding_tokens=tokens - sum(row.new for row in case),
            seed=seed,
            mode=("needle", "randn", "sharp")[seed % 3],
            spare_blocks=1,
            **common,
        )
        for seed, case in enumerate(drawn)
    ]


def replays(
    platform: Platform,
    declared: Capabilities,
    graphs: GraphRuntime,
    backend: AttentionBackend,
    cases: Sequence[Case],
    *,
    uniform: bool,
    max_query_len: int,
    limit: int,
) -> None:
    """Capture the first step, then replay all of them, the first again too, each checked like an eager call."""
    device = platform.device()
    arenas = [prepare(backend, case, declared, device.torch_device) for case in cases]
    static = Static.of(
        prepare(backend, cases[0], declared, device.torch_device),
        uniform=uniform,
        max_query_len=max_query_len,
        max_seq_len=limit,
    )
    plan = backend.plan(static.batch)
    graph = capture(platform, graphs, static.launch(backend, plan))
    # Eager steps between replays have plans of their own.
    other = replace(cases[0], seed=99, spare_blocks=9)
    for arena in [*arenas, *reversed(arenas)]:
        arena = prepare(backend, arena.case, declared, device.torch_device)
        between = prepare(backend, other, declared, device.torch_device)
        q, k, v = between.tokens
        extras = {"sinks": between.sinks, "alibi_slopes": between.alibi_slopes}
        backend.forward(q, k, v, between.cache, backend.plan(between.batch), outputs(between)[0], lse=None, **extras)
        backend.refresh(plan, static.load(arena))
        graph.replay()
        device.synchronize()
        static.verify(arena, declared)


def layers_of(declared: Capabilities, feature: str) -> list[AttentionSpec]:
    """Layers with a feature, one a dtype for plain ones; none where it is not declared."""
    if feature != "causal" and feature not in declared.attention:
        return []
    specs = [layer(declared, dtype=dtype) for dtype in (dtypes(declared) if feature == "causal" else [None])]
    size = block(declared)
    options: dict[str, dict[str, Any]] = {
        "sliding_window": {"window": size + 1},
        "chunked": {"chunk": size + 3},
        "softcap": {"softcap": 5.0},
        "sinks": {"sinks": True},
        "alibi": {"alibi": True},
    }
    return [replace(spec, **options.get(feature, {})) for spec in specs]


def _limit(scale: Scale, size: int) -> int:
    return max(2 * size + 3, scale.tokens(max(3 * size, 200)))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("bucket", [1, 4])
def test_captured_decodes(
    conformance_platform: Platform,
    capabilities: Capabilities,
    graphs: GraphRuntime | None,
    scale: Scale,
    feature: str,
    bucket: int,
) -> None:
    """A bucket of decodes: other lengths, tables, slots and values at each replay; fewer live rows; the limits."""
    if graphs is None:
        return
    size = block(capabilities)
    limit = _limit(scale, size)
    for spec in layers_of(capabilities, feature):
        backend = conformance_platform.attention(spec)
        for extra in (0, 2) if feature == "causal" else (0,):
            steps = decode_steps(spec, size, limit, bucket, extra)
            uniform = capabilities.graphs == "uniform"
            replays(
                conformance_platform, capabilities, graphs, backend, steps,
                uniform=uniform, max_query_len=1, limit=limit,
            )  # fmt: skip


@pytest.mark.conformance(capability="graphs.full")
@pytest.mark.parametrize("feature", FEATURES)
def test_captured_mixed_batches(
    conformance_platform: Platform,
    capabilities: Capabilities,
    graphs: GraphRuntime | None,
    scale: Scale,
    feature: str,
    record_property: Record,
) -> None:
    """Where graphs are ``"full"``: rows of any query length, which only the device's `query_start` knows."""
    if graphs is None:
        return
    if capabilities.graphs != "full":
        record_property("rejected", "graphs.full")
        return
    size = block(capabilities)
    limit, tokens = _limit(scale, size), size + 12
    for spec in layers_of(capabilities, feature):
        steps = mixed_steps(spec, size, limit, 5, tokens)
        replays(
            conformance_platform, capabilities, graphs, conformance_platform.attention(spec), steps,
            uniform=False, max_query_len=tokens, limit=limit,
        )  # fmt: skip


def test_one_graph_of_two_groups(
    conformance_platform: Platform, capabilities: Capabilities, graphs: GraphRuntime | None, scale: Scale
) -> None:
    """Two kinds of layer in one graph, each with a plan and tables of its own, over the same rows."""
    if graphs is None:
        return
    device, size = conformance_platform.device(), block(capabilities)
    limit = _limit(scale, size)
    plain = layer(capabilities)
    windowed = "sliding_window" in capabilities.attention
    specs = [plain, replace(plain, window=size) if windowed else replace(plain, scale=0.11)]
    backends = [conformance_platform.attention(spec) for spec in specs]
    steps = [decode_steps(spec, size, limit, 4) for spec in specs]
    uniform = capabilities.graphs == "uniform"
    statics = [
        Static.of(
            prepare(backend, cases[0], capabilities, device.torch_device),
            uniform=uniform,
            max_query_len=1,
            max_seq_len=limit,
        )
        for backend, cases in zip(backends, steps, strict=True)
    ]
    plans = [backend.plan(static.batch) for backend, static in zip(backends, statics, strict=True)]

    def launch() -> None:
        for backend, static, plan in zip(backends, statics, plans, strict=True):
            static.launch(backend, plan)()

    graph = capture(conformance_platform, graphs, launch)
    for index in (1, 2, 0, 3, 4, 1):
        arenas = [
            prepare(backend, replace(cases[index], seed=31 * i + index), capabilities, device.torch_device)
            for i, (backend, cases) in enumerate(zip(backends, steps, strict=True))
        ]
        for backend, static, plan, arena in zip(backends, statics, plans, arenas, strict=True):
            backend.refresh(plan, static.load(arena))
        graph.replay()
        device.synchronize()
        for static, arena in zip(statics, arenas, strict=True):
            static.verify(arena, capabilities)


def test_buckets_share_their_tensors(
    conformance_platform: Platform, capabilities: Capabilities, graphs: GraphRuntime | None, scale: Scale
) -> None:
    """Graphs of several bucket sizes over the same static tensors, of which each reads the beginning."""
    if graphs is None:
        return
    device, size = conformance_platform.device(), block(capabilities)
    limit = _limit(scale, size)
    spec = layer(capabilities)
    backend = conformance_platform.attention(spec)
    uniform = capabilities.graphs == "uniform"
    largest = Static.of(
        prepare(backend, decode_steps(spec, size, limit, 4)[0], capabilities, device.torch_device),
        uniform=uniform,
        max_query_len=1,
        max_seq_len=limit,
    )
    made = {}
    for bucket in (4, 2, 1):
        static = _first_rows(largest, bucket)
        plan = backend.plan(static.batch)
        made[bucket] = static, plan, capture(conformance_platform, graphs, static.launch(backend, plan))
    for step, bucket in enumerate((1, 4, 2, 1, 2, 4, 4, 1)):
        static, plan, graph = made[bucket]
        cases = decode_steps(spec, size, limit, bucket)
        case = replace(cases[step % len(cases)], num_blocks=largest.first.case.num_blocks, seed=step)
        arena = prepare(backend, case, capabilities, device.torch_device)
        backend.refresh(plan, static.load(arena))
        graph.replay()
        device.synchronize()
        static.verify(arena, capabilities)


def _first_rows(static: Static, bucket: int) -> Static:
    """The first rows of a step of decodes, as views of its tensors."""
    batch = static.batch
    part = replace(
        batch,
        query_start=batch.query_start[: bucket + 1],
        query_start_host=batch.query_start_host[: bucket + 1],
        seq_lens=batch.seq_lens[:bucket],
        seq_lens_host=batch.seq_lens_host[:bucket],
        block_table=batch.block_table[:bucket],
        slots=batch.slots[:bucket],
        num_decodes=min(batch.num_decodes, bucket),
    )
    case = replace(static.first.case, rows=static.first.case.rows[:bucket], empty_rows=0)
    first = replace(static.first, case=case, tokens=tuple(x[:bucket] for x in static.first.tokens))
    return Static(first, part, static.out[:bucket], None)


def test_collectives_in_graphs(
    conformance_platform: Platform, capabilities: Capabilities, graphs: GraphRuntime | None, record_property: Record
) -> None:
    """A communicator that says that it is capturable is; here with a group of one rank, more in L4."""
    if graphs is None or not capabilities.collectives:
        return
    device = conformance_platform.device()
    group = conformance_platform.communicator(GroupSpec("tp", (0,), 0))
    if not group.capturable:
        record_property("rejected", "capturable")
        return
    x, out = (torch.zeros(100, device=device.torch_device) for _ in range(2))
    graph = capture(conformance_platform, graphs, lambda: out.copy_(group.all_reduce(x) + 1))
    for value in (3.0, 4.0):
        x.fill_(value)
        graph.replay()
        assert bool((out == value + 1).all())
