"""Runs the suite on every mutant: a fault must be killed by the case that it names, a right variant by none.

Torch, pytest and the suite are imported once; each run is a fork of that process, which costs a tenth of a second
instead of five. A fault's own case runs first. Where that lets it pass, the rest of the suite has a go, so that the
report tells a fault that nothing sees from a case that lost its power: both fail the gate.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import inspect
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_mutation.catalogue import FAMILY, CoreFault, Late, Mutant, catalogue
from engine_sdk import GraphRuntime

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "conformance_tests" / "engine_conformance"
SCORE = SUITE / "mutation.json"
"""What reports show: how many faults were killed, and how many right variants passed."""

EXAMPLES = 0.15
"""Share of a smoke run's examples that a right variant draws with each seed; ten seeds make more than one."""

LIMIT = 60
"""Seconds that one case may take before it counts as failed."""

_PATIENCE = 600.0
_NPU = ROOT / "examples" / "engine-plugin-npu"
_REST = {
    "L0": ("test_device.py", "test_plugin_rules.py"),
    "L1": ("test_ops.py", "test_sampling.py"),
    "L2": ("test_attention.py",),
    "L3": ("test_kv_cache.py", "test_attention.py"),
    "L4": ("test_communicator.py",),
    "L5": ("test_graphs.py",),
    "L6": ("test_engine.py",),
}
"""By tier, the modules that have a go at a fault that its own case let pass."""


_MISSING = "no such case"
_DRAWN = "certify("
"""Of the source of a case that draws its inputs."""

_PLUGINS = ("hypothesispytest", "timeout", "engine_conformance")
_WITHOUT = ("cacheprovider", "unraisableexception")  # the latter collects garbage, which takes longer than most cases
_OPTIONS = ("-q", "--assert=plain", *(f"-p{name}" for name in (*_PLUGINS, *(f"no:{name}" for name in _WITHOUT))))


@dataclass(frozen=True)
class Task:
    """One fork: some cases on one mutant."""

    mutant: Mutant
    cases: tuple[str, ...]
    seed: int = 0
    examples: float = 1.0
    first: bool = True


@dataclass(frozen=True)
class Verdict:
    """What came of a task: the cases that failed, with the reason of the first; CPU seconds with children."""

    task: Task
    failed: tuple[str, ...]
    why: str
    seconds: float
    ran: int = 1


def node(case: str, mutant: Mutant) -> str:
    """A case as pytest names it below the root, the platform's name as its first parameter; or what they begin with."""
    path = case if case.startswith("tests/") else f"{SUITE.relative_to(ROOT)}/{case}"
    return path.replace("[", f"[{platform_name(mutant)}-")


def is_of(found: str, case: str) -> bool:
    """Whether a test is a case, one of a case's parameters, or in a module."""
    return found == case or found.startswith((f"{case}[", f"{case}::"))


def platform_name(mutant: Mutant) -> str:
    """What ``--platform`` is given."""
    return f"{FAMILY}:{mutant.name}"


