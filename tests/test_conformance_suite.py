"""The suite's machinery: what a case is, what came of it, who runs it, and what is written about it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from engine.errors import ConfigError, PluginError
from engine.extensions.cli import main
from engine.plugins import load_platform
from engine_conformance import seeds
from engine_conformance.catalogue import LISTING, PROFILES, Entry, Listing, listing
from engine_conformance.certificate import assess, certificate, check, merge
from engine_conformance.command import collect
from engine_conformance.compare import compare
from engine_conformance.junit import write_junit
from engine_conformance.outcomes import verdict
from engine_conformance.page import page
from engine_conformance.results import Outcome, Requirement, Result, Run, Subject, Suite, declares, read, write
from engine_conformance.rules import changed, forbidden_imports, imported, load_ours, patches, snapshot
from engine_conformance.subject import ask, digest, subject_of
from engine_conformance.subject import suite as suite_here
from engine_conformance.waivers import Waiver, load, select
from engine_sdk import Capabilities, TorchPlatform

pytest_plugins = ["pytester"]

TODAY = date(2026, 6, 1)
DECLARED = Capabilities(attention=frozenset({"sinks"}), collectives=frozenset({"all_reduce"})).to_dict()


def entry(name: str, capability: str = "", *, must: bool | None = None) -> Entry:
    needed = not capability if must is None else must
    return Entry(name, name[:2], capability or "device", needed, tuple(PROFILES))


ENTRIES = (
    entry("L0.device.events"),
    entry("L2.attention.causal"),
    entry("L2.attention.agrees[sinks]", "sinks"),
    entry("L2.attention.agrees[alibi]", "alibi"),
    entry("L5.graphs.replay", "graphs"),
    entry("L8.performance.launches", "performance"),
)
KNOWN = Listing("5.0", ENTRIES)
WAIVER = Waiver(
    "L2.attention.agrees[sinks]", "xfail", "*", "*", "https://x.org/1", "rounds twice", TODAY + timedelta(30)
)


def run_of(outcomes: dict[str, Outcome] | None = None, *, graphs: str = "none", **changes: Any) -> Run:
    """A run of `ENTRIES` on a platform that has sinks: all well, but for `outcomes`."""
    declared = {**DECLARED, "graphs": graphs}
    results = []
    for e in ENTRIES:
        usual = Outcome.REJECTED_OK if declares(declared, e.capability) is False else Outcome.PASS
        outcome = (outcomes or {}).get(e.id, usual)
        refused = e.capability if outcome is Outcome.REJECTED_OK else ""
        message = "" if outcome is Outcome.PASS else f"because <{e.id}>"
        results.append(
            Result(
                *(e.id, e.tier, e.capability, e.requirement(declared), outcome, 0.4, {"attention": 0.4}, 0, 1.5),
                message=message,
                rejected=refused,
            )
        )
    subject = Subject(
        "npu", "1.0", "engine-plugin-npu", "2.0", "d" * 64, "npu", ("NPU-2", "NPU-2"), "npu 1.3", declared
    )
    suite = Suite("0.1.0", "s" * 64, "1.0", {"killed": 61, "faulty": 61, "passed": 12, "correct": 12})
    whole = Run(subject, suite, {"torch": "2.13"}, "ci", 0, "", True, "2026-06-01T10:00:00+00:00", 90.0, tuple(results))
    return replace(whole, **changes)


# What a case is


def test_the_list_is_what_the_suite_has() -> None:
    """After adding, renaming or removing a case: engine conformance ids --write."""
    assert collect().decode().splitlines() == LISTING.read_text().splitlines()


def test_every_tier_has_cases_that_everybody_must_pass() -> None:
    for profile in PROFILES:
        tiers = {e.tier for e in listing().of(profile).values() if e.must}
        assert tiers >= {"L0", "L1", "L2", "L3", "L6"}, profile


def test_a_simulator_runs_few_architectures() -> None:
    few, all_ = ([i for i in listing().of(p) if ".architectures." in i] for p in ("sim", "ci"))
    assert len(few) < 12 < 100 < len(all_)


def test_ids_do_not_name_the_platform(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        '''L1: made up.'''
        import pytest, torch
        pytestmark = pytest.mark.conformance

        @pytest.mark.parametrize("shape", [(1, 8), (7, 80)])
        @pytest.mark.parametrize("dtype", [torch.float16])
        def test_shapes(conformance_platform, shape, dtype): ...

        @pytest.mark.parametrize("feature", ["causal", "sinks"])
        def test_features(conformance_platform, feature): ...

        @pytest.mark.parametrize("value", [object(), object()], ids=["first", "second"])
        def test_named(conformance_platform, value): ...

        @pytest.mark.conformance(tier="L7", area="old", capability="graphs.full", profiles=("ci",))
        def test_moved(conformance_platform): ...

        def test_no_case(): ...
    """)
    path = pytester.path / "ids.json"
    options = ["--collect-only", "--conformance-isolate", f"--conformance-ids={path}"]
    assert pytester.runpytest_subprocess("--platform=a-b:c", *options).ret == 0
    found = {e["id"]: e for e in json.loads(path.read_text())["cases"]}
    name = "test_ids_do_not_name_the_platform".removeprefix("test_")
    assert set(found) == {
        f"L1.{name}.shapes[float16-1x8]",
        f"L1.{name}.shapes[float16-7x80]",
        f"L1.{name}.features[causal]",
        f"L1.{name}.features[sinks]",
        f"L1.{name}.named[first]",
        f"L1.{name}.named[second]",
        "L7.old.moved",
    }
    assert [found[f"L1.{name}.features[{f}]"]["must"] for f in ("causal", "sinks")] == [True, False]
    assert found["L7.old.moved"] | {"profiles": ["ci"]} == found["L7.old.moved"]
    assert (found["L7.old.moved"]["capability"], found["L7.old.moved"]["must"]) == ("graphs.full", False)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            """
            '''L1: twice.'''
            import pytest
            pytestmark = pytest.mark.conformance
            def test_a(conformance_platform): ...
            class TestMore:
                def test_a(self, conformance_platform): ...
            """,
            "*are both case L1.*.a: give one another name*",
        ),
        (
            """
            import pytest
            @pytest.mark.conformance
            def test_a(conformance_platform): ...
            """,
            "*its tier is not known*",
        ),
    ],
    ids=["doubled", "no tier"],
)
def test_a_case_has_one_id(pytester: pytest.Pytester, source: str, reason: str) -> None:
    pytester.makepyfile(source)
    result = pytester.runpytest_subprocess("--platform=any", "--conformance-isolate", "--conformance-ids=x")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([reason])


