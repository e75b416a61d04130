"""Pytest's side of the suite: its options, which cases run, in which process, and what their reports mean.

Loaded in every pytest run of an environment that has the engine, so nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Generator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.errors import EngineError
from engine_conformance import seeds
from engine_conformance.catalogue import PROFILES, Entry, check_unique, entry_of

if TYPE_CHECKING:
    from engine_conformance.outcomes import Judge
    from engine_conformance.results import Subject
    from engine_sdk import Platform

_FILES = ("results.json", "report.html", "junit.xml")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's options."""
    group = parser.getgroup("engine conformance")
    add = group.addoption
    add("--platform", action="append", default=[], metavar="NAME", help="platform to certify; may be repeated")
    add(
        "--conformance-profile",
        choices=list(PROFILES),
        default="smoke",
        help="smoke: minutes; ci: tens of minutes; cert: hours; sim: few and small inputs, for a slow simulator",
    )
    about = "draw other inputs than every run does, the same for the same number; 'random' explores (default: 0)"
    add("--conformance-seed", default="0", metavar="N", help=about)
    add("--conformance-report", type=Path, metavar="DIR", help=f"write {', '.join(_FILES)}")
    add("--conformance-waivers", type=Path, metavar="FILE", help="cases that are known to fail, as TOML")
    add("--conformance-driver", default="", metavar="VERSION", help="the driver's version, where it is not found")
    about = "run cases in processes of their own: a crash or a hang fails one case and the run goes on"
    add("--conformance-isolate", action="store_true", help=about)
    add("--shard", default="", metavar="I/N", help="only the I-th of N parts of the cases, by their ids")
    add("--conformance-worker", default="", help=argparse.SUPPRESS)
    add("--conformance-ids", type=Path, help=argparse.SUPPRESS)


_PLATFORMS = pytest.StashKey[dict[str, "Platform"]]()
_SUBJECTS = pytest.StashKey[dict[str, "Subject"]]()
_SEED = pytest.StashKey[int]()


def platforms(config: pytest.Config) -> dict[str, Platform]:
    """The platforms that ``--platform`` names, made; raises `pytest.UsageError` with the reason why one cannot run."""
    if _PLATFORMS not in config.stash:
        from engine.plugins import load_platform

        try:
            config.stash[_PLATFORMS] = {name: load_platform(name) for name in _names(config)}
        except EngineError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_PLATFORMS]


def subjects(config: pytest.Config) -> dict[str, Subject]:
    """The platforms described; where cases run in other processes, none is loaded in this one."""
    if _SUBJECTS not in config.stash:
        from engine_conformance.subject import ask, subject_of

        driver = config.getoption("conformance_driver")
        try:
            config.stash[_SUBJECTS] = (
                {name: ask(name, driver) for name in _names(config)}
                if config.getoption("conformance_isolate")
                else {name: subject_of(platform, driver) for name, platform in platforms(config).items()}
            )
        except EngineError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_SUBJECTS]


