"""The mutation gate itself: its catalogue is whole, it catches, it is fair, and it fails when it should."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path

import pytest

from engine_mutation import gate
from engine_mutation.catalogue import Mutant, catalogue
from engine_mutation.gate import Pool, Task, Verdict

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "conformance_tests" / "engine_conformance"


@pytest.fixture(scope="module")
def mutants() -> Iterator[dict[str, Mutant]]:
    with gate.installed():
        yield catalogue()


def test_catalogue_is_large_and_says_what_it_is(mutants: dict[str, Mutant]) -> None:
    faulty = [m for m in mutants.values() if m.faulty]
    correct = [m for m in mutants.values() if not m.faulty]
    assert len(faulty) >= 60
    assert len(correct) >= 10
    assert {"null", "liar"} <= set(mutants)
    assert {m.tier for m in faulty} == {"L0", "L1", "L2", "L3", "L4", "L5", "L6"}
    assert all(m.says.endswith(".") and len(m.says) < 140 for m in mutants.values())
    assert all(m.modules for m in correct)


def test_every_mutant_names_cases_that_there_are(mutants: dict[str, Mutant]) -> None:
    for mutant in mutants.values():
        for case in mutant.modules or (mutant.killer,):
            file, _, name = case.partition("::")
            path = ROOT / file if file.startswith("tests/") else SUITE / file
            assert path.is_file(), f"{mutant.name}: no {file}"
            assert f"def {name.partition('[')[0]}(" in path.read_text() or not name, f"{mutant.name}: no {case}"


def test_nothing_that_is_shipped_knows_the_mutants() -> None:
    folders = ("core", "plugin_sdk", "platforms", "conformance_tests/engine_conformance", "examples")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py") if "engine_mutation" in p.read_text()]
    assert not found


def run(*names: str) -> subprocess.CompletedProcess[str]:
    words = [word for name in names for word in ("--only", name)]
    command = [str(ROOT / "scripts" / "mutation"), "--seeds", "1", *words]
    env = os.environ | {"VIRTUAL_ENV": str(Path(sys.executable).parents[1])}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_few() -> None:
    """Faults of several parts of a platform are killed by the cases that they name, and right variants pass."""
    faults = ("null", "liar", "causal_one_ahead", "values_not_copied", "epsilon_outside_the_root", "sum_in_place")
    done = run(*faults, "head_major_cache", "ops_in_fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in faults:
        assert f"killed    {name} by " in done.stdout
    assert f"{len(faults)} of {len(faults)} faults killed, 2 of 2 right variants passed" in done.stdout


def test_a_name_that_there_is_not() -> None:
    done = run("nobody")
    assert done.returncode == 1
    assert "no mutant nobody" in done.stderr


class Runs(Pool):
    """A pool that runs nothing: `failing` has the cases that fail, by mutant."""

    def __init__(self, failing: dict[str, Set[str]]) -> None:
        super().__init__(1)
        self.failing = failing

    def run(self, tasks: Sequence[Task]) -> Iterator[Verdict]:
        for task in tasks:
            failed = self.failing.get(task.mutant.name, set()) & {*task.cases, f"seed {task.seed}"}
            yield Verdict(task, tuple(failed), "because", 1.0)


CASE = "test_ops.py::test_linear"


def judge(failing: Set[str], control: Set[str] = frozenset()) -> gate.Outcome:
    with gate.installed():
        pool = Runs({"planted": failing, "loop_of_requests": control})
        (outcome,) = gate.judge_faults([Mutant("planted", "Is planted.", object, "L1", CASE)], pool, print)
    return outcome


def test_a_fault_that_its_case_kills_is_no_problem() -> None:
    outcome = judge({CASE})
    assert (outcome.killer, outcome.problem) == (CASE, "")


def test_a_fault_that_nothing_kills_is_a_problem() -> None:
    outcome = judge(set())
    assert not outcome.killer
    assert outcome.problem == f"{CASE} let it pass; nothing killed it"


def test_a_case_that_lost_its_power_is_a_problem() -> None:
    outcome = judge({"test_ops.py"})
    assert outcome.killer == "test_ops.py"
    assert outcome.problem == f"{CASE} let it pass; test_ops.py killed it"


def test_a_case_that_fails_what_is_right_proves_nothing() -> None:
    outcome = judge({CASE}, control={CASE})
    assert outcome.problem == f"{CASE} fails on loop_of_requests, which is right"


def test_a_right_variant_that_fails_with_one_seed_is_a_problem() -> None:
    mutant = Mutant("planted", "Is planted.", object, modules=("test_ops.py",))
    fair, unfair = (
        gate.judge_variants([mutant], 10, Runs({"planted": failing}), print)[0] for failing in (set(), {"seed 7"})
    )
    assert not fair.problem
    assert unfair.problem.endswith("with seed 7")


def test_the_score_counts_what_was_killed_and_what_passed() -> None:
    killed, survived = judge({CASE}), judge(set())
    passed = gate.Outcome(replace(killed.mutant, tier=""), "", "", "", 1.0)
    failed = replace(passed, problem="failed")
    made = gate.score([killed, killed, survived, passed, failed], 10)
    assert (made["killed"], made["faulty"], made["passed"], made["correct"]) == (2, 3, 1, 2)


def test_the_score_that_reports_show_is_of_this_catalogue(mutants: dict[str, Mutant]) -> None:
    """Run ``scripts/mutation`` after a change of the catalogue: reports show what it wrote last."""
    made = json.loads(gate.SCORE.read_text())
    assert made["killed"] == made["faulty"] == sum(m.faulty for m in mutants.values())
    assert made["passed"] == made["correct"] == sum(not m.faulty for m in mutants.values())