def test_shards_are_parts_of_the_whole() -> None:
    cases = listing().cases
    for count in (1, 2, 7):
        sizes = [sum(e.shard(count) == i for e in cases) for i in range(1, count + 1)]
        assert sum(sizes) == len(cases)
        assert min(sizes) > len(cases) / count / 2


# What came of it


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("sinks", True),
        ("alibi", False),
        ("attention.sinks", True),
        ("collectives", True),
        ("collectives.broadcast", False),
        ("graphs", False),
        ("graphs.full", False),
        ("deterministic", True),
        ("kv_dtypes.float8_e4m3fn", False),
        ("architectures", None),
    ],
)
def test_what_is_declared(name: str, declared: bool | None) -> None:
    assert declares(DECLARED, name) is declared


MUST, SINKS, ALIBI = ENTRIES[1:4]


@pytest.mark.parametrize(
    ("case", "said", "outcome", "why"),
    [
        (MUST, {}, "PASS", ""),
        (SINKS, {}, "PASS", ""),
        (ALIBI, {}, "REJECTED_OK", "alibi is not declared"),
        (ALIBI, {"rejected": "alibi"}, "REJECTED_OK", "alibi is not declared"),
        (MUST, {"rejected": "alibi"}, "FAIL", "every platform must"),
        (SINKS, {"rejected": "sinks"}, "FAIL", "which it declares"),
        (entry("L6.a", "architectures"), {"rejected": "alibi"}, "REJECTED_OK", "alibi"),
        (entry("L6.a", "architectures"), {"rejected": "sinks"}, "FAIL", "which it declares"),
        (MUST, {"inconclusive": "one device"}, "INCONCLUSIVE", "one device"),
        (SINKS, {"waiver": WAIVER}, "FAIL", "remove the waiver"),
        (SINKS, {"waiver": WAIVER, "inconclusive": "one device"}, "INCONCLUSIVE", "one device"),
        (SINKS, {"waiver": replace(WAIVER, kind="quarantine")}, "QUARANTINED", "rounds twice"),
    ],
)
def test_a_case_that_holds(case: Entry, said: dict[str, Any], outcome: str, why: str) -> None:
    got, message = verdict(case, DECLARED, **said)
    assert got == outcome
    assert why in message