def _names(config: pytest.Config) -> list[str]:
    return list(dict.fromkeys(config.getoption("platform")))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Check the options, before other plugins read those that follow from them."""
    config.addinivalue_line("markers", "conformance(tier, area, capability, must, profiles): what a case is")
    if not _names(config):
        return
    option = config.option
    if option.conformance_worker:
        option.conformance_isolate, option.conformance_report, option.xmlpath = False, None, None
        option.maxfail = 0
    try:
        config.stash[_SEED] = seed = seeds.parse(option.conformance_seed)
    except ValueError as error:
        raise pytest.UsageError("--conformance-seed takes a number from 0, or 'random'") from error
    option.conformance_seed = str(seed)
    seeds.use(seed)
    if seed and getattr(option, "hypothesis_seed", None) is None:
        option.hypothesis_seed = str(seed)
    _part(config)
    if option.conformance_isolate and getattr(option, "numprocesses", None):
        raise pytest.UsageError("--conformance-isolate starts processes itself: leave out -n")
    if folder := option.conformance_report:
        if len(_names(config)) > 1:
            raise pytest.UsageError("a report is about one platform: run the suite once for each")
        for file in _FILES:  # of an earlier run: this one may end before it writes
            (folder / file).unlink(missing_ok=True)


def _part(config: pytest.Config) -> tuple[int, int]:
    """Which of how many shards this is; ``(1, 1)`` for the whole."""
    text = config.getoption("shard") or "1/1"
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise pytest.UsageError(f"--shard={text}: write it as 2/4, the second of four")
    return int(index), int(count)


def pytest_sessionstart(session: pytest.Session) -> None:
    """End the session at once when a platform that was named cannot run."""
    config = session.config
    if not _names(config) or config.getoption("conformance_ids"):
        return
    if where := config.getoption("conformance_worker"):
        from engine_conformance.isolation import Reporter

        config.pluginmanager.register(Reporter(config, where, lambda: _still_works(platforms(config))))
    elif not hasattr(config, "workerinput"):  # of pytest-xdist: its controller judges
        described = subjects(config)
        config.pluginmanager.register(Bench(config, described), "engine_conformance_bench")


def _still_works(made: dict[str, Platform]) -> None:
    import torch

    for platform in made.values():
        one = torch.ones(8, device=platform.device().torch_device) + 1
        platform.device().synchronize()
        if float(one.sum()) != 16:
            raise RuntimeError("1 + 1 is not 2 on the device any more")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name what is certified."""
    return [
        f"conformance: {name}, contract {subject.contract}, on "
        f"{', '.join(f'{index}: {device}' for index, device in enumerate(subject.devices))}; "
        f"profile {config.getoption('conformance_profile')}, seed {config.getoption('conformance_seed')}"
        for name, subject in config.stash.get(_SUBJECTS, {}).items()
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every case of the suite once for each platform."""
    if "conformance_platform" in metafunc.fixturenames:
        if not (names := _names(metafunc.config)):
            raise pytest.UsageError("the conformance suite needs a platform: add --platform=NAME")
        metafunc.parametrize("conformance_platform", names, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the cases of the profile and of the shard, by tier, each with a limit to its time."""
    entries = {item: entry for item in items if (entry := entry_of(item))}
    if not entries:
        return
    check_unique(entries)
    if path := config.getoption("conformance_ids"):
        from engine_conformance.catalogue import write_listing
        from engine_conformance.subject import software

        write_listing(entries.values(), software()["transformers"], path)
    if not config.pluginmanager.hasplugin("timeout"):
        raise pytest.UsageError("the conformance suite needs pytest-timeout: pip install 'engine[conformance]'")
    order = {item: position for position, item in enumerate(items)}
    profile, (index, count) = config.getoption("conformance_profile"), _part(config)
    kept = {item for item, entry in entries.items() if profile in entry.profiles and entry.shard(count) == index}
    config.hook.pytest_deselected(items=[item for item in entries if item not in kept])
    others = [item for item in items if item not in entries]
    items[:] = others + sorted(kept, key=lambda item: (entries[item].tier, order[item]))
    for item in kept:
        if not item.get_closest_marker("timeout") and not config.getoption("timeout", None):
            item.add_marker(pytest.mark.timeout(PROFILES[profile]))


def _limit_of(item: pytest.Item) -> float:
    """The seconds that a test may take."""
    marker = item.get_closest_marker("timeout")
    said = marker.args[0] if marker and marker.args else item.config.getoption("timeout", None)
    return float(said or PROFILES["cert"])


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests in processes of their own, where that was asked for."""
    config = session.config
    if not config.getoption("conformance_isolate") or config.option.collectonly:
        return None
    if session.testsfailed and not config.option.continue_on_collection_errors:
        return None  # pytest's own loop says so
    from engine_conformance import isolation

    isolation.run(session, _limit_of)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count a skipped case as a failure, for what is not run is not certified; and say which case it is."""
    report = yield
    if report.skipped and "conformance_platform" in getattr(item, "fixturenames", ()):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped; the suite has no skips: {report.longrepr}"
    if entry := entry_of(item):
        report.conformance = _label(item, entry)  # type: ignore[attr-defined]
    return report


def _label(item: pytest.Item, entry: Entry) -> dict[str, Any]:
    """Goes with a report through pipes."""
    return {"platform": item.callspec.params["conformance_platform"], **asdict(entry)}  # type: ignore[attr-defined]


class Bench:
    """Judges the reports, and writes what came of them: in the process that the user started.

    Args:
        config: of the session.
        described: the platforms.
    """

    def __init__(self, config: pytest.Config, described: dict[str, Subject]) -> None:
        self._config, self._subjects = config, described
        self._judges: dict[str, Judge] = {}
        self._labels: dict[str, dict[str, Any]] = {}
        self._waivers: tuple[dict[str, str], ...] = ()
        self._began, self._started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Know what to expect. A report that says so lies there from now on, in case that this process ends."""
        chosen = {item: entry for item in session.items if (entry := entry_of(item))}
        self._judge_with(list(chosen.values()))
        for item, entry in chosen.items():
            self._labels[item.nodeid] = label = _label(item, entry)
            self._judges[label["platform"]].expect(entry)
        if chosen and not self._config.option.collectonly:
            self._write()

    def _judge_with(self, entries: list[Entry]) -> None:
        from engine_conformance import waivers
        from engine_conformance.catalogue import listing
        from engine_conformance.outcomes import Judge

        known = {entry.id: entry for entry in entries}
        try:
            file = self._config.getoption("conformance_waivers")
            written = waivers.load(file) if file else []
            if written:
                known = listing().of(self._config.getoption("conformance_profile")) | known
            for name, subject in self._subjects.items():
                applied = waivers.select(written, known, subject)
                self._waivers += tuple(waiver.plain() for waiver in applied.values())
                self._judges[name] = Judge(subject.capabilities, applied, self._config.stash[_SEED])
        except EngineError as error:
            raise pytest.UsageError(str(error)) from error

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Judge a phase of a case, before others see the report."""
        label: dict[str, Any] | None = getattr(report, "conformance", None) or self._labels.get(report.nodeid)
        if label:
            if not self._judges:  # where pytest-xdist collects in its workers
                self._judge_with([])
            fields = {name: value for name, value in label.items() if name != "platform"}
            self._judges[label["platform"]].take(Entry(**{**fields, "profiles": tuple(label["profiles"])}), report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """A letter of its own for a refusal and for what could not be decided."""
        said = dict(getattr(report, "user_properties", ())).get("outcome")
        if report.when == "call" and report.passed and said in ("REJECTED_OK", "INCONCLUSIVE"):
            return "passed", said[0].lower(), said
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        self._write()

    def _write(self) -> None:
        folder = self._config.getoption("conformance_report")
        if not folder or not self._judges:
            return
        from engine_conformance.page import write_report
        from engine_conformance.results import Run
        from engine_conformance.subject import software, suite

        ((name, judge),) = self._judges.items()
        run = Run(
            subject=self._subjects[name],
            suite=suite(),
            software=software(),
            profile=self._config.getoption("conformance_profile"),
            seed=self._config.stash[_SEED],
            shard=self._config.getoption("shard"),
            isolated=self._config.getoption("conformance_isolate"),
            started=self._started,
            seconds=round(time.monotonic() - self._began, 1),
            results=tuple(judge.results()),
            waivers=self._waivers,
        )
        write_report(run, folder)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show what could not be decided, how close to its bound each kind of result came, and the outcomes."""
        from engine_conformance.results import Outcome, worst

        for name, judge in self._judges.items():
            results = list(judge.results())
            for result in results:
                if result.outcome is Outcome.INCONCLUSIVE:
                    terminalreporter.write_line(f"INCONCLUSIVE {result.id}: {result.message}", yellow=True)
            for kind, ratio in worst(results).items():
                terminalreporter.write_line(f"worst error over bound: {kind}: {ratio:.2f}")
            if results:
                counts = [(o, sum(r.outcome is o for r in results)) for o in Outcome]
                told = ", ".join(f"{count} {outcome}" for outcome, count in counts if count)
                terminalreporter.write_line(f"conformance of {name}: {told}")
        if folder := self._config.getoption("conformance_report"):
            terminalreporter.write_line(f"report: {Path(os.path.relpath(folder)) / 'report.html'}")