class Recorder:
    """A plugin of pytest's that chooses cases, and remembers what failed.

    Args:
        wanted: the cases.
        drawn_only: leave out cases without Hypothesis, for which one seed is like another.
    """

    def __init__(self, wanted: Sequence[str], drawn_only: bool = False) -> None:
        self._wanted, self._drawn_only = wanted, drawn_only
        self.failed: list[str] = []
        self.why = ""
        self.ran = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Choose."""
        items[:] = [i for i in items if any(is_of(i.nodeid, w) for w in self._wanted)]
        if self._drawn_only:
            items[:] = [i for i in items if isinstance(i, pytest.Function) and _DRAWN in inspect.getsource(i.function)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a failure."""
        self.ran += report.when == "call"
        if report.failed:
            self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that cannot be collected has failed too."""
        if report.failed:
            self._add(report)

    def _add(self, report: Any) -> None:
        self.failed.append(report.nodeid)
        self.why = self.why or str(report.longrepr)


def preload() -> None:
    """Import what every run needs, so that forks share it. Nothing computes yet: threads do not survive a fork."""
    import hypothesis
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import engine_conformance.architectures
    import engine_conformance.arena
    import engine_conformance.ranks  # noqa: F401

    torch.set_num_threads(1)
    # A failure is enough: a smaller one is not looked for.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutation", phases=phases, report_multiple_bugs=False)
    hypothesis.settings.load_profile("mutation")
    catalogue()
    gc.freeze()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Make the family ``mutant:`` known to this process and to those it starts, as an installed plugin is."""
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "engine_mutation-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-mutation\nVersion: 0\n")
        points = f"[engine.platform_families]\n{FAMILY} = engine_mutation.catalogue:mutant_platform\n"
        (info / "entry_points.txt").write_text(points)
        places = [folder, str(SUITE.parent), str(_NPU)]
        before, path = os.environ.get("PYTHONPATH"), list(sys.path)
        os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [before])])
        sys.path[:0] = places
        try:
            yield
        finally:
            sys.path[:] = path
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def run_here(task: Task, output: Any) -> dict[str, Any]:
    """Run a task in this process, which is of no use afterwards."""
    from engine_conformance import cases, ranks

    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    # Ranks that are forked start at once, and a hang need not be waited for so long.
    vars(ranks)["multiprocessing"] = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    ranks._PATIENCE = 45.0
    checks = {c.partition("[")[2].removesuffix("]") for c in task.cases if "::test_collectives[" in c}
    if checks:
        for name in set(ranks.CHECKS) - checks:
            del ranks.CHECKS[name]
    smoke = cases.SCALES["smoke"]
    cases.SCALES["smoke"] = replace(smoke, examples=smoke.examples * task.examples)
    if issubclass(task.mutant.part, CoreFault):
        task.mutant.part.patch()
    nodes = [node(case, task.mutant) for case in task.cases]
    recorder = Recorder(nodes, drawn_only=task.seed > 0)
    files = sorted({str(ROOT / name.partition("::")[0]) for name in nodes})
    options = [*_OPTIONS, f"--timeout={LIMIT}", f"--rootdir={ROOT}", f"--conformance-seed={task.seed}"]
    options += ["-x"] if task.first else []
    # Unit tests of our own core take no platform but the one they name.
    options += [] if task.cases[0].startswith("tests/") else ["--platform", platform_name(task.mutant)]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    code = pytest.main([*options, *files], plugins=[recorder])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        recorder.failed = [_MISSING]
    elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        output.seek(0)
        raise RuntimeError(f"the suite did not begin\n{output.read().decode(errors='replace').strip()[-2000:]}")
    return {"failed": recorder.failed, "why": recorder.why, "ran": recorder.ran}


class Pool:
    """Runs tasks in forks, so many at a time."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._running: dict[int, tuple[Task, Any, Any, float]] = {}

    def run(self, tasks: Sequence[Task]) -> Iterator[Verdict]:
        """The verdicts, as they come."""
        waiting = list(tasks)[::-1]
        while waiting or self._running:
            while waiting and len(self._running) < self._jobs:
                self._start(waiting.pop())
            yield self._wait()

    def _start(self, task: Task) -> None:
        result, output = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115, closed with the process
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self._running[pid] = task, result, output, time.monotonic()
            return
        code = 1
        try:
            os.setpgid(0, 0)
            os.chdir(tempfile.mkdtemp())
            try:
                said = run_here(task, output)
            except BaseException:
                said = {"fault": traceback.format_exc()}
            result.write(json.dumps(said).encode())
            result.flush()
            code = 0
        finally:
            os._exit(code)

    def _wait(self) -> Verdict:
        while True:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid in self._running:
                break
            for late, (_, _, _, began) in self._running.items():
                if time.monotonic() - began > _PATIENCE:
                    os.killpg(late, signal.SIGKILL)
            time.sleep(0.02)
        task, result, output, _ = self._running.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it has started
        seconds = usage.ru_utime + usage.ru_stime
        result.seek(0)
        if text := result.read():
            said = json.loads(text)
            if "fault" in said:
                raise RuntimeError(f"{task.mutant.name}: the gate itself failed\n{said['fault']}")
            return Verdict(task, tuple(said["failed"]), said["why"], seconds, said["ran"])
        output.seek(0)
        said = output.read().decode(errors="replace")[-2000:]
        return Verdict(task, ("the process",), f"ended with {status}\n{said}", seconds)


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant. `problem` is empty where it did what it should."""

    mutant: Mutant
    killer: str
    problem: str
    why: str
    seconds: float