HEADER = """
'''L1: made up.'''
import ctypes, os, signal, time
import pytest
pytestmark = pytest.mark.conformance

@pytest.fixture
def conformance_platform(request):
    return request.param
"""


def suite(pytester: pytest.Pytester, source: str, *options: str) -> tuple[int, dict[str, Result], str]:
    """Run made-up cases on cpu; the exit status, the results by the cases' names, and what was printed."""
    pytester.makepyfile(test_made=HEADER + source)
    done = pytester.runpytest_subprocess("--platform=cpu", "--conformance-report=report", *options)
    run = read(pytester.path / "report")
    assert (pytester.path / "report/report.html").read_text().startswith("<!doctype html>")
    assert len(list(Xml.parse(pytester.path / "report/junit.xml").iter("testcase"))) == len(run.results)
    return int(done.ret), {r.id.partition("made.")[2]: r for r in run.results}, done.stdout.str() + done.stderr.str()


def test_outcomes(pytester: pytest.Pytester) -> None:
    (pytester.path / "waivers.toml").write_text(
        "".join(
            f'[[waiver]]\nid = "L1.made.{name}"\nkind = "{kind}"\ndevice = "*"\ndriver = "*"\nissue = "https://x.org/1"\n'
            f'reason = "rounds twice"\nexpires = {date.today() + timedelta(9)}\n'
            for name, kind in (("waived", "xfail"), ("mended", "xfail"), ("unsteady", "quarantine"))
        )
    )
    code, found, shown = suite(
        pytester,
        """
def test_holds(conformance_platform, record_property):
    record_property("error over bound: attention", 0.25)

def test_wrong(conformance_platform):
    assert not "the output's error is 3.5 times its bound"

def test_lazy(conformance_platform):
    pytest.skip("not today")

def test_refused(conformance_platform, record_property):
    record_property("rejected", "nan_safe")

def test_undecided(conformance_platform, record_property):
    record_property("inconclusive", "one device")

@pytest.mark.conformance(capability="graphs")
def test_undeclared(conformance_platform): ...

@pytest.mark.conformance(must=False)
def test_waived(conformance_platform):
    assert 0

@pytest.mark.conformance(must=False)
def test_mended(conformance_platform): ...

@pytest.mark.conformance(must=False)
def test_unsteady(conformance_platform):
    assert 0

@pytest.fixture
def untidy():
    yield
    assert 0, "left behind"

def test_teardown(conformance_platform, untidy): ...
""",
        "--conformance-waivers=waivers.toml",
    )
    assert code == 1
    assert {name: str(r.outcome) for name, r in found.items()} == {
        "holds": "PASS",
        "wrong": "FAIL",
        "lazy": "FAIL",
        "refused": "FAIL",
        "undecided": "INCONCLUSIVE",
        "undeclared": "REJECTED_OK",
        "waived": "WAIVED",
        "mended": "FAIL",
        "unsteady": "QUARANTINED",
        "teardown": "FAIL",
    }
    assert (found["holds"].error, found["wrong"].error) == (0.25, 3.5)
    assert "remove the waiver" in found["mended"].message
    assert "left behind" in found["teardown"].message
    assert "5 failed" in shown or "4 failed, " in shown
    assert "worst error over bound: attention: 0.25" in shown
    assert "INCONCLUSIVE L1.made.undecided: one device" in shown


@pytest.mark.timeout(240)
def test_a_crash_and_a_hang_fail_one_case_each(pytester: pytest.Pytester) -> None:
    code, found, shown = suite(
        pytester,
        """
def test_first(conformance_platform): ...

def test_crash(conformance_platform):
    ctypes.string_at(0)

@pytest.mark.timeout(2)
def test_hang(conformance_platform):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as a call that never comes back to Python
    time.sleep(1000)

@pytest.mark.timeout(2)
def test_slow(conformance_platform):
    time.sleep(1000)

def test_leaves(conformance_platform):
    os._exit(0)

def test_last(conformance_platform, record_property):
    record_property("error over bound: attention", 0.25)
""",
        "--conformance-isolate",
    )
    assert code == 1
    assert {name: str(r.outcome) for name, r in found.items()} == {
        **dict.fromkeys(("crash", "hang", "slow", "leaves"), "FAIL"),
        **dict.fromkeys(("first", "last"), "PASS"),
    }
    assert "the process died of SIGSEGV" in found["crash"].message
    assert "in test_crash" in found["crash"].message
    assert "_pytest/" not in found["crash"].message
    assert "no answer within 1" in found["hang"].message
    assert "in test_hang" in found["hang"].message
    assert "Timeout" in found["slow"].message
    assert "ended with exit status 0" in found["leaves"].message
    assert found["last"].error == 0.25
    assert "4 failed, 2 passed" in shown


def test_a_run_that_ends_early_is_red(pytester: pytest.Pytester) -> None:
    """Without isolation too: what was not run is written as a failure."""
    source = """
def test_first(conformance_platform): ...
def test_end(conformance_platform): %s
def test_last(conformance_platform): ...
"""
    for end in ("os._exit(0)", "pytest.exit('enough')"):
        pytester.makepyfile(test_made=HEADER + source % end)
        pytester.runpytest_subprocess("--platform=cpu", "--conformance-report=report")
        outcomes = {r.id.rpartition(".")[2]: r for r in read(pytester.path / "report").results}
        assert outcomes["last"].outcome is Outcome.FAIL
        assert "not run" in outcomes["last"].message


def test_a_seed_draws_other_inputs_again_and_again(pytester: pytest.Pytester) -> None:
    source = """
from hypothesis import given, strategies as st
from engine_conformance.cases import Scale

def test_drawn(conformance_platform, record_property):
    drawn = []

    @Scale().certify(20)
    @given(st.integers(0, 2**60))
    def draw(value):
        drawn.append(value)

    draw()
    record_property("inconclusive", str(drawn))
"""
    runs = [suite(pytester, source, f"--conformance-seed={n}")[1]["drawn"] for n in (0, 5, 5)]
    assert [r.seed for r in runs] == [0, 5, 5]
    fixed, five, again = (r.message for r in runs)
    assert five == again != fixed


def test_seeds() -> None:
    assert seeds.parse("17") == 17
    assert seeds.parse("random") != seeds.parse("random")
    for text in ("-1", "x"):
        with pytest.raises(ValueError, match=text):
            seeds.parse(text)


# Who runs it


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--platform=cpu", "--conformance-seed=-1"], "*takes a number from 0, or 'random'*"),
        (["--platform=cpu", "--shard=3/2"], "*write it as 2/4*"),
        (["--platform=cpu", "--platform=torch:cpu", "--conformance-report=r"], "*a report is about one platform*"),
        (["--platform=npv", "--conformance-isolate"], "*no platform 'npv' is installed*"),
        (["--platform=cpu", "--conformance-waivers=absent.toml"], "*absent.toml*"),
    ],
)
def test_what_cannot_begin(pytester: pytest.Pytester, options: list[str], reason: str) -> None:
    (pytester.path / "r").mkdir()
    (pytester.path / "r/results.json").write_text("of yesterday")
    pytester.makepyfile(test_made=HEADER + "def test_a(conformance_platform): ...")
    result = pytester.runpytest_subprocess(*options)
    assert result.ret != 0
    (result.stderr if result.stderr.lines else result.stdout).fnmatch_lines([reason])


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a distribution with a platform ``chip`` for the processes that are started."""
    site = tmp_path / "site"

    def write(source: str) -> None:
        info = site / "engine_plugin_chip-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-plugin-chip\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[engine.platforms]\nchip = engine_chip:Chip\n")
        (info / "RECORD").write_text("engine_chip.py,,\nengine_chip_kernels.py,,\n")
        (site / "engine_chip.py").write_text(CHIP + source)
        (site / "engine_chip_kernels.py").write_text("")
        monkeypatch.setenv("PYTHONPATH", str(site))
        monkeypatch.setenv("ENGINE_PLATFORM", "not this one")

    return write


CHIP = '''
import os
from engine_sdk import TorchPlatform
class Chip(TorchPlatform):
    """A chip."""
    name, device_type, contract = "chip", "cpu", "1.0"
'''


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("os.abort()", "died of SIGABRT"),
        ("raise OSError('no firmware')", "no firmware"),
        ("    def capabilities(self): return None", "returned a NoneType"),
        ("    def capabilities(self): raise OSError('no firmware')", "no firmware"),
        ("    def __init__(self, device_index=0): raise OSError('no firmware')", "no firmware"),
    ],
)
def test_a_platform_that_does_not_load(plugin: Callable[[str], None], source: str, reason: str) -> None:
    plugin(source)
    with pytest.raises(PluginError, match=reason):
        ask("chip")


def test_a_broken_platform_leaves_no_green_report(plugin: Callable[[str], None], tmp_path: Path) -> None:
    plugin("os.abort()")
    write(run_of(), tmp_path / "report/results.json")
    command = [sys.executable, "-m", "pytest", "--pyargs", "engine_conformance", "--platform=chip"]
    options = ["--conformance-isolate", "--conformance-report=report", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "platform 'chip': the process that loads it died of SIGABRT" in done.stderr
    assert not (tmp_path / "report/results.json").exists()


def test_a_device_that_is_lost_gets_a_new_process(plugin: Callable[[str], None], pytester: pytest.Pytester) -> None:
    """A failure after which nothing computes any more does not fail what follows."""
    plugin("""
    def device(self):
        if os.path.exists(os.environ["LOST"] + str(os.getpid())):
            raise RuntimeError("device lost")
        return super().device()