def control_of(mutant: Mutant) -> str:
    """The right variant that a fault is made of: what fails on it too proves nothing."""
    if issubclass(mutant.part, Late):
        return "runs_late"
    return "host_replay" if issubclass(mutant.part, GraphRuntime) else "loop_of_requests"


def judge_controls(mutants: Sequence[Mutant], pool: Pool, show: Callable[[str], None]) -> dict[str, str]:
    """Run the faults' cases on what the faults are made of; the names of faults whose case fails there, with why."""
    groups: dict[tuple[str, bool], list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault((control_of(mutant), mutant.killer.startswith("tests/")), []).append(mutant)
    tasks = {
        Task(catalogue()[name], tuple(sorted({m.killer for m in members})), first=False): members
        for (name, _), members in groups.items()
    }
    found: dict[str, str] = {}
    for verdict in pool.run(list(tasks)):
        control, failed = verdict.task.mutant, [short(f, verdict.task.mutant) for f in verdict.failed]
        show(f"control   {control.name}: {len(failed)} of {verdict.ran} cases failed, {verdict.seconds:.1f} s")
        for mutant in tasks[verdict.task]:
            case = mutant.killer.rpartition("/")[2]
            if bad := [f for f in failed if is_of(f, case) or not f.startswith("test_")]:
                found[mutant.name] = f"{bad[0]} fails on {control.name}, which is right\n{verdict.why}"
    return found


def judge_faults(mutants: Sequence[Mutant], pool: Pool, show: Callable[[str], None]) -> list[Outcome]:
    """Run each fault's own case, then the rest on those that it let pass."""
    outcomes: dict[str, Outcome] = {}
    passed: list[Verdict] = []
    unfair = judge_controls(mutants, pool, show)
    for verdict in pool.run([Task(m, (m.killer,)) for m in mutants]):
        mutant = verdict.task.mutant
        if not verdict.failed or verdict.failed == (_MISSING,):
            passed.append(verdict)
            continue
        killer = short(verdict.failed[0], mutant)
        problem, _, why = unfair.get(mutant.name, "").partition("\n")
        proof = "" if problem else killer
        outcomes[mutant.name] = Outcome(mutant, proof, problem, why or verdict.why, verdict.seconds)
        show(f"{'UNFAIR   ' if problem else 'killed   '} {mutant.name} by {killer} in {verdict.seconds:.1f} s")
    seconds = {v.task.mutant.name: v.seconds for v in passed}
    missing = {v.task.mutant.name for v in passed if v.failed}
    for verdict in pool.run([Task(v.task.mutant, _REST[v.task.mutant.tier]) for v in passed]):
        mutant = verdict.task.mutant
        killer = short(verdict.failed[0], mutant) if verdict.failed else ""
        lost = "does not exist" if mutant.name in missing else "let it pass"
        problem = f"{mutant.killer} {lost}" + (f"; {killer} killed it" if killer else "; nothing killed it")
        took = verdict.seconds + seconds[mutant.name]
        outcomes[mutant.name] = Outcome(mutant, killer, problem, verdict.why, took)
        show(f"{'LET PASS ' if killer else 'SURVIVED '} {mutant.name}: {problem}, {took:.1f} s")
    return [outcomes[m.name] for m in mutants]


def draws(mutant: Mutant) -> bool:
    """Whether another seed draws other inputs in the modules that a right variant must pass."""
    return any(_DRAWN in (SUITE / module).read_text() for module in mutant.modules)


def judge_variants(mutants: Sequence[Mutant], seeds: int, pool: Pool, show: Callable[[str], None]) -> list[Outcome]:
    """Run each right variant with every seed."""
    found: dict[str, list[Verdict]] = {m.name: [] for m in mutants}
    tasks = [
        Task(m, m.modules, seed, EXAMPLES, first=False)
        for seed in range(seeds)
        for m in mutants
        if seed == 0 or draws(m)
    ]
    for verdict in pool.run(tasks):
        mutant, seed = verdict.task.mutant, verdict.task.seed
        found[mutant.name].append(verdict)
        failed = ", ".join(short(f, mutant) for f in verdict.failed)
        said = f"FAILED   {failed}" if failed else f"passed   {verdict.ran} cases"
        show(f"{said}: {mutant.name}, seed {seed}, {verdict.seconds:.1f} s")
    outcomes = []
    for mutant in mutants:
        verdicts = found[mutant.name]
        bad = next((v for v in verdicts if v.failed or not v.ran), None)
        problem = f"failed {', '.join(short(f, mutant) for f in bad.failed)} with seed {bad.task.seed}" if bad else ""
        outcomes.append(Outcome(mutant, "", problem, bad.why if bad else "", sum(v.seconds for v in verdicts)))
    return outcomes


def short(case: str, mutant: Mutant) -> str:
    """A test's id without its folder and the platform's name."""
    name = platform_name(mutant)
    return case.rpartition("/")[2].replace(f"[{name}-", "[").replace(f"[{name}]", "")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each mutant, then the score."""
    rows = [(o.mutant.tier or "right", o.mutant.name, o.problem or o.killer or "passed", o) for o in outcomes]
    width = max((len(name) for _, name, _, _ in rows), default=0)
    return "\n".join(f"{tier:5} {name:{width}} {o.seconds:6.1f} s  {text}" for tier, name, text, o in rows)


def score(outcomes: Sequence[Outcome], seeds: int) -> dict[str, Any]:
    """The data that reports show."""
    from engine.version import __version__

    faulty = [o for o in outcomes if o.mutant.faulty]
    correct = [o for o in outcomes if not o.mutant.faulty]
    return {
        "killed": sum(bool(o.killer) for o in faulty),
        "faulty": len(faulty),
        "passed": sum(not o.problem for o in correct),
        "correct": len(correct),
        "seeds": seeds,
        "tiers": {t: sum(o.mutant.tier == t for o in faulty) for t in sorted({o.mutant.tier for o in faulty})},
        "suite": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, or all; raises `SystemExit` for a name that there is not."""
    known = catalogue()
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"no mutant {', '.join(unknown)}; scripts/mutation --list shows them")
    return [known[name] for name in names] or list(known.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gate; 0 where every fault is killed by its case and every right variant passes, else 1."""
    parser = argparse.ArgumentParser(prog="scripts/mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="how often each right variant runs (10)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="one mutant; may be repeated")
    parser.add_argument("--tier", action="append", default=[], metavar="L2", help="faults of one tier; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="forks at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome")
    parser.add_argument("--why", action="store_true", help="print how each fault was found")
    parser.add_argument("--list", action="store_true", help="print the catalogue, and run nothing")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with installed():
        preload()
        mutants = chosen(options.only)
        if options.tier:
            mutants = [m for m in mutants if m.tier in options.tier]
        if options.list:
            print("\n".join(f"{m.tier or 'right':5} {m.name}: {m.says}" for m in mutants))
            return 0
        pool = Pool(options.jobs)

        def show(line: str) -> None:
            print(f"{time.monotonic() - began:6.1f} {line}", flush=True)

        outcomes = judge_faults([m for m in mutants if m.faulty], pool, show)
        if options.seeds:
            outcomes += judge_variants([m for m in mutants if not m.faulty], options.seeds, pool, show)
    print(table(outcomes))
    for outcome in outcomes:
        if outcome.why and (options.why or outcome.problem):
            print(f"\n{outcome.mutant.name}: {outcome.mutant.says}\n{outcome.why[-1500:]}")
    made = score(outcomes, options.seeds)
    took, used = time.monotonic() - began, sum(o.seconds for o in outcomes)
    print(
        f"{made['killed']} of {made['faulty']} faults killed, {made['passed']} of {made['correct']} right variants "
        f"passed with {options.seeds} seeds; {took:.0f} s, {used:.0f} s of CPU time"
    )
    if options.json:
        rows = [
            {"name": o.mutant.name, "killer": o.killer, "problem": o.problem, "seconds": o.seconds} for o in outcomes
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    problems = [o for o in outcomes if o.problem]
    if not (options.only or options.tier) and options.seeds >= 10:
        SCORE.write_text(json.dumps(made, indent=1) + "\n")
    for outcome in problems:
        print(f"{outcome.mutant.name}: {outcome.problem}")
    return 1 if problems else 0