""")
    os.environ["LOST"] = str(pytester.path / "lost")
    pytester.makepyfile(
        test_made=HEADER.replace(
            "return request.param", "from engine.plugins import load_platform as l; return l('chip')"
        )
        + """
def test_loses(conformance_platform):
    open(os.environ["LOST"] + str(os.getpid()), "w").close()
    conformance_platform.device()

def test_next(conformance_platform):
    conformance_platform.device()
"""
    )
    for options, counts in (([], {"failed": 2}), (["--conformance-isolate"], {"failed": 1, "passed": 1})):
        pytester.runpytest_subprocess("--platform=chip", *options).assert_outcomes(**counts)


def test_a_plugin_of_several_modules_has_one_digest(plugin: Callable[[str], None], tmp_path: Path) -> None:
    plugin("")
    first = ask("chip")
    assert (first.distribution, first.version) == ("engine-plugin-chip", "1.0")
    (tmp_path / "site/engine_chip_kernels.py").write_text("x = 1\n")
    assert ask("chip").digest != first.digest


def test_a_digest_does_not_depend_on_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name / "package"
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "__pycache__/x.pyc").write_text(name)
        (folder / "x.py").write_text("x = 1\n")
    a, b = (digest([tmp_path / name / "package"]) for name in ("a", "b"))
    assert a == b
    (tmp_path / "b/package/x.py").rename(tmp_path / "b/package/y.py")
    assert digest([tmp_path / "b/package"]) != a


# Waivers


def waiver_file(path: Path, **changes: object) -> Path:
    table: dict[str, object] = {
        "id": "L2.attention.agrees[sinks]",
        "kind": "xfail",
        "device": "NPU-2*",
        "driver": ">=1.2",
        "issue": "https://x.org/1",
        "reason": "rounds twice",
        "expires": TODAY,
        **changes,
    }
    lines = [f"{k} = {v if isinstance(v, date) else json.dumps(v)}" for k, v in table.items() if v is not None]
    path.write_text("\n".join(["[[waiver]]", *lines]) + "\n")
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"expires": TODAY - timedelta(1)}, "expired on 2026-05-31"),
        ({"expires": TODAY + timedelta(91)}, "choose 2026-08-30 or before"),
        ({"expires": "2026-06-02"}, "is no date"),
        ({"kind": "skip"}, "xfail, quarantine"),
        ({"issue": "known"}, "is no link"),
        ({"reason": " "}, "reason must be a text"),
        ({"driver": "new"}, "write versions as in"),
        ({"device": None}, "device"),
        ({"why": "x"}, "why"),
    ],
)
def test_a_waiver_that_is_unsound(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(waiver_file(tmp_path / "waivers.toml", **changes), TODAY)


def test_a_waiver_applies_where_it_says(tmp_path: Path) -> None:
    known, subject = {e.id: e for e in ENTRIES}, run_of().subject
    (waiver,) = load(waiver_file(tmp_path / "waivers.toml"), TODAY)
    assert select([waiver], known, subject) == {waiver.id: waiver}
    assert select([waiver], known, replace(subject, devices=("NPU-3",))) == {}
    assert select([waiver], known, replace(subject, driver="npu 1.1")) == {}
    assert select([waiver], known, replace(subject, driver="")) == {}
    with pytest.raises(ConfigError, match="there is no such case"):
        select([replace(waiver, id="L2.attention.agrees")], known, subject)
    with pytest.raises(ConfigError, match="every platform must pass it"):
        select([replace(waiver, id=MUST.id)], known, subject)


# What is written about it


def waived(**changes: Any) -> Run:
    return run_of({WAIVER.id: Outcome.WAIVED}, waivers=(replace(WAIVER, **changes).plain(),))


@pytest.mark.parametrize(
    ("run", "level"),
    [
        (run_of(), "Core"),
        (run_of(graphs="full"), "Full"),
        (run_of({"L5.graphs.replay": Outcome.INCONCLUSIVE}, graphs="full"), "Core"),
        (run_of({"L2.attention.agrees[sinks]": Outcome.INCONCLUSIVE}, graphs="full"), "Serving"),
        (run_of({"L8.performance.launches": Outcome.FAIL}, graphs="full"), "Full"),
        (waived(), "Core"),
        (replace(waived(), subject=run_of(graphs="full").subject), ""),  # graphs are declared, and were refused
    ],
)
def test_levels(run: Run, level: str) -> None:
    found = assess(run, KNOWN, TODAY)
    assert found.level == level, found
    assert bool(found.problems) != bool(level)
    assert bool(found.missing) == (level in ("Core", "Serving"))


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (run_of({MUST.id: Outcome.FAIL}), "1 case fails: L2.attention.causal"),
        (run_of({SINKS.id: Outcome.FAIL}), "1 case fails"),
        (run_of({MUST.id: Outcome.INCONCLUSIVE}), "is MUST and INCONCLUSIVE"),
        (run_of({MUST.id: Outcome.WAIVED}), "is MUST and WAIVED"),
        (run_of({MUST.id: Outcome.REJECTED_OK}), "is MUST and REJECTED_OK"),
        (run_of({SINKS.id: Outcome.REJECTED_OK}), "was refused, though it is declared"),
        (run_of({ALIBI.id: Outcome.PASS}), "was not refused, though it is not declared"),
        (run_of({SINKS.id: Outcome.WAIVED}), "no waiver says so"),
        (waived(expires=TODAY - timedelta(1)), "expired"),
        (waived(id=MUST.id), "every platform must pass it"),
        (run_of(shard="1/2"), "merge the results"),
        (run_of(seed=3), "seed 3"),
        (replace(run_of(), results=run_of().results[1:]), "1 case is missing: L0.device.events"),
        (replace(run_of(), results=run_of().results * 2), "6 cases occur more than once"),
        (replace(run_of(), results=(replace(run_of().results[0], id="L0.x"), *run_of().results)), "not on the list"),
    ],
)
def test_what_cannot_be_certified(run: Run, reason: str) -> None:
    found = assess(run, KNOWN, TODAY)
    assert not found.level
    assert reason in "; ".join(found.problems)


def test_nothing_declared_and_nothing_done_is_no_level() -> None:
    """A platform that refuses everything, MUST cases too, and one that runs nothing."""
    refuses = run_of(dict.fromkeys((e.id for e in ENTRIES), Outcome.REJECTED_OK))
    assert "is MUST and REJECTED_OK" in str(assess(refuses, KNOWN).problems) or not assess(refuses, KNOWN).level
    assert not assess(replace(run_of(), results=()), KNOWN).level


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = waived()
    write(run, tmp_path / "results.json")
    assert read(tmp_path) == run
    for text, reason in (("{}", "missing required field"), ("x", "malformed"), (None, "No such file")):
        (tmp_path / "results.json").unlink(missing_ok=True)
        if text:
            (tmp_path / "results.json").write_text(text)
        with pytest.raises(ConfigError, match=reason):
            read(tmp_path)


def test_a_certificate_is_of_its_results(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    made = certificate(run_of(), "Core")
    write(made, path)
    assert check(path, made) == []
    assert check(path, certificate(run_of(), "Full")) == [f"{path} says another level"]
    other = replace(run_of(), seconds=91.0)
    assert check(path, certificate(other, "Core")) == [f"{path} says another results"]
    assert {"level", "profile", "platform", "numerics", "suite", "software"} <= made.keys()


def test_shards_are_merged() -> None:
    whole = run_of()
    parts = [replace(whole, shard=f"{i}/2", results=whole.results[i - 1 :: 2]) for i in (1, 2)]
    together = merge(parts)
    assert {r.id for r in together.results} == {r.id for r in whole.results}
    assert assess(together, KNOWN, TODAY).level == "Core"
    for wrong, reason in (
        (parts[:1], "name each of 1/N to N/N once"),
        ([parts[0], parts[0]], "name each"),
        ([whole, whole], "name each"),
        ([parts[0], replace(parts[1], profile="smoke")], "differ in their profile"),
    ):
        with pytest.raises(ConfigError, match=reason):
            merge(wrong)


def test_what_changed_between_two_releases() -> None:
    before = run_of()
    assert compare(before, before) == []
    later = run_of({SINKS.id: Outcome.FAIL}, graphs="full")
    later = replace(
        later, results=tuple(replace(r, errors={"attention": 0.6}) for r in later.results if r.tier != "L0")
    )
    found = {(c.kind, c.what): c for c in compare(before, later)}
    assert found["outcome", SINKS.id].regression
    assert found["case", "L0.device.events"].regression
    assert found["error", "attention"].regression
    assert not found["capability", "graphs"].regression
    assert not found["outcome", "L5.graphs.replay"].regression
    back = {(c.kind, c.what): c for c in compare(later, before)}
    assert back["capability", "graphs"].regression
    assert not back["error", "attention"].regression
    assert not back["outcome", SINKS.id].regression


def command(*words: str) -> Callable[[pytest.CaptureFixture[str]], tuple[int, str]]:
    def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
        code = main(["conformance", *words])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name / "results.json" for name in ("a", "b", "c")]
    whole = run_of()
    for index, path in enumerate(paths[:2]):
        write(replace(whole, shard=f"{index + 1}/2", results=whole.results[index::2]), path)
    a, b, c = (str(p.parent) for p in paths)
    code, shown = command("merge", a, b, "--report", c)(capsys)
    assert (code, read(paths[2]).counts()) == (0, whole.counts()), shown
    assert command("compare", c, c)(capsys) == (0, "nothing changed\n")
    code, shown = command("compare", c, a)(capsys)
    assert code == 1
    assert "worse  case  L2.attention.causal" in shown
    code, shown = command("compare", c, a, "--json")(capsys)
    assert all(change["regression"] for change in json.loads(shown))
    code, shown = command("verify", c, "--out", str(tmp_path / "certificate.json"))(capsys)
    assert code == 1
    assert "wrong: the suite that ran" in shown
    assert "unchecked: whether the plugin is the one that ran" in shown
    assert not (tmp_path / "certificate.json").exists()
    code, shown = command("verify", str(tmp_path / "absent"))(capsys)
    assert code == 2
    assert "remedy: name the results.json" in shown
    code, shown = command("ids", "--profile", "sim")(capsys)
    assert code == 0
    assert "L0.device.events" in shown


def test_a_certificate_is_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the suite and the plugin that are here, all cases in order: graphs are refused, so the level is Core."""
    subject, here = subject_of(load_platform("cpu")), suite_here()
    declared = {**subject.capabilities, "graphs": "none"}
    results = [
        Result(e.id, e.tier, e.capability, asked, outcome, rejected=e.capability if asked == "UNDECLARED" else "")
        for e in listing().of("ci").values()
        for asked in (e.requirement(declared),)
        for outcome in (Outcome.REJECTED_OK if asked is Requirement.UNDECLARED else Outcome.PASS,)
    ]
    run = run_of(results=tuple(results), subject=replace(subject, capabilities=declared), suite=here)
    write(run, tmp_path / "results.json")
    path = str(tmp_path / "certificate.json")
    code, shown = command("verify", str(tmp_path), "--out", path)(capsys)
    assert code == 0, shown
    assert "level     Core" in shown
    assert "missing: Serving needs graphs" in shown
    assert command("verify", str(tmp_path), "--certificate", path)(capsys)[0] == 0
    write(replace(run, subject=replace(run.subject, digest="0" * 64)), tmp_path / "results.json")
    code, shown = command("verify", str(tmp_path), "--certificate", path)(capsys)
    assert code == 1
    for told in ("the plugin that ran, engine 0.1.0 (000000000000)", "says another level", "says another results"):
        assert told in " ".join(shown.split())


def test_junit_says_what_a_ci_system_has_to_know(tmp_path: Path) -> None:
    run = run_of({MUST.id: Outcome.FAIL, SINKS.id: Outcome.INCONCLUSIVE})
    run = replace(run, results=tuple(replace(r, message=f"\x1b[31m{r.message}\0") for r in run.results))
    write_junit(run, tmp_path / "junit.xml")
    suites = {s.get("name"): s for s in Xml.parse(tmp_path / "junit.xml").iter("testsuite")}
    assert [suites["L2"].get(n) for n in ("tests", "failures", "skipped")] == ["3", "1", "1"]
    failed = suites["L2"].find("testcase/failure")
    assert failed is not None
    assert failed.text == "?[31mbecause <L2.attention.causal>?"
    assert {c.get("name") for s in suites.values() for c in s} == {e.id for e in ENTRIES}


def test_the_page_stands_alone() -> None:
    for run in (waived(), run_of({SINKS.id: Outcome.FAIL})):
        assert "because &lt;L2.attention.agrees[sinks]&gt;" in page(run)
        assert "because <" not in page(run)
    html = page(waived())
    for outside in ("src=", "@import", "url(", "<link", "fetch("):
        assert outside not in html
    assert 'href="https://x.org/1"' in html
    assert "61 of 61" in html
    for result in run_of().results:
        assert result.id in html


@pytest.mark.parametrize(
    ("run", "word"), [(run_of({MUST.id: Outcome.FAIL}), "× Fails"), (run_of(), "Incomplete")], ids=["red", "partial"]
)
def test_the_page_says_what_is_proven(run: Run, word: str) -> None:
    assert word in page(run)  # its cases are not those of the checked-in list


# Rules for plugins


def test_imports_are_found_wherever_they_are() -> None:
    source = """
import engine.scheduler
from engine import LLM
import engine_sdk, engineering
def f():
    from engine.kv import pool
    importlib.import_module("engine.runner")
    __import__("engine.sampler")
    sys.modules["engine.batch"].x = 1
from .engine import local
text = "engine.llm"
"""
    found = {name for name, _ in imported(source) if name.split(".")[0] == "engine"}
    assert found == {f"engine{m}" for m in ("", ".scheduler", ".kv", ".runner", ".sampler", ".batch")}


def test_a_plugin_that_imports_the_inside(plugin: Callable[[str], None]) -> None:
    plugin("    def ops(self):\n        import engine.scheduler\n        return super().ops()\n")
    code = """
from engine.plugins import load_platform
from engine_conformance.rules import forbidden_imports
print(forbidden_imports(load_platform("chip")))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "engine_chip.py:8: engine.scheduler" in shown
    assert forbidden_imports(TorchPlatform.__new__(TorchPlatform)) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("", []),
        (
            "import engine_sdk\nengine_sdk.REFERENCE_OPS.rms_norm.__code__ = (lambda x, w, e: x).__code__\n"
            "TorchPlatform.linear = lambda self, scheme: None",
            ["rms_norm", "TorchPlatform.linear"],
        ),
        (
            "    def ops(self):\n        import engine.interfaces as i\n        i.Communicator.barrier = None\n"
            "        return super().ops()",
            ["Communicator.barrier"],
        ),
    ],
    ids=["nothing", "at load", "when used"],
)
def test_a_plugin_that_patches(plugin: Callable[[str], None], source: str, found: Sequence[str]) -> None:
    plugin(source)
    got = patches("chip")
    assert bool(got) == bool(found), got
    for name in found:
        assert any(name in where for where in got), got


def test_nothing_changes_by_itself() -> None:
    assert changed(snapshot(), snapshot()) == []


def test_patches_without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of extras that are not installed say so in a sentence of their own, and are left out."""
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "engine.extensions.server.tracing", raising=False)
    load_ours()
    assert "engine.extensions.server.tracing" not in sys.modules


def test_requirements_are_three() -> None:
    asked = {e.requirement(DECLARED) for e in ENTRIES}
    assert asked == set(Requirement)
